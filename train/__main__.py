r"""Use a trained model: export it, or let it answer and draw; or see what a stage will do and take.

    python -m unitoken.train check yamls/stage2.yaml
    python -m unitoken.train plan-memory yamls/stage2.yaml --gpu 80gb --gpus 8
    python -m unitoken.train report runs/stage1 runs/stage2
    python -m unitoken.train export runs/stage2 out/model
    python -m unitoken.train evaluate runs/stage2 --suite suites/reading.yaml
    python -m unitoken.train generate out/model --prompt "Draw a cat." \
        --out drawings
    python -m unitoken.train chat out/model

The exported model is in Hugging Face's layout. Training itself is `composer train.py yamls/stage1.yaml`.
"""

from __future__ import annotations

from unitoken.common.interruption import install_handlers

if __name__ == "__main__":
    install_handlers("interrupted")  # before all other imports

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from unitoken.common.cli import command_app, one_line_errors, report, run_program
from unitoken.common.errors import ConfigError

DEFAULT_GUIDANCE = 4.0  # of `generate`, if the model was trained with null prompts
app = command_app(__doc__)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that replace the stage's, as codec.tokenizer=my/tokenizer."
    ),
]


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder or URL, or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The stage's YAML file, if the run's folder holds no stage.yaml."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp32"],
        typer.Option("--dtype", help="bf16, as most models are published, or fp32, the exact weights."),
    ] = "bf16",
) -> None:
    """Write a model in Hugging Face's layout."""
    with one_line_errors():
        from unitoken.common.config import load_config
        from unitoken.train.config import StageConfig
        from unitoken.train.generation.settings import settings
        from unitoken.train.run.bucket import fetch_origin

        origin = fetch_origin(checkpoint)
        stage = load_config(StageConfig, config, overrides or []) if config is not None else None
        if overrides and config is None:
            stage = settings(Path(origin), None, overrides)
        from unitoken.train.export.model import export_model

        export_model(origin, out, dtype, stage)
        report(f"{out}: exported from {checkpoint}")


