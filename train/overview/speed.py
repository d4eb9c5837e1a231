"""How fast a stage will be: computed for known GPUs, tried out on a CPU, and unknown elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from unitoken.dataset.record import Record
from unitoken.streaming_data.plan.feature_cost import limit_of
from unitoken.streaming_data.reading.batch import unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.train.accounting.fitting import Fit
from unitoken.train.check import ResolvedStage
from unitoken.train.config import StageConfig
from unitoken.train.model.unitoken import UniToken

MOST_FLOPS = 2e11  # of a pack that is tried out: some seconds of two cores
MOST_PARAMETERS = 300_000_000


def can_be_tried(config: StageConfig, fit: Fit, parameters: int) -> bool:
    """Return whether a forward and backward pass of a pack takes this machine only seconds."""
    if config.model.attention == "flex" or config.model.float8 or parameters > MOST_PARAMETERS:
        return False
    return fit.needed <= MOST_FLOPS


def packs_to_try(fit: Fit) -> int:
    """Return how many packs are tried out together: a microbatch, or fewer where that takes too long."""
    return max(1, min(fit.microbatch, int(MOST_FLOPS / max(fit.needed, 1.0))))


def seconds_of_pack(
    network: UniToken, config: StageConfig, resolved: ResolvedStage, packs: Sequence[Sequence[Record]]
) -> float:
    """Return the seconds of a pack's forward and backward pass on this CPU, with weights of random numbers.

    Args:
        network: the model on the `meta` device, with its frozen parameters; it gets memory.
        config: the stage.
        resolved: what the check returned for it.
        packs: the packs to try, as one microbatch.
    """
    data, vocabulary = config.data, resolved.vocabulary
    limits = tuple(limit_of(source.config, data.packed_length) for source in resolved.train.sources)
    collate = Collate(
        length=data.packed_length,
        views=resolved.views if data.continuous != "none" else None,
        continuous=data.continuous,
        separator=vocabulary.separator,
        newline=vocabulary.newline,
        compat=resolved.compat,
        streams=len(resolved.train.sources),
        vocabulary_size=vocabulary.size,
        limits=None if data.over_long == "reject" else limits,
    )
    batch = unpack(collate(packs))
    network.to_empty(device="cpu").train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.02)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if config.precision == "tf32" else "highest")
    try:
        taken = []
        for _ in range(3):  # the first one also takes memory from the kernel
            begin = time.perf_counter()
            network(batch).total.backward()
            taken.append(time.perf_counter() - begin)
            if sum(taken) > 3.0:
                break
    finally:
        torch.set_float32_matmul_precision(before)
    return min(taken) / len(packs)
