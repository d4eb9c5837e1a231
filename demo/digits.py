"""Write scikit-learn's 1,797 handwritten digits as conversations: questions, and requests to draw a digit.

    python -m demo.digits FOLDER

writes FOLDER/images/*.png, the input files captions.json and drawings.json (training), and heldout.json and
requests.json (evaluation).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PIXELS = 32  # a side; the 8 x 8 originals are enlarged four times
HELD_OUT = 297
# Pictures of each digit in the questions. With one each the model memorizes the 1,500 before it can read.
VIEWS = 4
QUESTIONS = (
    "What digit is this? <|image|>",
    "<|image|> Which digit do you see?",
    "Read this digit: <|image|>",
)
# In place of the image in questions that are text only: the model has to know the words before Stage I.
STATEMENTS = ("It is a {}.", "Someone wrote {}.", "a {}")
REQUESTS = ("Draw a {}.", "Please draw the digit {}.", "Show me a handwritten {}.")


def split() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the digits with a fixed shuffle, as scikit-learn keeps them in blocks by writer.

    Returns:
        The indices for training, and the held-out ones.
    """
    order = np.random.default_rng(0).permutation(len(load_digits().target))
    return order[HELD_OUT:], order[:HELD_OUT]


def picture(digit: npt.NDArray[np.float64]) -> Image.Image:
    """Make a gray picture of PIXELS x PIXELS from the (8, 8) values 0 to 16 of a digit."""
    small = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return small.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)


def moved(whole: Image.Image, index: int, view: int) -> Image.Image:
    """Turn, scale and shift a picture slightly, as another writer might; view 0 is the picture itself."""
    if view == 0:
        return whole
    random = np.random.default_rng([index, view])
    angle, scale = random.uniform(-0.2, 0.2), random.uniform(0.9, 1.15)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    centre = (PIXELS - 1) / 2
    x, y = centre + random.uniform(-2, 2, 2)
    shift = (x - cos * centre - sin * centre, y + sin * centre - cos * centre)
    return whole.transform(
        whole.size,
        Image.Transform.AFFINE,
        (cos, sin, shift[0], -sin, cos, shift[1]),
        Image.Resampling.BILINEAR,
    )


def small(picture_rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Shrink a picture (PIXELS, PIXELS, 3) to 64 values 0 to 16, as a classifier of the originals expects."""
    gray = picture_rgb.astype(np.float64).mean(axis=2)
    block = picture_rgb.shape[0] // 8
    values: npt.NDArray[np.float64] = gray.reshape(8, block, 8, block).mean(axis=(1, 3)).reshape(64)
    return values * (16 / 255)


def _text_item(index: int, view: int, word: str) -> dict[str, object]:
    question = QUESTIONS[(index + view) % len(QUESTIONS)].replace(
        "<|image|>", STATEMENTS[(index // 3 + view) % len(STATEMENTS)].format(word)
    )
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": word}]
    return {"id": f"text-{index:04d}-{view}", "conversations": turns}


def _item(index: int, view: int, human: str, gpt: str, name: str) -> dict[str, object]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {
        "id": f"{name}-{index:04d}-{view}",
        "conversations": turns,
        "image": [f"images/{index:04d}-{view}.png"],
    }


def write(folder: Path) -> None:
    """Write the pictures and the four files."""
    digits = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    train, held_out = split()
    for index, digit in enumerate(digits.images):
        for view in range(VIEWS if index in set(train.tolist()) else 1):
            moved(picture(digit), index, view).save(folder / "images" / f"{index:04d}-{view}.png")
    word = [WORDS[label] for label in digits.target]
    captions = [
        _item(i, view, QUESTIONS[(i + view) % len(QUESTIONS)], word[i], "caption")
        for view in range(VIEWS)
        for i in train.tolist()
    ]
    captions += [_text_item(i, view, word[i]) for view in range(2) for i in train.tolist()]
    drawings = [
        _item(i, 0, REQUESTS[i % len(REQUESTS)].format(word[i]), "<|image|>", "drawing")
        for i in train.tolist()
    ]
    questions = [_item(i, 0, QUESTIONS[0], word[i], "heldout") for i in held_out.tolist()]
    requests = [{"prompt": REQUESTS[0].format(word), "answer": word} for word in WORDS]
    for name, items in (
        ("captions", captions),
        ("drawings", drawings),
        ("heldout", questions),
        ("requests", requests),
    ):
        (folder / f"{name}.json").write_text(json.dumps(items, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
