"""`unitoken init`: a folder to begin in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unitoken.common.cli import one_line_errors, report
from unitoken.common.errors import ConfigError

SHIPPED = Path(__file__).parent.parent
SCRIPTS = ("make_photos.py", "photo_adapters.py", "train_image_tokenizer.py")


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make, or one without a yamls/ folder.")],
) -> None:
    """Copy what the quickstart needs into a folder.

    yamls/ has examples of tokenizations and stages, and the schemas with which editors check them; weights/
    has a small tokenizer for texts and one for photographs of 64 pixels; make_photos.py makes sixty photos
    with captions; photo_adapters.py makes conversations of them; train_image_tokenizer.py made the tokenizer
    for photographs.
    """
    with one_line_errors():
        from unitoken.common.files import write_aside

        if (folder / "yamls").exists():
            raise ConfigError(f"{folder / 'yamls'} exists already; name another folder")
        copies = _copies()
        try:
            for place, source in sorted(copies.items()):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                write_aside(folder / place, source.read_bytes())
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from None
        report(f"{folder}: {len(copies)} files; next: cd {folder}, and docs/quickstart.md")


def _copies() -> dict[Path, Path]:
    """Return the shipped files by their places in the new folder."""
    yamls, quickstart = SHIPPED / "yamls", SHIPPED / "quickstart"
    examples = [*yamls.glob("*.*"), *yamls.glob("tokenize/*.*"), *yamls.glob("open/*.*")]
    # digits.yaml is the demo's, whose image tokenizer is not in the wheel.
    examples.remove(yamls / "tokenize" / "digits.yaml")
    copies = {path.relative_to(SHIPPED): path for path in examples}
    copies |= {Path(name): quickstart / name for name in SCRIPTS}
    tokenizers = {
        "photo-vqgan": quickstart / "photo-vqgan",
        "text-tokenizer": SHIPPED / "demo" / "assets" / "tokenizer",
    }
    for name, source in tokenizers.items():
        copies |= {Path("weights", name, path.name): path for path in source.iterdir() if path.is_file()}
    return copies
