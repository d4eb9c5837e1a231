"""What is done with a trained model.

    python -m unitoken.train export runs/stage2 out/model
    python -m unitoken.train generate out/model --prompt "Draw a cat." \\
        --out drawings

The exported model is in Hugging Face's layout.

Training itself is `composer train.py yamls/stage1.yaml`.
"""

from __future__ import annotations

from unitoken.common.interruption import install_handlers

if __name__ == "__main__":
    install_handlers("interrupted")  # before all other imports

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from unitoken.common.cli import one_line_errors, run_program
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError

GUIDANCE = 4.0  # of `generate`, where training showed null prompts
HELP = __doc__.replace("\n\n    ", "\n\n\b\n    ")  # click keeps the lines of a paragraph that begins with \b
app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def main() -> None:
    """A command is named, however many there are."""


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A run's save.folder (its newest checkpoint), or one of its step-*.pt.")
    ],
    out: Annotated[
        Path, typer.Argument(help="The folder to write; an exported model in its place is replaced.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in training: codec.tokenizer=my/tokenizer")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The stage's YAML, where the run's folder does not say what it is."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp32"],
        typer.Option("--dtype", help="bf16 as others publish; fp32 keeps the weights to the bit."),
    ] = "bf16",
) -> None:
    """Write a trained model in Hugging Face's layout."""
    with one_line_errors():
        from unitoken.train.config import StageConfig
        from unitoken.train.generation.settings import settings

        stage = load_config(StageConfig, config, overrides or []) if config is not None else None
        if overrides and config is None:
            stage = settings(Path(checkpoint), None, overrides)
        from unitoken.train.checkpoint.export import export_model as write

        write(checkpoint, out, dtype, stage)
        print(f"{out}: exported from {checkpoint}")


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="a run's folder, a checkpoint file, or an exported folder")
    ],
    out: Annotated[Path, typer.Option(help="folder for pictures, texts and results.jsonl")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in training: codec.tokenizer=my/tokenizer")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="what to ask; may be given often")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="a .txt with a prompt a line, or a .json or .jsonl of items")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="a picture of every --prompt, where it says <|image|>")
    ] = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="a reply is one picture; else text and pictures as the model likes")
    ] = False,
    size: Annotated[
        str | None, typer.Option(help="of drawings, across x down  [default: samples.size, or as the data's]")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="of pictures, away from the null prompt; 1: none  [default: 4, or 1 if training showed none]",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest")] = 1.0,
    top_k_text: Annotated[int, typer.Option(min=0, help="draw text from so many tokens; 0: from all")] = 10,
    top_k_image: Annotated[
        int, typer.Option(min=0, help="draw images from so many codes; 0: from all")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    count: Annotated[int, typer.Option(min=1, help="replies to each prompt")] = 1,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="of a reply with text, within packed_length; pictures are finished")
    ] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="replies at a time")] = 8,
    config: Annotated[
        Path | None, typer.Option(help="the stage's YAML file  [default: stage.yaml beside the checkpoint]")
    ] = None,
) -> None:
    """Answer and draw. The defaults for pictures are those that Chameleon's family is used with."""
    from unitoken.train.generation import command
    from unitoken.train.generation.check_samples import guidance_or_default
    from unitoken.train.generation.prompts import build_prompt, read_prompts
    from unitoken.train.generation.settings import Request, settings

    with one_line_errors():
        for name, value in (("--guidance", guidance), ("--temperature", temperature)):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name} {value}: expected a finite number")
        if image and not prompt:
            raise ConfigError("--image: it belongs to a --prompt, and there is none")
        conversations = [build_prompt(text, image or []) for text in prompt or []] + (
            read_prompts(prompts) if prompts else []
        )
        if not conversations:
            raise ConfigError("nothing to generate from: give --prompt or --prompts")
        repeated = [conversation for conversation in conversations for _ in range(count)]
        stage = settings(checkpoint, config, overrides or [])
        guided = guidance_or_default(guidance, GUIDANCE, stage.data.null_prompt_fraction > 0)
        request = Request(stage, checkpoint, repeated, out, draw, max_tokens, batch)
        checked = command.check_request(request, size, guided, prompts)
        from unitoken.train.generation.sampling import Sampling

        command.reply(
            request, checked, Sampling(temperature, top_k_text or None, top_k_image or None, guided, seed)
        )


if __name__ == "__main__":
    run_program(app, "train")
