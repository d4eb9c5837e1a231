"""Everything that depends on how Composer 0.32 works inside: FSDP2, the training loop's own state, saving.

The model, the data and the loss know nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Callback, ComposerModel, DataSpec, Logger, State, Trainer
from composer.core.precision import get_precision_context
from composer.utils import dist, reproducibility
from composer.utils.checkpoint import save_checkpoint
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from unitoken.streaming_data.collate import Batch, num_packs, num_tokens, split_batch
from unitoken.streaming_data.config import ConfigError
from unitoken.train.checkpoints import allow_safe_types
from unitoken.train.config import StageConfig
from unitoken.train.decoder import DecoderLayer
from unitoken.train.model import UniToken
from unitoken.train.vision import VisionTower

TIMEOUT = 1800.0  # seconds a rank waits for the others; the first one reads tens of GB while they wait


class TrainingModel(ComposerModel):  # type: ignore[misc]
    """Our model as Composer calls it."""

    def __init__(self, network: UniToken) -> None:
        super().__init__()
        self.network = network
        # A unit of sharding is a decoder layer, the vision tower, and the rest: what is gathered and freed together.
        network.fsdp_wrap_fn = lambda module: isinstance(module, DecoderLayer | VisionTower)  # type: ignore[assignment]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss: dict[str, Tensor] = self.network(batch)._asdict()
        return loss

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002 - Composer's signature
        return outputs


class RestoreRandomState(Callback):  # type: ignore[misc]
    """Composer restores random states at the beginning of an epoch only, though dropout goes on drawing in its middle."""

    trainer: Trainer  # set once there is one

    def batch_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self.trainer._rng_state is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another number of ranks: what is saved of them is used
                reproducibility.load_rng_state(self.trainer._rng_state)
            self.trainer._rng_state = None


class AverageGradients(Callback):  # type: ignore[misc]
    """Makes FSDP2's sum of the ranks' gradients their mean, where it is a sum."""

    scale = 1.0  # set once the ranks are connected

    def after_train_batch(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self.scale != 1.0:
            for parameter in state.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.scale)


def gradient_scale(device: torch.device) -> float:
    """What FSDP2's gradients are to be multiplied by to be the mean over ranks: found out by trying.

    FSDP2 asks for the mean; NCCL gives it, and gloo (torch 2.7) gives the sum without a word.
    """
    ranks = dist.get_world_size()
    probe = nn.Linear(1, ranks, bias=False, device=device)
    fully_shard(probe)
    probe(torch.ones(1, 1, device=device)).sum().backward()  # the gradient is 1 on every rank
    assert isinstance(probe.weight.grad, DTensor)
    return float(1.0 / probe.weight.grad.full_tensor()[0, 0].item())


def world_size() -> int:
    """As the launcher says, before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def build_trainer(
    config: StageConfig,
    network: UniToken,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    callbacks: Sequence[Callback],
    resume: Path | None,
    max_duration: str,
) -> Trainer:
    """Shard the model if there are several ranks, and load `resume` if there is one."""
    sharded = world_size() > 1
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # Composer 0.32 would unpickle whatever a checkpoint holds
    allow_safe_types()
    restore, average = RestoreRandomState(), AverageGradients()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
        trainer = Trainer(
            model=TrainingModel(network),
            optimizers=optimizer,
            train_dataloader=DataSpec(
                loader,
                split_batch=split_batch,
                get_num_samples_in_batch=num_packs,
                get_num_tokens_in_batch=num_tokens,
            ),
            max_duration=max_duration,
            device_train_microbatch_size=config.microbatch,
            # Weighted by supervised tokens over microbatches and ranks; the reference takes the mean of means.
            accumulate_train_batch_on_tokens=config.compat != "unitoken",
            precision="amp_bf16" if config.precision == "bf16" else "fp32",
            # Only this form selects FSDP2; a dict would give DDP without a word. Whole checkpoints are read by the first rank,
            # which hands out the shards: 84 GB once for the 7B model, not once a rank.
            parallelism_config=ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full", load_monolith_rank0_only=True))
            if sharded
            else None,
            callbacks=[restore, average, *callbacks],
            load_path=str(resume) if resume else None,
            load_progress_bar=False,
            progress_bar=False,
            run_name=config.name,
            seed=config.seed,
            dist_timeout=TIMEOUT,
        )
    restore.trainer = trainer
    if sharded:
        unsharded = [name for name, parameter in network.named_parameters() if not isinstance(parameter, DTensor)]
        assert not unsharded, f"Composer left {len(unsharded)} parameters unsharded, {unsharded[0]} among them"
        average.scale = gradient_scale(next(network.parameters()).device)
        register_fsdp_forward_method(network, "predict")
    return trainer


def check_precision(config: StageConfig) -> None:
    if config.precision == "bf16" and not torch.cuda.is_available():
        raise ConfigError("precision: bf16 needs a GPU and there is none; on the CPU it is fp32")


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, over all shards."""
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def write_checkpoint(state: State, path: Path) -> None:
    """Called on all ranks; the first one writes."""
    save_checkpoint(state, str(path))


@contextlib.contextmanager
def paused(state: State) -> Iterator[UniToken]:
    """The network, to be asked something between two steps. Modes, random numbers and shards are then what they were."""
    network: UniToken = state.model.network
    modes = [(module, module.training) for module in network.modules()]
    device = network.lm_head.weight.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        get_precision_context(state.precision, state.precision_config),
        torch.compiler.set_stance("force_eager"),  # each new length would be compiled anew
    ):
        network.eval()
        try:
            yield network
        finally:
            for module, mode in modes:
                module.training = mode
            if isinstance(network, FSDPModule):
                network.reshard()  # the root keeps what it gathered until a backward pass


def first_ranks(tensor: Tensor) -> Tensor:
    """The first rank's, on all ranks: they must go the same way where they gather shards together."""
    dist.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    dist.barrier()
