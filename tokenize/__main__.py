r"""Turn conversations with images into a dataset of tokens that training streams.

    python -m unitoken.tokenize run --splits 8 --in-filename items.json \
        --out-dir out/items tokenizer=PATH vision.weights=PATH

starts 8 processes (one a GPU where there are GPUs), shows their progress and merges their chunks. The same
command continues a run that was stopped. On several machines use `--engine ray`, or start `run ... --rank R`
by hand for each R and then `merge --out-dir out/items`. Input and output are paths or URLs (s3://, gs://,
azure://).
"""

from __future__ import annotations

from unitoken.common.interruption import install_handlers

if __name__ == "__main__":
    install_handlers("interrupted")  # before all other imports

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unitoken.common.cli import command_app, notify, one_line_errors, report, run_program
from unitoken.common.errors import ConfigError

# Only light imports here: `--help` and the errors of a configuration answer within a second.
if TYPE_CHECKING:
    from unitoken.tokenize.job import Job

GOES_ON = "the same command goes on from here"
# As shipped with the package, so that the command works from any folder.
DEFAULT_CONFIG = Path(__file__).parent.parent / "yamls" / "tokenize" / "chameleon.yaml"

app = command_app(__doc__)

ConfigOption = Annotated[
    Path,
    typer.Option("--config", help="The settings' YAML file.", show_default="yamls/tokenize/chameleon.yaml"),
]
OtherConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="The settings' YAML file, in place of what the dataset was made with."),
]
OutOption = Annotated[str, typer.Option("--out-dir", help="The dataset's folder, or its URL.")]
OutArgument = Annotated[str, typer.Argument(help="The dataset's folder, or its URL.")]
SplitsOption = Annotated[int, typer.Option("--splits", min=1, help="How many processes share the work.")]
EngineOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="Processes on this machine, or tasks on a Ray cluster."),
]
DryRunOption = Annotated[
    int | None,
    typer.Option("--dry-run", min=1, help="Only try so many items, and print what the whole input takes."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's, as vision.batch_size=4."),
]


@app.command()
def run(
    in_filename: Annotated[
        list[str],
        typer.Option(
            "--in-filename",
            help="A JSON list, .jsonl, .csv, .tsv, .tar (these also as .gz, .tgz, .zst), .parquet, .arrow, "
            "or a folder of pictures or of `datasets`; a path, URL or glob; may be given more than once.",
        ),
    ],
    out_dir: OutOption,
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    splits: SplitsOption = 1,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Do only this process's share, and do not merge.")
    ] = None,
    engine: EngineOption = "local",
    target_size: Annotated[
        int | None, typer.Option("--target-size", help="Side of the images in pixels; same as target_size=.")
    ] = None,
    dry_run: DryRunOption = None,
) -> None:
    """Tokenize items into a dataset; rerun to continue.

    The same command continues a run that was stopped, with any number of processes. With --dry-run nothing is
    written: some items go through the whole pipeline, and hours and gigabytes of all items are estimated.
    """
    with one_line_errors(GOES_ON):
        from unitoken.common.config import load_config
        from unitoken.tokenize.config import TokenizeConfig

        size = [] if target_size is None else [f"target_size={target_size}"]
        settings = load_config(TokenizeConfig, config, [*size, *(overrides or [])])
        if rank is not None and rank >= splits:
            raise ConfigError(f"--rank {rank}: expected a number below --splits {splits}")
        if dry_run is not None:
            from unitoken.tokenize.dry_run.report import dry_run as try_items

            report(try_items(settings, in_filename, out_dir, dry_run, splits))
            return
        from unitoken.tokenize.prepare import prepare

        job = prepare(settings, in_filename, out_dir)
        if rank is not None:
            from unitoken.tokenize.executors.local import run_rank_here

            run_rank_here(job, rank, splits)
            return
        _merge_and_report(out_dir, settings.max_reject_fraction, _launch(job, splits, engine))


@app.command()
def merge(out_dir: OutOption) -> None:
    """Merge chunks written with --rank into a dataset."""
    with one_line_errors(GOES_ON):
        from unitoken.storage.open import open_store
        from unitoken.tokenize.job import load_job

        _merge_and_report(out_dir, load_job(open_store(out_dir)).max_reject_fraction, [])


@app.command()
def preview(
    out_dir: OutArgument,
    overrides: Overrides = None,
    config: OtherConfigOption = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            min=1,
            help="How many samples; with --serve, on a page.  [default: 4, with --serve 20]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A folder for a web page with pictures, instead of text on the terminal."),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Page through the whole dataset in a browser on this machine."),
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Of --serve; 0 takes any that is free.")
    ] = 8000,
) -> None:
    """Show samples as the model sees them.

    Text that is trained on is green, images are [image HxW]. With --out and --serve each image is shown
    beside the picture decoded from its codes, what the image tokenizer kept of it; and the whole dataset is
    shown in figures.
    """
    with one_line_errors():
        from unitoken.tokenize.prepare import load_settings

        if serve and out is not None:
            raise ConfigError("--serve and --out: expected one of them")
        settings = load_settings(out_dir, config, DEFAULT_CONFIG, overrides or [])
        if serve:
            from unitoken.tokenize.checks.browse import serve_dataset

            serve_dataset(out_dir, settings, n or 20, port)
        elif out is not None:
            from unitoken.tokenize.checks.gallery import write_page

            write_page(out_dir, settings, n or 4, out)
        else:
            from unitoken.tokenize.checks.preview import show_samples

            show_samples(out_dir, settings.tokenizer, n or 4)


