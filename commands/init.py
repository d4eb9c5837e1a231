"""`unitoken init`: a folder to begin in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unitoken.common.cli import one_line_errors, report
from unitoken.common.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "yamls"


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make, or one without a yamls/ folder.")],
) -> None:
    """Copy the example YAML files into a folder.

    They are a tokenization, Stage I and Stage II, and the schemas with which editors check them.
    """
    with one_line_errors():
        from unitoken.common.files import write_aside

        target = folder / "yamls"
        if target.exists():
            raise ConfigError(f"{target} exists already; name another folder")
        # digits.yaml is the demo's, whose tokenizers are not in the wheel.
        copied = [*SHIPPED.glob("*.*"), *SHIPPED.glob("tokenize/*.*"), *SHIPPED.glob("open/*.*")]
        copied.remove(SHIPPED / "tokenize" / "digits.yaml")
        try:
            for source in sorted(copied):
                place = target / source.relative_to(SHIPPED)
                place.parent.mkdir(parents=True, exist_ok=True)
                write_aside(place, source.read_bytes())
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from None
        report(f"{target}: {len(copied)} files; next: unitoken tokenize --help")
