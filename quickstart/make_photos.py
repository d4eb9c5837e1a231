"""Make a folder of sixty photos with captions, out of six photographs that scikit-image's package holds.

    python make_photos.py photos

Each photo is a random crop of one of the six. Its caption stands beside it: `cat-03.jpg` and `cat-03.txt`.
Your own photos need the same form and nothing else. Nothing is downloaded.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import NamedTuple

import skimage
from PIL import Image

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
CROPS, CLOSE_UPS = 10, 3  # of each subject; the last are close-ups
SIZE = 128  # pixels


class Subject(NamedTuple):
    """What a photograph shows, where its middle is, and how large crops of it are, in pixels."""

    caption: str
    file: str
    middle: tuple[int, int]
    smallest: int
    largest: int


SUBJECTS = {
    "astronaut": Subject("an astronaut", "astronaut.png", (225, 190), 320, 380),
    "cat": Subject("a cat", "chelsea.png", (225, 150), 250, 300),
    "coffee": Subject("a cup of coffee", "coffee.png", (290, 200), 330, 400),
    "galaxies": Subject("galaxies", "hubble_deep_field.jpg", (500, 440), 300, 420),
    "motorcycle": Subject("a motorcycle", "motorcycle_left.png", (400, 270), 420, 500),
    "rocket": Subject("a rocket", "rocket.jpg", (322, 230), 320, 420),
}


def crop(photograph: Image.Image, subject: Subject, *, close_up: bool, choose: random.Random) -> Image.Image:
    """Cut out a square near the subject's middle; a close-up is about two thirds as wide."""
    side = choose.uniform(subject.smallest, subject.largest) * (0.65 if close_up else 1)
    left, top = (
        min(max(middle - side / 2 + choose.uniform(-0.08, 0.08) * side, 0), length - side)
        for middle, length in zip(subject.middle, photograph.size, strict=True)
    )
    box = (left, top, left + side, top + side)
    return photograph.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box)


def main() -> None:
    """Write the photos and their captions into the folder that the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "photos")
    folder.mkdir(parents=True, exist_ok=True)
    choose = random.Random(0)
    for name, subject in SUBJECTS.items():
        photograph = Image.open(PHOTOGRAPHS / subject.file).convert("RGB")
        for number in range(CROPS):
            close_up = number >= CROPS - CLOSE_UPS
            photo = crop(photograph, subject, close_up=close_up, choose=choose)
            photo.save(folder / f"{name}-{number:02d}.jpg", quality=92)
            caption = f"a close-up of {subject.caption}" if close_up else subject.caption
            (folder / f"{name}-{number:02d}.txt").write_text(f"{caption}\n", encoding="utf-8")
    print(f"{folder}: {CROPS * len(SUBJECTS)} photos with captions")


if __name__ == "__main__":
    main()
