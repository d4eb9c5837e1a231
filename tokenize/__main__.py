"""Conversations and images -> a dataset of tokens that training streams.

    python -m unitoken.tokenize run --config yamls/tokenize/chameleon.yaml --splits 8 \\
        --in_filename items.json --out_dir out/items   tokenizer=PATH vision.weights=PATH

starts 8 processes (one a GPU where there are GPUs), shows their progress and merges. The same command again goes on
where it was stopped. On several machines, or by hand: `run ... --rank R` for each R, then `merge --out_dir out/items`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unitoken.streaming_data.config import ConfigError, load_config, one_line_errors
from unitoken.tokenize.config import TokenizeConfig

# Only light imports here: `--help` and the errors of a configuration answer within a second.
if TYPE_CHECKING:
    from unitoken.streaming_data.manifest import Manifest

DEFAULT_CONFIG = Path("yamls/tokenize/chameleon.yaml")

HELP = __doc__.replace("\n\n    ", "\n\n\b\n    ")  # click keeps the lines of a paragraph that begins with \b
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ConfigOption = Annotated[Path, typer.Option("--config", help="The settings' YAML file.")]
OutOption = Annotated[Path, typer.Option("--out_dir", help="The dataset's folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's, as vision.batch_size=4.")
]


@app.command()
def run(
    in_filename: Annotated[Path, typer.Option("--in_filename", help="The input: a JSON list of items, or .jsonl.")],
    out_dir: OutOption,
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    splits: Annotated[int, typer.Option("--splits", min=1, help="How many processes share the work.")] = 1,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Do this process's share only, and do not merge.")] = None,
    target_size: Annotated[int | None, typer.Option("--target_size", help="Side of the images in pixels; as target_size=.")] = None,
) -> None:
    """Tokenize an input file into a dataset folder; run it again to go on after a stop."""
    with one_line_errors():
        size = [] if target_size is None else [f"target_size={target_size}"]
        settings = load_config(TokenizeConfig, config, [*size, *(overrides or [])])
        if rank is not None and rank >= splits:
            raise ConfigError(f"--rank {rank}: expected a number below --splits {splits}")

        from unitoken.tokenize.job import prepare

        job = prepare(settings, in_filename, out_dir)
        if rank is not None:
            from unitoken.tokenize.launch import run_here

            run_here(job, rank, splits)
            return

        from unitoken.tokenize.launch import launch

        try:
            failures = launch(job, splits)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
        for line in failures:
            print(f"error: {line}", file=sys.stderr)
        _finish(out_dir, settings.max_reject_fraction)


@app.command()
def merge(out_dir: OutOption) -> None:
    """Make one dataset of the chunks that `run --rank` has written."""
    with one_line_errors():
        from unitoken.tokenize.job import load_job

        _finish(out_dir, load_job(out_dir).max_reject_fraction)


@app.command()
def preview(
    out_dir: Annotated[Path, typer.Argument(help="The dataset's folder.")],
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    n: Annotated[int, typer.Option("--n", min=1, help="How many samples.")] = 4,
) -> None:
    """Show samples as a model sees them: what is trained on in green, images as [image HxW]."""
    with one_line_errors():
        settings = load_config(TokenizeConfig, config, overrides or [])

        from unitoken.tokenize.preview import show

        show(out_dir, settings.tokenizer, n)


def _finish(out: Path, max_reject_fraction: float) -> None:
    from unitoken.tokenize.merge import UnfinishedError, summary, too_many_rejects
    from unitoken.tokenize.merge import merge as merge_chunks

    try:
        manifest: Manifest = merge_chunks(out)
    except UnfinishedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(summary(out, manifest))
    if problem := too_many_rejects(manifest, max_reject_fraction):
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    app(prog_name="python -m unitoken.tokenize")
