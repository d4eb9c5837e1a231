"""The packs of a global batch -> ranks, so that no rank waits for another.

All packs have one length, so they differ in the attention inside their documents (the sum of squared document
lengths) and in the vision tower's work (images). Which packs make up a batch is the plan's decision; which
rank computes which is free.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.streaming_data.arrays import Integers


def balance(
    squares: npt.NDArray[np.floating[Any]], images: npt.NDArray[np.integer[Any]], ranks: int
) -> Integers:
    """Deal packs to ranks, equally many each, with squares and images spread as evenly as a greedy rule can.

    The heaviest pack comes first; each goes to the rank for which the larger of its two loads stays smallest.
    A rank's packs are ordered from heavy to light, so that the first microbatches of all ranks are alike, and
    the second.

    Args:
        squares: (G,) of each pack.
        images: (G,) of each pack.
        ranks: how many there are; a divisor of G.

    Returns:
        (ranks, G / ranks) numbers of packs.
    """
    count = len(squares)
    each = count // ranks
    loads = np.stack([squares, images], axis=1).astype(np.float64)  # (G, 2)
    loads /= np.maximum(loads.sum(axis=0), 1e-9)  # as shares of the batch's, so that both count alike
    heaviest_first = np.argsort(-loads.max(axis=1), kind="stable")
    if each == 1 or ranks == 1:
        return heaviest_first.reshape(ranks, each)
    # Two arrays of sums, (ranks,) each, as a maximum over pairs is slow.
    rank_squares, rank_images = np.zeros(ranks), np.zeros(ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for pack, (square, image) in zip(heaviest_first.tolist(), loads[heaviest_first].tolist(), strict=True):
        rank = int(np.maximum(rank_squares + square, rank_images + image).argmin())
        dealt[rank].append(pack)
        if len(dealt[rank]) < each:
            rank_squares[rank] += square
            rank_images[rank] += image
        else:
            rank_squares[rank] = np.inf  # full
    return np.array(dealt, np.int64)
