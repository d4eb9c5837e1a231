"""A simple classifier, trained on the real digits: which digit it sees in a drawing (demo/suite.yaml)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from demo.digits import WORDS, small, split


@functools.cache
def _classifier() -> Any:
    digits, train = load_digits(), split()[0]
    return SVC(gamma=0.001).fit(digits.data[train], digits.target[train])


def name_digit(picture: Image.Image) -> str:
    """Return the digit in a picture, as a word."""
    (label,) = _classifier().predict(small(np.asarray(picture))[None])
    return WORDS[label]
