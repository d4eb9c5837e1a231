"""What can be known and done before training, and a way out of it.

    python -m unitoken.streaming_data plan yamls/stage1.yaml --sweep-length
    python -m unitoken.streaming_data simulate yamls/stage1.yaml \\
        --tokens-per-second 100000
    python -m unitoken.streaming_data convert-config META.yaml --out data.yaml
    python -m unitoken.streaming_data export-webdataset data/cats \\
        s3://bucket/cats-tars

A stage's YAML file, or its `data:` part alone, with settings as in training (data.packed_length=8192) behind it.
"""

from __future__ import annotations

from unitoken.common.interruption import install_handlers

if __name__ == "__main__":
    install_handlers("interrupted")  # before all other imports

import json
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer

from unitoken.common.cli import one_line_errors, run_program
from unitoken.common.config import Config, load_config
from unitoken.common.errors import ConfigError

HELP = __doc__.replace("\n\n    ", "\n\n\b\n    ")  # click keeps the lines of a paragraph that begins with \b
app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a stage's YAML file, or its `data:` part alone")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in training: data.packed_length=8192")
    ] = None,
    sweep_length: Annotated[
        bool, typer.Option(help="also print how full packs of 1k to 16k tokens are")
    ] = False,
    epoch: Annotated[int, typer.Option(min=0)] = 0,
    image_size: Annotated[
        int | None, typer.Option(help="of the vision tower, pixels; default: as model.vision says")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(help="of the vision tower, pixels; default: as model.vision says")
    ] = None,
) -> None:
    """Print the mixture as it will really be: samples, tokens and trained tokens of each stream."""
    with one_line_errors():
        data, vision = load_data(config, overrides or [])
        from unitoken.dataset.vision_views import Views
        from unitoken.streaming_data.check import other_codes, uneven_proportions
        from unitoken.streaming_data.plan.lengths import read_lengths
        from unitoken.streaming_data.plan.recipe import Recipe
        from unitoken.streaming_data.plan.store import load_or_build
        from unitoken.streaming_data.sources import open_sources

        size = tower_size(vision, image_size, patch_size)
        sources, views = open_sources(data), Views(*size, data.anyres)
        recipe = Recipe.of(data, sources, views)
        try:
            samples = [read_lengths(source, recipe, views) for source in sources]
            report = load_or_build(data.cache_folder / "plans", recipe, epoch, lambda: samples).report
            typer.echo(report.table())
            for line in [*uneven_proportions(data), *other_codes(sources), *report.warnings()]:
                typer.echo(f"warning: {line}", err=True)
        finally:  # where there is no such plan, the lengths say which there are
            if sweep_length:
                from unitoken.streaming_data.tools.sweep import sweep, sweep_table

                typer.echo(f"\n{sweep_table(sweep(recipe, sources, views))}")