@app.command()
def verify(
    out_dir: OutArgument,
    sample: Annotated[
        float, typer.Option("--sample", min=0, max=1, help="The share of shards and samples to check.")
    ] = 1.0,
) -> None:
    """Check a dataset; status 1 if anything is wrong.

    Its files are compared with their hashes, its counts with each other, and each sample with the rules of
    the format.
    """
    with one_line_errors():
        from unitoken.tokenize.checks.verify import verify as find_problems

        if problems := find_problems(out_dir, sample):
            for problem in problems:
                notify(problem)
            raise SystemExit(1)


@app.command()
def rejects(
    out_dir: OutArgument,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try the rejected items again, with the settings of their run.")
    ] = False,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Only rejects of this kind; may be given more than once."),
    ] = None,
    in_filename: Annotated[
        list[str] | None,
        typer.Option(
            "--in-filename", help="The input again, if its URLs were signed: signatures are not stored."
        ),
    ] = None,
    overrides: Overrides = None,
    config: OtherConfigOption = None,
    splits: SplitsOption = 1,
    engine: EngineOption = "local",
) -> None:
    """List rejected items by reason, or retry them."""
    with one_line_errors(GOES_ON):
        if not retry:
            from unitoken.tokenize.rejects import show_rejects

            show_rejects(out_dir)
            return
        from unitoken.storage.open import open_store
        from unitoken.tokenize.job import load_work
        from unitoken.tokenize.prepare import load_settings, prepare
        from unitoken.tokenize.retry import begin_retry

        store = open_store(out_dir)
        settings = load_settings(out_dir, config, DEFAULT_CONFIG, overrides or [])
        sources = in_filename or [file.name for file in load_work(store).input.files]
        # Settings and input are checked before the dataset is touched.
        job = prepare(settings, sources, out_dir)
        if begin_retry(out_dir, kind):
            job = dataclasses.replace(job, work=load_work(store))
            _merge_and_report(out_dir, settings.max_reject_fraction, _launch(job, splits, engine))


@app.command()
def migrate(
    record: Annotated[Path, typer.Argument(help="The record.json of a UniToken or Lumina-mGPT dataset.")],
    out_dir: OutArgument,
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    without_images: Annotated[
        bool,
        typer.Option(
            "--without-images",
            help="Leave out the original images; such a dataset trains with data.continuous=none only.",
        ),
    ] = False,
) -> None:
    """Convert a dataset that the reference tokenized.

    It reads record.json and the pickles, without running any code in them. Relative names are relative to the
    current folder. Give the settings that the reference ran with: tokenizer=, target_size=, crop=.
    """
    with one_line_errors(GOES_ON):
        from unitoken.common.config import load_config
        from unitoken.tokenize.config import TokenizeConfig
        from unitoken.tokenize.migrate import migrate as convert

        settings = load_config(TokenizeConfig, config, overrides or [])
        convert(record, out_dir, settings, without_images)
        _merge_and_report(out_dir, settings.max_reject_fraction, [])


@app.command()
def convert_vqgan(
    source: Annotated[Path, typer.Argument(help="The folder with Meta's vqgan.yaml and vqgan.ckpt.")],
    out: Annotated[Path, typer.Argument(help="The folder to make, with vqgan.yaml and vqgan.safetensors.")],
) -> None:
    """Convert Meta's image tokenizer to safetensors.

    Its codes and its fingerprint stay the same. No code in vqgan.ckpt is run.
    """
    with one_line_errors():
        from unitoken.codec.image_tokenizer.convert_vqgan import convert_vqgan as convert

        report(f"{out}: converted, fingerprint {convert(source, out)} as before")


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Argument(help="The file to write; without it the schema is printed.")
    ] = None,
) -> None:
    """Write the JSON Schema of the settings' YAML file, for editors."""
    with one_line_errors():
        from unitoken.common.schema import write_schema
        from unitoken.tokenize.config import TokenizeConfig

        write_schema(TokenizeConfig, "A tokenization", out)


def _launch(job: Job, splits: int, engine: str) -> list[str]:
    """Write the missing chunks, and return what went wrong, in lines."""
    if engine == "ray":
        from unitoken.tokenize.executors.ray_cluster import launch_on_ray

        return launch_on_ray(job)
    from unitoken.tokenize.executors.local import launch

    return launch(job, splits)


def _merge_and_report(out: str, max_reject_fraction: float, failures: list[str]) -> None:
    """Merge the chunks and report the dataset; status 1 where chunks are missing or too much was rejected."""
    from unitoken.tokenize.merge import UnfinishedError
    from unitoken.tokenize.merge import merge as merge_chunks
    from unitoken.tokenize.summary import problems, summary

    for failure in failures:
        notify(f"error: {failure}")
    try:
        manifest = merge_chunks(out)
    except UnfinishedError as error:
        notify(f"error: {error}")
        raise SystemExit(1) from None
    report(summary(out, manifest))
    if found := problems(out, manifest, max_reject_fraction):
        for problem in found:
            notify(f"error: {problem}")
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(app, "python -m unitoken.tokenize")
