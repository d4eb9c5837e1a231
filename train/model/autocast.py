"""The data type in which autocast multiplies."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype in which `F.linear` multiplies `states`: under autocast not their own."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
