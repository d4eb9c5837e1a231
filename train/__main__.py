"""What is done with a trained model.

    python -m unitoken.train export runs/stage2 out/model            Hugging Face's layout
    python -m unitoken.train generate out/model --prompt "Draw a cat." --out drawings

Training itself is `composer train.py yamls/stage1.yaml`.
"""

from __future__ import annotations

import typer

HELP = __doc__.replace("\n\n    ", "\n\n\b\n    ")  # click keeps the lines of a paragraph that begins with \b
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


if __name__ == "__main__":
    app(prog_name="python -m unitoken.train")
