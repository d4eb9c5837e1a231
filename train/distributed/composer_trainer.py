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
from composer.loggers import LoggerDestination
from composer.utils import dist, get_device, reproducibility
from composer.utils.checkpoint import save_checkpoint
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from unitoken.common.errors import ConfigError
from unitoken.streaming_data.reading.collate import Batch, num_packs, num_tokens, split_batch
from unitoken.train.checkpoint.run_folder import allow_safe_types
from unitoken.train.config import StageConfig
from unitoken.train.distributed.ranks import TIMEOUT, world_size
from unitoken.train.model.decoder import DecoderLayer
from unitoken.train.model.unitoken import UniToken
from unitoken.train.model.vision_tower import VisionTower


class TrainingModel(ComposerModel):  # type: ignore[misc]
    """Our model as Composer calls it."""

    def __init__(self, network: UniToken) -> None:
        super().__init__()
        self.network = network
        # A unit of sharding is a decoder layer, the vision tower, and the rest: what is gathered and freed together.
        network.fsdp_wrap_fn = lambda module: isinstance(module, DecoderLayer | VisionTower)  # type: ignore[assignment]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss: dict[str, Any] = self.network(batch)._asdict()
        return loss

    def loss(self, outputs: dict[str, Any], batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002 - Composer's signature
        """What is trained on, alone: Composer reduces over the ranks, and waits for the GPU, once for each entry."""
        return {"total": outputs["total"]}


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


def gradient_scale(device: torch.device, mesh: DeviceMesh) -> float:
    """What FSDP2's gradients are to be multiplied by to be the mean over ranks: found out by trying.

    FSDP2 asks for the mean; NCCL gives it, and gloo (torch 2.7) gives the sum without a word.
    """
    probe = nn.Linear(1, dist.get_world_size(), bias=False, device=device)
    fully_shard(probe, mesh=mesh)
    if mesh.ndim > 1:
        _let_cpus_replicate(probe)
    probe(torch.ones(1, 1, device=device)).sum().backward()  # the gradient is 1 on every rank
    assert isinstance(probe.weight.grad, DTensor)
    return float(1.0 / probe.weight.grad.full_tensor()[0, 0].item())


def _let_cpus_replicate(network: nn.Module) -> None:
    """With replicas FSDP2 takes a second mean, over them, in a way of GPUs only: gloo refuses means, and CPUs have no events."""
    if torch.cuda.is_available():
        return
    if hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):  # newer than torch 2.7
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

    def reduce(*arguments: Any) -> Any:
        given, (replicas, hook) = list(arguments), (8, 12)
        group, given[replicas] = given[replicas], None
        if group is not None:
            given[hook] = lambda gradients: torch.distributed.all_reduce(gradients, group=group)
        return _fsdp_collectives.foreach_reduce(*given)

    _fsdp_param_group.foreach_reduce = reduce  # type: ignore[assignment,attr-defined]


def _mesh(config: StageConfig) -> DeviceMesh:
    """Ranks as (replicas, shards): neighbours, the GPUs of a machine first, share a copy of the model. One replica: (shards,)."""
    ranks, replicas, kind = dist.get_world_size(), config.fsdp.replicas, get_device(None).name
    kind = "cuda" if kind == "gpu" else kind
    if replicas == 1:
        return init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def fsdp2_config(config: StageConfig, mesh: DeviceMesh) -> FSDP2Config:
    return FSDP2Config(
        device_mesh=mesh,
        reshard_after_forward=config.fsdp.reshard,
        # Under bf16 layers compute in it either way; PURE sums their gradients in it, too.
        mixed_precision="PURE" if config.fsdp.reduce == "bf16" else "DEFAULT",
        # Whole checkpoints are read by the first rank, which hands out the shards: 84 GB for the 7B model, not once a rank.
        state_dict_type="full",
        load_monolith_rank0_only=True,
    )


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device_name() -> str:
    if not torch.cuda.is_available():
        return "the CPU: no GPU was found"
    return f"{min(torch.cuda.device_count(), world_size())} x {torch.cuda.get_device_name()} a machine"


