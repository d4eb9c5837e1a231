r"""Look at a mixture before training, and convert from and to other formats.

    python -m unitoken.streaming_data plan yamls/stage1.yaml --sweep-length --report plan.html
    python -m unitoken.streaming_data simulate yamls/stage1.yaml \
        --tokens-per-second 100000
    python -m unitoken.streaming_data convert-config META.yaml --out data.yaml
    python -m unitoken.streaming_data export-webdataset data/cats \
        s3://bucket/cats-tars

`plan` and `simulate` read a stage's YAML file, or a file with its `data:` section alone; settings as in
training (data.packed_length=8192) follow it.
"""

from __future__ import annotations

from unitoken.common.interruption import install_handlers

if __name__ == "__main__":
    install_handlers("interrupted")  # before all other imports

import json
from pathlib import Path
from typing import Annotated

import typer

from unitoken.common.cli import command_app, one_line_errors, report, run_program, warn
from unitoken.common.errors import ConfigError

app = command_app(__doc__)

StageFile = Annotated[Path, typer.Argument(help="A stage's YAML file, or its `data:` section alone.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's, as data.packed_length=8192."),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Pixels of the vision tower's view.  [default: as in model.vision]", show_default=False
    ),
]
PatchSize = Annotated[
    int | None,
    typer.Option(
        help="Pixels of the vision tower's patch.  [default: as in model.vision]", show_default=False
    ),
]


@app.command()
def plan(
    config: StageFile,
    overrides: Overrides = None,
    sweep_length: Annotated[
        bool, typer.Option("--sweep-length", help="Also print how full packs of 1k to 16k tokens would be.")
    ] = False,
    epoch: Annotated[int, typer.Option(min=0, help="The epoch to plan.")] = 0,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", help="Also write this HTML file: the mixture in every batch, in pictures."),
    ] = None,
    image_size: ImageSize = None,
    patch_size: PatchSize = None,
) -> None:
    """Print the mixture as training will see it.

    The table has the samples, tokens and trained tokens of each stream in an epoch.
    """
    with one_line_errors():
        from unitoken.dataset.vision_views import Views
        from unitoken.streaming_data.check import other_codes, uneven_proportions
        from unitoken.streaming_data.plan.lengths import read_lengths
        from unitoken.streaming_data.plan.recipe import Recipe
        from unitoken.streaming_data.plan.store import load_or_build
        from unitoken.streaming_data.sources import open_sources
        from unitoken.streaming_data.tools.data_section import read_data_section, tower_size
        from unitoken.streaming_data.tools.plan_page import write_plan_page
        from unitoken.streaming_data.tools.sweep import SweepRow, sweep, sweep_table

        section = read_data_section(config, overrides or [])
        size = tower_size(section.vision, image_size, patch_size)
        data = section.data
        sources, views = open_sources(data), Views(*size, data.anyres)
        recipe = Recipe.of(data, sources, views)
        rows: list[SweepRow] = []
        try:
            samples = [read_lengths(source, recipe, views) for source in sources]
            found = load_or_build(data.cache_folder / "plans", recipe, epoch, lambda: samples).report
            report(found.table())
            for line in [*uneven_proportions(data), *other_codes(sources), *found.warnings()]:
                warn(line)
        finally:  # also when this plan is impossible: the table shows which lengths are possible
            if sweep_length:
                rows = sweep(recipe, sources, views)
                report(f"\n{sweep_table(rows)}")
        if report_file is not None:
            write_plan_page(report_file, config, section, recipe, samples, epoch, rows)
            report(f"\n{report_file}")


# Long: most of it declares the options.
@app.command()
def simulate(
    config: StageFile,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, separated by commas.")] = ",".join(
        str(1 << n) for n in range(11)
    ),
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each node.")] = 8,
    batch_seconds: Annotated[
        float | None, typer.Option(help="Seconds that a step takes; or give --tokens-per-second.")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Tokens that a node trains on.")] = None,
    bandwidth: Annotated[str, typer.Option(help="A node's bandwidth, as 500mbit or 10gbit.")] = "1gbit",
    cache_limit: Annotated[
        str | None,
        typer.Option(
            help="A node's cache, as 100gb.  [default: the settings' cache_limit]", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    image_size: ImageSize = None,
    patch_size: PatchSize = None,
) -> None:
    """Print what each node will download and cache.

    It plays an epoch through for each number of nodes, as if every stream were remote.
    """
    with one_line_errors():
        from unitoken.streaming_data.tools.data_section import read_data_section, tower_size
        from unitoken.streaming_data.tools.simulate import (
            demand_table,
            parse_bandwidth,
            parse_nodes,
            simulate_nodes,
        )

        limit = [f"data.cache_limit={cache_limit}"] if cache_limit else []
        data, vision, _ = read_data_section(config, [*(overrides or []), *limit])
        counts, bits = parse_nodes(nodes), parse_bandwidth(bandwidth)
        size = tower_size(vision, image_size, patch_size)
        demands, impossible = simulate_nodes(
            data, counts, ranks_per_node, size, bits, batch_seconds, tokens_per_second
        )
        if as_json:
            report(
                json.dumps({"nodes": [demand.model_dump() for demand in demands], "not_possible": impossible})
            )
            return
        uneven = ""
        if impossible:
            ranks = impossible[-1] * ranks_per_node
            uneven = (
                f"{', '.join(map(str, impossible))} nodes of {ranks_per_node} ranks can not "
                f"share a global_batch of {data.global_batch} packs evenly; {ranks:,} ranks need a "
                f"multiple of {ranks:,}"
            )
        if not demands:
            raise ConfigError(uneven)
        report(demand_table(demands, data.cache_limit))
        if uneven:
            report(uneven)


@app.command()
def convert_config(
    meta: Annotated[Path, typer.Argument(help="The reference's data file: META, a list of path and ratio.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; without it the settings are printed.")
    ] = None,
    datasets: Annotated[
        str, typer.Option(help="The folder or URL that holds, or will hold, the tokenized datasets.")
    ] = "data",
) -> None:
    """Convert the reference's data file to `data:` YAML."""
    with one_line_errors():
        from unitoken.common.files import write_aside
        from unitoken.streaming_data.tools.convert_config import convert_config

        text = convert_config(meta, datasets)
        if out is None:
            report(text.removesuffix("\n"))
            return
        if out.exists():
            raise ConfigError(f"{out} exists already")
        try:
            write_aside(out, text.encode())
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


@app.command()
def export_webdataset(
    dataset: Annotated[str, typer.Argument(help="A dataset folder, or its URL.")],
    out: Annotated[str, typer.Argument(help="An empty folder or URL.")],
    samples_per_tar: Annotated[int, typer.Option(min=1, help="Samples in each tar.")] = 10_000,
) -> None:
    """Write a dataset as WebDataset tars."""
    with one_line_errors():
        from unitoken.streaming_data.tools.export_webdataset import export_webdataset

        report(f"{export_webdataset(dataset, out, samples_per_tar)} tars in {out}")


if __name__ == "__main__":
    run_program(app, "python -m unitoken.streaming_data")
