"""What `unitoken init` brings: photographs come back from their codes, and sixty photos are made."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from support.paths import ROOT
from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.image_tokenizer.encoder import load_vision

TOKENIZER = ROOT / "quickstart" / "photo-vqgan"


def test_held_out_photographs_come_back_in_colour() -> None:
    """Few megabytes, and at least 22 dB on photographs that the tokenizer has not seen."""
    assert sum(file.stat().st_size for file in TOKENIZER.iterdir()) < 3e6
    script = runpy.run_path(str(ROOT / "quickstart" / "train_image_tokenizer.py"))
    assert not set(script["HELD_OUT"]) & set(script["PHOTOGRAPHS"])
    vision = load_vision(ImageTokenizerConfig(weights=str(TOKENIZER)))
    pixels = script["held_out_crops"]().numpy()
    codes = vision.encode(pixels)
    assert codes.shape == (10, 8, 8)
    errors = np.square(vision.decode(codes).astype(float) - pixels).mean((1, 2, 3))
    assert (10 * np.log10(255**2 / errors)).mean() >= 22


def test_sixty_photos_with_captions_are_made(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, str(ROOT / "quickstart/make_photos.py"), name], cwd=tmp_path, check=True
        )
    photos = sorted((tmp_path / "one").glob("*.jpg"))
    assert len(photos) == 60
    captions = [photo.with_suffix(".txt").read_text(encoding="utf-8").strip() for photo in photos]
    assert captions.count("a cat") == 7
    assert captions.count("a close-up of a cat") == 3
    assert len(set(captions)) == 12
    for photo in photos:  # the same each time
        with Image.open(photo) as opened:
            assert opened.size == (128, 128)
        assert photo.read_bytes() == (tmp_path / "two" / photo.name).read_bytes()