@app.command()
def plan_memory(
    stage: Annotated[Path, typer.Argument(help="The stage's YAML file.")],
    gpu: Annotated[str, typer.Option(help="A GPU's memory, as 80gb.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
) -> None:
    """Print which settings fit a GPU, the fastest first.

    For each mode of `activation_checkpointing` it is the largest microbatch that fits; nothing is loaded, and
    no GPU is needed. The speed is computed, and a share of the first row's.
    """
    with one_line_errors():
        from unitoken.common.config import load_config
        from unitoken.train.config import StageConfig
        from unitoken.train.plan_memory import parse_gpu, plan_memory

        config = load_config(StageConfig, stage, overrides or [])
        report(plan_memory(config, parse_gpu(gpu), gpus))


@app.command()
def check(
    stage: Annotated[Path, typer.Argument(help="The stage's YAML file.")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--gpus",
            min=1,
            help="Number of ranks, one a GPU.  [default: this machine's GPUs, or one]",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A GPU's memory, as 80gb, to check for other GPUs than this machine's.", show_default=False
        ),
    ] = None,
) -> None:
    """Show what a stage will do, before it trains.

    Its settings and data are checked as training does it. Then one screen shows memory, steps, expected time,
    disk, the mixture, the first batch as bars, and the first pack as text. No GPU is needed.
    """
    with one_line_errors():
        from unitoken.common.cli import warn
        from unitoken.common.config import load_config
        from unitoken.train.config import StageConfig

        config = load_config(StageConfig, stage, overrides or [])
        from unitoken.train.overview.facts import look_at
        from unitoken.train.overview.gpus import gpus_here, named_gpus
        from unitoken.train.overview.screen import make_console, show, space_warnings

        here = None if gpu is not None else gpus_here()
        gpus = named_gpus(gpu) if gpu is not None else here[0] if here is not None else None
        overview = look_at(config, ranks or (here[1] if here is not None else 1), gpus)
        for line in [*overview.warnings, *space_warnings(overview)]:
            warn(line)
        show(overview, make_console())


@app.command("report")
def report_runs(
    runs: Annotated[list[str], typer.Argument(help="Folders or URLs of runs.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write a page about runs, and what differs between them.

    It reads what they logged and nothing else, also while they train. A run writes the page about itself into
    its folder when it ends.
    """
    with one_line_errors():
        from unitoken.train.report.page import write_report
        from unitoken.train.run.bucket import fetch_logs

        write_report([(run, fetch_logs(run)) for run in runs], out)
        report(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


Trained = Annotated[str, typer.Argument(help="A run's folder or URL, a checkpoint, or an exported folder.")]
OutFolder = Annotated[Path, typer.Option(help="The folder for pictures, texts and results.jsonl.")]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; may be given more than once.")]
PromptsFile = Annotated[
    Path | None, typer.Option(help="A .txt file with a prompt a line, or a .json or .jsonl of items.")
]
PromptImages = Annotated[
    list[str] | None, typer.Option(help="A picture for every --prompt, where it says <|image|>.")
]
Draw = Annotated[
    bool,
    typer.Option("--draw", help="Reply with one picture; else with text and pictures as the model likes."),
]
DrawingSize = Annotated[
    str | None,
    typer.Option(
        help="Size of drawings in pixels, width x height, as 512x512.  [default: samples.size, or as in the "
        "data]",
        show_default=False,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Guidance of pictures, away from the null prompt; 1 is none.  [default: 4, or 1 if the model "
        "was trained without null prompts]",
        show_default=False,
    ),
]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
TopKText = Annotated[int, typer.Option(min=0, help="Draw text from this many tokens; 0 is all of them.")]
TopKImage = Annotated[int, typer.Option(min=0, help="Draw pictures from this many codes; 0 is all of them.")]
RandomSeed = Annotated[int, typer.Option(min=0, help="The seed of the random draws.")]
RepliesPerPrompt = Annotated[int, typer.Option(min=1, help="Replies to each prompt.")]
LongestReply = Annotated[
    int,
    typer.Option(
        min=1, help="The longest reply in tokens, within packed_length; a picture that was begun is finished."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Replies at a time.")]
Speculative = Annotated[
    bool,
    typer.Option(
        "--speculative",
        help="Guess several codes of a picture and verify them in one pass: fewer passes, the same "
        "distribution, other pictures than without it.",
    ),
]
StageFile = Annotated[
    Path | None,
    typer.Option(
        help="The stage's YAML file.  [default: stage.yaml beside the checkpoint]", show_default=False
    ),
]


@app.command()
def generate(
    checkpoint: Trained,
    out: OutFolder,
    overrides: Overrides = None,
    prompt: Prompt = None,
    prompts: PromptsFile = None,
    image: PromptImages = None,
    draw: Draw = False,
    size: DrawingSize = None,
    guidance: Guidance = None,
    temperature: Temperature = 1.0,
    top_k_text: TopKText = 10,
    top_k_image: TopKImage = 2000,
    seed: RandomSeed = 0,
    count: RepliesPerPrompt = 1,
    max_tokens: LongestReply = 2048,
    batch: BatchSize = 8,
    speculative: Speculative = False,
    config: StageFile = None,
) -> None:
    """Answer and draw.

    The defaults for pictures are those of the Chameleon family.
    """
    with one_line_errors():
        from unitoken.train.generation import command
        from unitoken.train.generation.check_samples import guidance_or_default
        from unitoken.train.generation.prompts import build_prompt, read_prompts
        from unitoken.train.generation.settings import Request, settings
        from unitoken.train.run.bucket import fetch_origin

        for name, value in (("--guidance", guidance), ("--temperature", temperature)):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name} {value}: expected a finite number")
        if image and not prompt:
            raise ConfigError("--image: it belongs to a --prompt, and there is none")
        conversations = [build_prompt(text, image or []) for text in prompt or []]
        conversations += read_prompts(prompts) if prompts else []
        if not conversations:
            raise ConfigError("nothing to generate from: give --prompt or --prompts")
        repeated = [conversation for conversation in conversations for _ in range(count)]
        origin = Path(fetch_origin(checkpoint))
        stage = settings(origin, config, overrides or [])
        guided = guidance_or_default(guidance, DEFAULT_GUIDANCE, stage.data.null_prompt_fraction > 0)
        request = Request(stage, origin, repeated, out, draw, max_tokens, batch)
        found = command.check_request(request, size, guided, prompts)
        from unitoken.train.generation.sampling import Sampling

        sampling = Sampling(temperature, top_k_text or None, top_k_image or None, guided, seed, speculative)
        command.reply(request, found, sampling)


Port = Annotated[int, typer.Option(min=0, max=65535, help="A port of this machine; 0 is any free one.")]


@app.command()
def chat(
    checkpoint: Trained, overrides: Overrides = None, port: Port = 7860, config: StageFile = None
) -> None:
    """Serve a page to talk to a model, for this machine alone.

    Text, pictures in and out, several turns; pictures appear row by row. It needs gradio:
    pip install 'unitoken-streaming[chat]'
    """
    with one_line_errors():
        from unitoken.train.generation.check_samples import guidance_or_default
        from unitoken.train.generation.loaded_model import find_model
        from unitoken.train.generation.settings import settings
        from unitoken.train.run.bucket import fetch_origin

        origin = Path(fetch_origin(checkpoint))
        stage = settings(origin, config, overrides or [])
        found = find_model(stage, origin, None, draws=False)
        guidance = guidance_or_default(None, DEFAULT_GUIDANCE, stage.data.null_prompt_fraction > 0)
        from unitoken.train.chat.server import serve

        serve(found, checkpoint, guidance, port)


@app.command()
def evaluate(
    checkpoint: Trained,
    suite: Annotated[Path, typer.Option(help="The YAML file of the tasks.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder for result.json, replies and pictures.  [default: evaluations/SUITE/step-* in "
            "the run's folder]",
            show_default=False,
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("-n", "--nproc", min=1, help="Ranks on this machine.  [default: one a GPU, or one]"),
    ] = None,
    config: StageFile = None,
) -> None:
    """Score a model on a suite of tasks; rerun to continue.

    Each rank loads the whole model and does its share of the prompts. The numbers are the same for any number
    of ranks.
    """
    with one_line_errors("the same command goes on from here"):
        from unitoken.train.checkpoint.locations import find_origin
        from unitoken.train.evaluation.command import default_out, evaluate_checkpoint, start_ranks
        from unitoken.train.evaluation.opened_suite import open_suite
        from unitoken.train.generation.settings import settings
        from unitoken.train.run.bucket import fetch_origin

        folder = Path(fetch_origin(checkpoint))
        stage, origin = settings(folder, config, overrides or []), find_origin(str(folder))
        results = out or default_out(checkpoint, origin, suite)
        opened = open_suite(suite, stage.codec)
        start_ranks(nproc)
        evaluate_checkpoint(stage, origin, opened, results)


if __name__ == "__main__":
    run_program(app, "python -m unitoken.train")
