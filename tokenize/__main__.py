"""Conversations and images -> a dataset of tokens that training streams.

    python -m unitoken.tokenize run --splits 8 --in_filename items.json \\
        --out_dir out/items tokenizer=PATH vision.weights=PATH

starts 8 processes (one a GPU where there are GPUs), shows their progress and merges. The same command again goes on
where it was stopped. On several machines `--engine ray`, or by hand `run ... --rank R` for each R and then
`merge --out_dir out/items`. Input and output are paths or URLs (s3://, gs://, azure://).
"""

from __future__ import annotations

from unitoken.common.interruption import install_handlers

if __name__ == "__main__":
    install_handlers("interrupted")  # before all other imports

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unitoken.common.cli import one_line_errors, run_program
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.tokenize.config import TokenizeConfig

# Only light imports here: `--help` and the errors of a configuration answer within a second.
if TYPE_CHECKING:
    from unitoken.tokenize.job import Job

GOES_ON = "the same command goes on from here"
DEFAULT_CONFIG = Path("yamls/tokenize/chameleon.yaml")

HELP = __doc__.replace("\n\n    ", "\n\n\b\n    ")  # click keeps the lines of a paragraph that begins with \b
app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path, typer.Option("--config", help="The settings' YAML file.")]
OldConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="The settings' YAML file, in place of what the dataset was made with."),
]
OutOption = Annotated[str, typer.Option("--out_dir", help="The dataset's folder, or its URL.")]
OutArgument = Annotated[str, typer.Argument(help="The dataset's folder, or its URL.")]
SplitsOption = Annotated[int, typer.Option("--splits", min=1, help="How many processes share the work.")]
EngineOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="Processes of this machine, or tasks on a Ray cluster."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace the file's, as vision.batch_size=4."
    ),
]


@app.command()
def run(
    in_filename: Annotated[
        list[str],
        typer.Option(
            "--in_filename",
            help="A JSON list, .jsonl, .csv, .tsv, .tar (these also as .gz, .tgz, .zst), .parquet, .arrow, or a folder of pictures "
            "or of `datasets`; a path, URL or glob; may be given often.",
        ),
    ],
    out_dir: OutOption,
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    splits: SplitsOption = 1,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Do this process's share only, and do not merge.")
    ] = None,
    engine: EngineOption = "local",
    target_size: Annotated[
        int | None, typer.Option("--target_size", help="Side of the images in pixels; as target_size=.")
    ] = None,
) -> None:
    """Tokenize inputs into a dataset folder; run it again to go on after a stop."""
    with one_line_errors(GOES_ON):
        size = [] if target_size is None else [f"target_size={target_size}"]
        settings = load_config(TokenizeConfig, config, [*size, *(overrides or [])])
        if rank is not None and rank >= splits:
            raise ConfigError(f"--rank {rank}: expected a number below --splits {splits}")

        from unitoken.tokenize.prepare import prepare

        job = prepare(settings, in_filename, out_dir)
        if rank is not None:
            from unitoken.tokenize.executors.local import run_rank_here

            run_rank_here(job, rank, splits)
            return
        _finish(out_dir, settings.max_reject_fraction, _launch(job, splits, engine))


@app.command()
def merge(out_dir: OutOption) -> None:
    """Make one dataset of the chunks that `run --rank` has written."""
    with one_line_errors(GOES_ON):
        from unitoken.storage.open import open_store
        from unitoken.tokenize.job import load_job

        _finish(out_dir, load_job(open_store(out_dir)).max_reject_fraction, [])


@app.command()
def preview(
    out_dir: OutArgument,
    overrides: Overrides = None,
    config: OldConfigOption = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many samples.")] = 4,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A folder for a page with pictures, in place of the terminal."),
    ] = None,
) -> None:
    """Show samples as a model sees them: what is trained on in green, images as [image HxW].

    With --out each image stands beside the picture that its codes give: what the image tokenizer kept of it.
    """
    with one_line_errors():
        from unitoken.tokenize.prepare import load_settings

        settings = load_settings(out_dir, config, DEFAULT_CONFIG, overrides or [])
        if out is None:
            from unitoken.tokenize.checks.preview import show_samples

            show_samples(out_dir, settings.tokenizer, n)
            return
        from unitoken.tokenize.checks.gallery import write_page

        write_page(out_dir, settings, n, out)


