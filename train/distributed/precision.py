"""Whether this machine can compute in a stage's precision; needs torch and not Composer."""

from __future__ import annotations

import torch

from unitoken.common.errors import ConfigError
from unitoken.train.config import StageConfig

FLOAT8_CAPABILITY = (8, 9)  # of GPUs that multiply in float8


def check_precision(config: StageConfig) -> None:
    """Raise ConfigError if the machine can not train in the stage's precision."""
    if config.precision == "bf16" and not torch.cuda.is_available():
        raise ConfigError(
            "precision: bf16 needs a GPU and there is none; on the CPU it is fp32 or tf32: precision=fp32. "
            "`unitoken check STAGE --gpu 80gb` checks for GPUs elsewhere"
        )
    if config.model.float8 and (capability := torch.cuda.get_device_capability()) < FLOAT8_CAPABILITY:
        found, needed = (".".join(map(str, each)) for each in (capability, FLOAT8_CAPABILITY))
        raise ConfigError(
            f"model.float8: needs GPUs of compute capability {needed} or more, as H100s; this one has {found}"
        )