def build_trainer(
    config: StageConfig,
    network: UniToken,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    callbacks: Sequence[Callback],
    loggers: Sequence[LoggerDestination],
    resume: Path | None,
    max_duration: str,
) -> Trainer:
    """Shard the model if there are several ranks, and load `resume` if there is one; the optimizer's settings are today's."""
    wanted = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    mesh = _mesh(config) if world_size() > 1 else None
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = (
        "1"  # Composer 0.32 would unpickle whatever a checkpoint holds
    )
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
            # Only this form selects FSDP2; a dict would give DDP without a word.
            parallelism_config=ParallelismConfig(fsdp2=fsdp2_config(config, mesh))
            if mesh is not None
            else None,
            deterministic_mode=config.deterministic,
            callbacks=[restore, average, *callbacks],
            loggers=list(loggers),
            load_path=str(resume) if resume else None,
            load_progress_bar=False,
            progress_bar=False,
            run_name=config.name,
            seed=config.seed,
            dist_timeout=TIMEOUT,
        )
    restore.trainer = trainer
    if (
        config.precision == "fp32" and torch.cuda.is_available()
    ):  # Composer lets products of float32 matrices be TF32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for group, ours in zip(trainer.state.optimizers[0].param_groups, wanted, strict=True):
        group.update(
            ours
        )  # Composer loads the saved run's settings over them: weight decay, betas, eps and scales
    if mesh is not None:
        unsharded = [
            name for name, parameter in network.named_parameters() if not isinstance(parameter, DTensor)
        ]
        assert not unsharded, (
            f"Composer left {len(unsharded)} parameters unsharded, {unsharded[0]} among them"
        )
        if config.fsdp.replicas > 1:
            _let_cpus_replicate(network)
        average.scale = gradient_scale(next(network.parameters()).device, mesh)
        if config.fsdp.reshard and hasattr(network, "set_reshard_after_forward"):
            # Newer torch would free embeddings and output layer, too, which are needed again at once; 2.7 never frees a root.
            network.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
        register_fsdp_forward_method(network, "predict")
    return trainer


def check_precision(config: StageConfig) -> None:
    if config.precision == "bf16" and not torch.cuda.is_available():
        raise ConfigError("precision: bf16 needs a GPU and there is none; on the CPU it is fp32")


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, over all shards."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def write_checkpoint(state: State, path: Path) -> None:
    """Called on all ranks; the first one writes. Raises OSError on the first rank alone where it can not."""
    try:
        save_checkpoint(state, str(path))
    except (OSError, RuntimeError) as error:
        of_file = (
            isinstance(error, OSError)
            or "PytorchStreamWriter" in str(error)
            or "inline_container" in str(error)
        )
        if not of_file or dist.get_global_rank() > 0:
            raise
        dist.barrier()  # at which Composer lets the others wait until the file is written
        raise _os_error(error) or OSError(str(error).splitlines()[0]) from None


def _os_error(error: BaseException | None) -> OSError | None:
    """What the operating system said: where a write fails torch can not end the file either, and says that alone."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def paused(state: State) -> Iterator[UniToken]:
    """The network, to be asked something between two steps. Modes, random numbers and shards are then what they were."""
    network: UniToken = state.model.network
    modes = [(module, module.training) for module in network.modules()]
    device = network.lm_head.weight.device
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # drawing lots on a GPU sums in an order of its own
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        get_precision_context(state.precision, state.precision_config),
        torch.compiler.set_stance("force_eager"),  # each new length would be compiled anew
    ):
        network.eval()
        try:
            yield network
        finally:
            torch.use_deterministic_algorithms(deterministic)
            for module, mode in modes:
                module.training = mode
            if isinstance(network, FSDPModule):
                network.reshard()  # the root keeps what it gathered until a backward pass