@app.command()
def verify(
    out_dir: OutArgument,
    sample: Annotated[
        float, typer.Option("--sample", min=0, max=1, help="The share of shards and samples to look at.")
    ] = 1.0,
) -> None:
    """Check a dataset against its own hashes, counts and rules; status 1 if anything is wrong."""
    with one_line_errors():
        from unitoken.tokenize.checks.verify import verify as find_problems

        if problems := find_problems(out_dir, sample):
            for line in problems:
                print(line, file=sys.stderr)
            raise SystemExit(1)


@app.command()
def rejects(
    out_dir: OutArgument,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try the rejected items again, with the settings of their run.")
    ] = False,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="Only rejects of this kind; may be given often.")
    ] = None,
    in_filename: Annotated[
        list[str] | None,
        typer.Option(
            "--in_filename", help="The input again, where its URLs were signed: signatures are not stored."
        ),
    ] = None,
    overrides: Overrides = None,
    config: OldConfigOption = None,
    splits: SplitsOption = 1,
    engine: EngineOption = "local",
) -> None:
    """Show what was rejected, grouped by reason, or try it again."""
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
        job = prepare(
            settings, sources, out_dir
        )  # before the dataset is touched: settings and input still fit
        if begin_retry(out_dir, kind):
            job = dataclasses.replace(job, work=load_work(store))
            _finish(out_dir, settings.max_reject_fraction, _launch(job, splits, engine))


@app.command()
def migrate(
    record: Annotated[Path, typer.Argument(help="The record.json of a UniToken or Lumina-mGPT dataset.")],
    out_dir: Annotated[str, typer.Argument(help="The dataset's folder, or its URL.")],
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    without_images: Annotated[
        bool,
        typer.Option(
            "--without-images", help="Leave the originals out; trains with data.continuous=none only."
        ),
    ] = False,
) -> None:
    """Make a dataset of one that the reference tokenized: record.json and pickles. Nothing in a pickle is run.

    Relative names start where the command is run. Tell it what the reference ran with: tokenizer=, target_size=, crop=.
    """
    with one_line_errors(GOES_ON):
        settings = load_config(TokenizeConfig, config, overrides or [])

        from unitoken.tokenize.migrate import migrate as convert

        convert(record, out_dir, settings, without_images)
        _finish(out_dir, settings.max_reject_fraction, [])


@app.command("convert-vqgan")
def convert_vqgan(
    source: Annotated[Path, typer.Argument(help="The folder with Meta's vqgan.yaml and vqgan.ckpt.")],
    out: Annotated[
        Path, typer.Argument(help="The folder to make: vqgan.yaml and vqgan.safetensors, for vision.weights.")
    ],
) -> None:
    """Make safetensors of Meta's image tokenizer, once. No code in vqgan.ckpt is run; codes and fingerprint stay as they are."""
    with one_line_errors():
        from unitoken.codec.image_tokenizer.convert_vqgan import convert_vqgan as convert

        print(f"{out}: converted, fingerprint {convert(source, out)} as before")


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Argument(help="The file to write; without it the schema is printed.")
    ] = None,
) -> None:
    """Write the JSON Schema of the settings' YAML file, for editors."""
    with one_line_errors():
        from unitoken.common.schema import write_schema

        write_schema(TokenizeConfig, "A tokenization", out)


def _launch(job: Job, splits: int, engine: str) -> list[str]:
    """Do the missing chunks. Returns what went wrong, in lines."""
    if engine == "ray":
        from unitoken.tokenize.executors.ray_cluster import launch_on_ray

        return launch_on_ray(job)
    from unitoken.tokenize.executors.local import launch

    return launch(job, splits)


def _finish(out: str, max_reject_fraction: float, failures: list[str]) -> None:
    from unitoken.tokenize.merge import UnfinishedError
    from unitoken.tokenize.merge import merge as merge_chunks
    from unitoken.tokenize.summary import problems, summary

    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    try:
        manifest = merge_chunks(out)
    except UnfinishedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(summary(out, manifest))
    if found := problems(out, manifest, max_reject_fraction):
        for line in found:
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(app, "tokenize")
