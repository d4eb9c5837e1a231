r"""Use a trained model: export it, or let it answer and draw.

    python -m unitoken.train export runs/stage2 out/model
    python -m unitoken.train generate out/model --prompt "Draw a cat." \
        --out drawings

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
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, or a checkpoint file.")],
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

        stage = load_config(StageConfig, config, overrides or []) if config is not None else None
        if overrides and config is None:
            stage = settings(Path(checkpoint), None, overrides)
        from unitoken.train.checkpoint.export import export_model

        export_model(checkpoint, out, dtype, stage)
        report(f"{out}: exported from {checkpoint}")


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint file, or an exported folder.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for pictures, texts and results.jsonl.")],
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given more than once.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt file with a prompt a line, or a .json or .jsonl of items.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="A picture for every --prompt, where it says <|image|>.")
    ] = None,
    draw: Annotated[
        bool,
        typer.Option(
            "--draw", help="Reply with one picture; else with text and pictures as the model likes."
        ),
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of drawings in pixels, width x height, as 512x512.  "
            "[default: samples.size, or as in the data]",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Guidance of pictures, away from the null prompt; 1 is none.  "
            "[default: 4, or 1 if the model was trained without null prompts]",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 1.0,
    top_k_text: Annotated[
        int, typer.Option(min=0, help="Draw text from this many tokens; 0 is all of them.")
    ] = 10,
    top_k_image: Annotated[
        int, typer.Option(min=0, help="Draw pictures from this many codes; 0 is all of them.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the random draws.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Replies to each prompt.")] = 1,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="The longest reply in tokens, within packed_length; a picture that was begun is finished.",
        ),
    ] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Replies at a time.")] = 8,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The stage's YAML file.  [default: stage.yaml beside the checkpoint]", show_default=False
        ),
    ] = None,
) -> None:
    """Answer and draw.

    The defaults for pictures are those of the Chameleon family.
    """
    with one_line_errors():
        from unitoken.train.generation import command
        from unitoken.train.generation.check_samples import guidance_of
        from unitoken.train.generation.prompts import asked, read_prompts
        from unitoken.train.generation.settings import Request, settings

        for name, value in (("--guidance", guidance), ("--temperature", temperature)):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name} {value}: expected a finite number")
        if image and not prompt:
            raise ConfigError("--image: it belongs to a --prompt, and there is none")
        conversations = [asked(text, image or []) for text in prompt or []]
        conversations += read_prompts(prompts) if prompts else []
        if not conversations:
            raise ConfigError("nothing to generate from: give --prompt or --prompts")
        repeated = [conversation for conversation in conversations for _ in range(count)]
        stage = settings(checkpoint, config, overrides or [])
        guided = guidance_of(guidance, stage, DEFAULT_GUIDANCE)
        request = Request(stage, checkpoint, repeated, out, draw, max_tokens, batch)
        checked = command.check_request(request, size, guided, prompts)
        from unitoken.train.generation.sampling import Sampling

        sampling = Sampling(temperature, top_k_text or None, top_k_image or None, guided, seed)
        command.reply(request, checked, sampling)


if __name__ == "__main__":
    run_program(app, "python -m unitoken.train")
