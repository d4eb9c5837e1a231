"""The GPUs that a stage is checked for: those of this machine, or others by their memory."""

from __future__ import annotations

from typing import NamedTuple

from unitoken.train.accounting.flops import PEAK_FLOPS, peak_flops
from unitoken.train.accounting.memory import GB
from unitoken.train.plan_memory import parse_gpu

# By the GB that `--gpu` names: the names of GPUs with so much memory, as in PEAK_FLOPS.
BY_MEMORY = {
    24: ("L4",),
    40: ("A100",),
    48: ("L40S",),
    80: ("H100 80GB HBM3", "A100"),
    94: ("H100 NVL",),
    96: ("GH200",),
    141: ("H200",),
}


class Gpus(NamedTuple):
    """GPUs of one kind.

    Attributes:
        bytes: memory of each.
        where: what they are, for the screen.
        peaks: FLOP/s of each by its name; several where only the memory is known, none where no peak is.
    """

    bytes: float
    where: str
    peaks: dict[str, float]


def named_gpus(text: str) -> Gpus:
    """Return the GPUs that `--gpu 80gb` means. Raises ConfigError for something else than a size."""
    size = parse_gpu(text)
    names = BY_MEMORY.get(round(size / GB), ())
    peaks = {name.partition(" 80GB")[0]: PEAK_FLOPS[name] for name in names}
    return Gpus(size, f"GPUs of {size / GB:g} GB (--gpu)", peaks)


def gpus_here() -> tuple[Gpus, int] | None:
    """Return the GPUs of this machine and their number; None if it has none."""
    import torch

    if not torch.cuda.is_available():
        return None
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    size = min(torch.cuda.get_device_properties(number).total_memory for number in range(count))
    peak = peak_flops(name)
    peaks = {} if peak is None else {name.removeprefix("NVIDIA "): peak}
    return Gpus(float(size), f"{name} of {size / GB:.0f} GB (of this machine)", peaks), count