def load_data(path: Path, overrides: list[str]) -> tuple[Any, Any]:
    """The settings under `data:`, or a file that is these settings; and what a stage says under `model.vision`."""
    from unitoken.streaming_data.settings import DataConfig

    class Model(Config):
        model_config = pydantic.ConfigDict(extra="ignore")
        vision: dict[str, Any] | str | None = None

    class Stage(Config):
        model_config = pydantic.ConfigDict(extra="ignore")  # the rest of the stage is not for us
        data: DataConfig
        model: Model = Model()

    try:
        alone = any(line.startswith("streams:") for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        alone = False  # reported by load_config
    if alone:
        return load_config(DataConfig, path, [override.removeprefix("data.") for override in overrides]), None
    stage = load_config(Stage, path, overrides)
    return stage.data, stage.model.vision


SO400M = (384, 14)  # SigLIP's, which the reference uses


def tower_size(vision: Any, image_size: int | None, patch_size: int | None) -> tuple[int, int]:
    """Pixels of a view and of a patch, each way: as the command line says, or the stage's model, or its folder's config.json."""
    found = vision if isinstance(vision, dict) else {}
    if isinstance(vision, str):
        path = Path(vision).expanduser() / "config.json"
        try:
            fields = json.loads(path.read_bytes())
            found = fields.get("vision_config", fields) if isinstance(fields, dict) else {}
        except (OSError, ValueError, RecursionError):
            if image_size is None or patch_size is None:
                assumed = f"views of {SO400M[0]} pixels with patches of {SO400M[1]}"
                typer.echo(f"model.vision: {vision} is not on this machine: taken for {assumed}", err=True)
            found = {"image_size": SO400M[0], "patch_size": SO400M[1]}
    defaults = SO400M if vision is None else (224, 16)  # as SigLIP's own configuration
    size = [
        image_size or found.get("image_size", defaults[0]),
        patch_size or found.get("patch_size", defaults[1]),
    ]
    if not all(isinstance(one, int) and 0 < one <= 1 << 14 for one in size) or size[1] > size[0]:
        raise ConfigError(
            f"model.vision: expected image_size and patch_size in pixels, found {size[0]!r} and {size[1]!r}"
        )
    return size[0], size[1]


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="a stage's YAML file, or its `data:` part alone")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in training: data.global_batch=8192")
    ] = None,
    nodes: Annotated[str, typer.Option(help="numbers of nodes")] = ",".join(str(1 << n) for n in range(11)),
    ranks_per_node: Annotated[int, typer.Option(min=1)] = 8,
    batch_seconds: Annotated[
        float | None, typer.Option(help="that a step takes; or give --tokens-per-second")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="that a node trains on")] = None,
    bandwidth: Annotated[str, typer.Option(help="of a node: 500mbit, 10gbit")] = "1gbit",
    cache_limit: Annotated[
        str | None, typer.Option(help="of a node: 100gb; default: the settings' cache_limit")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="of the vision tower, pixels; default: as model.vision says")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(help="of the vision tower, pixels; default: as model.vision says")
    ] = None,
) -> None:
    """Print what each node will download and cache, for any number of nodes. Every stream is taken for a remote one."""
    with one_line_errors():
        data, vision = load_data(
            config, [*(overrides or []), *([f"data.cache_limit={cache_limit}"] if cache_limit else [])]
        )
        from unitoken.streaming_data.tools.simulate import (
            demand_table,
            parse_bandwidth,
            parse_nodes,
            simulate_nodes,
        )

        counts, bits = parse_nodes(nodes), parse_bandwidth(bandwidth)
        demands, impossible = simulate_nodes(
            data,
            counts,
            ranks_per_node,
            tower_size(vision, image_size, patch_size),
            bits,
            batch_seconds,
            tokens_per_second,
        )
        if as_json:
            typer.echo(
                json.dumps({"nodes": [demand.model_dump() for demand in demands], "not_possible": impossible})
            )
            return
        uneven = ""
        if impossible:
            ranks = impossible[-1] * ranks_per_node
            uneven = (
                f"{', '.join(map(str, impossible))} nodes of {ranks_per_node} ranks can not share a global_batch of "
                f"{data.global_batch} packs evenly; {ranks:,} ranks need a multiple of {ranks:,}"
            )
        if not demands:
            raise ConfigError(uneven)
        typer.echo(demand_table(demands, data.cache_limit))
        typer.echo(uneven, nl=bool(uneven))


@app.command()
def convert_config(
    meta: Annotated[Path, typer.Argument(help="the reference's file: META, a list of path and ratio")],
    out: Annotated[Path | None, typer.Option(help="a file to write; default: print")] = None,
    datasets: Annotated[
        str, typer.Option(help="folder or URL where the tokenized datasets lie, or will")
    ] = "data",
) -> None:
    """Turn the reference's data file into the `data:` part of a stage."""
    with one_line_errors():
        from unitoken.common.files import write_aside
        from unitoken.streaming_data.tools.convert_config import convert_config

        text = convert_config(meta, datasets)
        if out is None:
            typer.echo(text, nl=False)
            return
        if out.exists():
            raise ConfigError(f"{out} is there already")
        try:
            write_aside(out, text.encode())
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


@app.command()
def export_webdataset(
    dataset: Annotated[str, typer.Argument(help="a dataset folder, or its URL")],
    out: Annotated[str, typer.Argument(help="an empty folder or URL")],
    samples_per_tar: Annotated[int, typer.Option(min=1)] = 10_000,
) -> None:
    """Write a dataset as WebDataset tars, for those who train on that stack."""
    with one_line_errors():
        from unitoken.streaming_data.tools.export_webdataset import export_webdataset

        typer.echo(f"{export_webdataset(dataset, out, samples_per_tar)} tars in {out}")


if __name__ == "__main__":
    run_program(app, "streaming_data")
