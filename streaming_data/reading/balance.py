"""The packs of a global batch -> ranks, so that no rank waits for another.

All packs are of one length, so what differs between them is attention inside their documents (the sum of squared document
lengths) and the vision tower's work (images). Which packs make up a batch is the plan's; who computes which is free.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def balance(squares: npt.NDArray[np.floating[Any]], images: npt.NDArray[np.integer[Any]], ranks: int) -> Ids:
    """Deal packs to ranks, equally many each, with squares and images spread as evenly as a greedy rule can.

    The heaviest pack first, each to the rank whose larger load, of the two, stays smallest with it. A rank's packs are
    ordered from heavy to light, so that the ranks' first microbatches are alike, and their second.

    Args:
        squares, images: (G,) of each pack; `ranks` divides G.

    Returns:
        (ranks, G / ranks) numbers of packs.
    """
    count = len(squares)
    each = count // ranks
    loads = np.stack([squares, images], axis=1).astype(np.float64)  # (G, 2)
    loads /= np.maximum(loads.sum(axis=0), 1e-9)  # a share of the batch's: both count alike
    heaviest_first = np.argsort(-loads.max(axis=1), kind="stable")
    if each == 1 or ranks == 1:
        return heaviest_first.reshape(ranks, each)
    first, second = (
        np.zeros(ranks),
        np.zeros(ranks),
    )  # sums of either load; two arrays, as a maximum over pairs is slow
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for pack, (square, image) in zip(heaviest_first.tolist(), loads[heaviest_first].tolist(), strict=True):
        rank = int(np.maximum(first + square, second + image).argmin())
        dealt[rank].append(pack)
        if len(dealt[rank]) < each:
            first[rank] += square
            second[rank] += image
        else:
            first[rank] = np.inf  # full
    return np.array(dealt, np.int64)
