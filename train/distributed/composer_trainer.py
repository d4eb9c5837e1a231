"""All code that depends on Composer 0.32's internals, with sharded_state.py: FSDP2, the training loop.

The model, the data and the loss do not depend on Composer.
"""

from __future__ import annotations

import contextlib
import inspect
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
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from unitoken.streaming_data.reading.batch import (
    Batch,
    PackedBatch,
    num_packs,
    num_targets,
    num_tokens,
    split_batch,
    unpack,
)
from unitoken.train.config import StageConfig
from unitoken.train.distributed import sharded_state
from unitoken.train.distributed.ranks import TIMEOUT, smallest, world_size
from unitoken.train.model.decoder import DecoderLayer
from unitoken.train.model.unitoken import OutputLayer, UniToken
from unitoken.train.model.vision_tower import VisionTower
from unitoken.train.optim import place_step_counts
from unitoken.train.run.run_folder import allow_safe_types

NO_TARGETS = 1e-30  # stands for 0 where Composer divides; in a sum with 1 or more it is lost


class TrainingModel(ComposerModel):  # type: ignore[misc]
    """Our model with Composer's interface."""

    def __init__(self, network: UniToken) -> None:
        super().__init__()
        self.network = network
        self.reshards = False  # whether layers free the weights that they gathered after each pass
        network.fsdp_wrap_fn = _sharding_unit  # type: ignore[assignment]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the fields of the model's `Loss` by name."""
        loss: dict[str, Any] = self.network(batch)._asdict()
        return loss

    def loss(self, outputs: dict[str, Any], batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002 - Composer's signature
        """Return the total loss alone, as Composer reduces and waits for the GPU for each entry."""
        return {"total": outputs["total"]}


def _sharding_unit(module: nn.Module) -> bool | dict[str, bool]:
    """Return whether a module's parameters are gathered and freed together, or how.

    Units are each decoder layer, the vision tower, the output layer, and the rest. So the output layer's
    gradient is reduced while the backward pass of the decoder runs, and is not kept until its end.
    """
    if isinstance(module, OutputLayer):
        return {"reshard_after_forward": False}  # the backward pass begins with it
    return isinstance(module, DecoderLayer | VisionTower)


class PackSpec(DataSpec):  # type: ignore[misc]
    """How Composer splits, unpacks and counts batches of packs."""

    def __init__(self, loader: Any) -> None:
        super().__init__(
            loader,
            split_batch=split_batch,
            microbatch_transforms=unpack,  # on the device
            get_num_samples_in_batch=num_packs,
        )

    def get_num_tokens_in_batch(self, batch: PackedBatch | Batch, token_type: str = "total") -> float:  # noqa: S107 - no password
        """Return the tokens of a batch on the CPU; or those in the loss, also of one on the GPU.

        Composer divides by those in the loss, so they are never 0: there are batches that train nothing.
        """
        return num_tokens(batch) if token_type == "total" else float(num_targets(batch)) or NO_TARGETS  # noqa: S105


class RestoreRandomState(Callback):  # type: ignore[misc]
    """Restores random states when resuming in mid-epoch; Composer does at the beginning of an epoch only."""

    trainer: Trainer  # set once it is built

    def batch_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Load the random states of a checkpoint that was just resumed from."""
        if self.trainer._rng_state is not None:
            with warnings.catch_warnings():
                # With another number of ranks Composer warns, and takes the saved states of some ranks.
                warnings.simplefilter("ignore")
                reproducibility.load_rng_state(self.trainer._rng_state)
            self.trainer._rng_state = None


class AverageGradients(Callback):  # type: ignore[misc]
    """Turns the ranks' sum of gradients into their mean, where FSDP2 gives the sum."""

    scale = 1.0  # set once the ranks are connected

    def after_train_batch(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Scale all gradients in place."""
        if self.scale != 1.0:
            for parameter in state.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.scale)


def measure_gradient_scale(device: torch.device, mesh: DeviceMesh) -> float:
    """Return the factor that makes FSDP2's gradients the mean over ranks, measured on a small module.

    FSDP2 asks for the mean. NCCL gives it; gloo (torch 2.7) gives the sum without a warning.
    """
    probe = nn.Linear(1, dist.get_world_size(), bias=False, device=device)
    fully_shard(probe, mesh=mesh)
    if mesh.ndim > 1:
        _support_replicas_on_cpu(probe)
    probe(torch.ones(1, 1, device=device)).sum().backward()  # the gradient is 1 on every rank
    assert isinstance(probe.weight.grad, DTensor)
    return float(1.0 / probe.weight.grad.full_tensor()[0, 0].item())


def _support_replicas_on_cpu(network: nn.Module) -> None:
    """Let FSDP2 reduce gradients over replicas on CPUs.

    With replicas FSDP2 takes a second mean, over them, in a way that only works on GPUs: gloo refuses means,
    and CPUs have no events. Torch 2.7 has no setting for it; there its all-reduce over replicas is replaced
    by a hook.
    """
    if torch.cuda.is_available():
        return
    if hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):  # newer than torch 2.7
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

    signature = inspect.signature(_fsdp_collectives.foreach_reduce)

    def reduce(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        group = call.arguments["all_reduce_group"]
        if group is not None:
            call.arguments["all_reduce_group"] = None
            call.arguments["all_reduce_hook"] = lambda gradients: torch.distributed.all_reduce(
                gradients, group=group
            )
        return _fsdp_collectives.foreach_reduce(*call.args, **call.kwargs)

    _fsdp_param_group.foreach_reduce = reduce  # type: ignore[attr-defined]


def _build_mesh(config: StageConfig) -> DeviceMesh:
    """Arrange the ranks as (replicas, shards), or as (shards,) for one replica.

    Neighbouring ranks, first of all the GPUs of a machine, share a copy of the model.
    """
    ranks, replicas, kind = dist.get_world_size(), config.fsdp.replicas, get_device(None).name
    kind = "cuda" if kind == "gpu" else kind
    if replicas == 1:
        return init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def fsdp2_config(config: StageConfig, mesh: DeviceMesh) -> FSDP2Config:
    """Return Composer's settings of FSDP2 for a stage."""
    return FSDP2Config(
        device_mesh=mesh,
        reshard_after_forward=config.fsdp.reshard,
        # Under bf16 layers compute in bf16 with both; PURE also sums their gradients in it.
        mixed_precision="PURE" if config.fsdp.reduce == "bf16" else "DEFAULT",
        # The first rank reads whole-file checkpoints, of runs of before, and sends the shards: 84 GB for the
        # 7B model once, not on each rank.
        state_dict_type="full",
        load_monolith_rank0_only=True,
    )


def _parallelism(config: StageConfig, mesh: DeviceMesh | None) -> ParallelismConfig | None:
    """Return the form of settings that selects FSDP2; a dict would give DDP without a warning."""
    return ParallelismConfig(fsdp2=fsdp2_config(config, mesh)) if mesh is not None else None


def has_gpu() -> bool:
    """Return whether training runs on a GPU."""
    return torch.cuda.is_available()


def gpu_bytes() -> float | None:
    """Return the memory of the smallest GPU of all ranks, for all ranks to choose alike; None on a CPU."""
    if not has_gpu():
        return None
    return smallest(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def describe_devices() -> str:
    """Return the number and kind of a machine's GPUs, for a message."""
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
    """Build Composer's trainer: shard the model over several ranks, and load a checkpoint.

    Args:
        config: the stage.
        network: the model.
        optimizer: the optimizer, whose settings are kept when its state is loaded.
        loader: the loader of this rank's batches, a DataLoader.
        callbacks: run after our own.
        loggers: destinations of metrics.
        resume: the checkpoint to resume from, or None.
        max_duration: in Composer's form.
    """
    settings = [_without_parameters(group) for group in optimizer.param_groups]
    mesh = _build_mesh(config) if world_size() > 1 else None
    _forbid_unpickling()
    restore, average = RestoreRandomState(), AverageGradients()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
        trainer = Trainer(
            model=TrainingModel(network),
            optimizers=optimizer,
            train_dataloader=PackSpec(loader),
            max_duration=max_duration,
            callbacks=[restore, average, *callbacks],
            loggers=list(loggers),
            load_path=str(resume) if resume and resume.is_file() else None,
            parallelism_config=_parallelism(config, mesh),
            **_trainer_settings(config),
        )
    restore.trainer = trainer
    if resume and resume.is_dir():
        sharded_state.restore(trainer, resume)
    set_precision_of_products(config)
    _keep_settings(trainer.state.optimizers[0], settings)
    if mesh is not None:
        _finish_sharding(config, network)
        trainer.state.model.reshards = config.fsdp.reshard
        average.scale = measure_gradient_scale(next(network.parameters()).device, mesh)
    return trainer


def _keep_settings(optimizer: torch.optim.Optimizer, settings: Sequence[dict[str, Any]]) -> None:
    """Give the groups their own settings again: Composer replaces them by those of the saved run."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    place_step_counts(optimizer)


def _forbid_unpickling() -> None:
    """Make Composer 0.32 read checkpoints with `weights_only=True`, so that they can not run code."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    allow_safe_types()


def set_precision_of_products(config: StageConfig) -> None:
    """Set in what precision float32 matrices are multiplied: Composer allows TF32 on GPUs each time."""
    if torch.cuda.is_available():
        is_allowed = config.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed
    else:
        # Factors in bfloat16, sums in float32: 3.6 times the speed of "highest" with AMX (1024 x 576 x 1536).
        torch.set_float32_matmul_precision("medium" if config.precision == "tf32" else "highest")


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _trainer_settings(config: StageConfig) -> dict[str, Any]:
    """Return the trainer's arguments that depend on the stage's settings alone."""
    return {
        "run_name": config.name,
        "seed": config.seed,
        "device_train_microbatch_size": config.microbatch_packs,
        # Weighted by supervised tokens over microbatches and ranks; the reference takes the mean of means.
        "accumulate_train_batch_on_tokens": config.compat != "unitoken",
        "precision": "amp_bf16" if config.precision == "bf16" else "fp32",
        "deterministic_mode": config.deterministic,
        "dist_timeout": TIMEOUT,
        "load_progress_bar": False,
        "progress_bar": False,
    }


def _finish_sharding(config: StageConfig, network: UniToken) -> None:
    """Check that Composer sharded the whole model, and set what it does not set."""
    unsharded = [name for name, parameter in network.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unsharded, f"Composer left {len(unsharded)} parameters unsharded, {unsharded[0]} among them"
    if config.fsdp.replicas > 1:
        _support_replicas_on_cpu(network)
    if config.fsdp.reshard and hasattr(network, "set_reshard_after_forward"):
        # Newer versions of torch would also free embeddings and output layer, which are needed again at once;
        # torch 2.7 never frees a root.
        network.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
    register_fsdp_forward_method(network, "predict")
    if not network.is_tied:
        register_fsdp_forward_method(network.lm_head, "loss")


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the L2 norm of all gradients together, over all shards."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextlib.contextmanager
def evaluation_mode(state: State) -> Iterator[UniToken]:
    """Yield the network in evaluation mode, between two steps.

    Modes, random numbers and shards are restored afterwards. In between, weights that were gathered stay, so
    that each is gathered once for any number of passes. A rank then holds all weights, but neither gradients
    nor activations.
    """
    network: UniToken = state.model.network
    modes = [(module, module.training) for module in network.modules()]
    device = network.output_weight.device
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # sampling on a GPU uses a sum that has no deterministic form
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        get_precision_context(state.precision, state.precision_config),
        torch.compiler.set_stance("force_eager"),  # otherwise each new length would be compiled
        _keep_gathered(network, state.model.reshards),
    ):
        network.eval()
        try:
            yield network
        finally:
            torch.use_deterministic_algorithms(deterministic)
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def _keep_gathered(network: nn.Module, reshards: bool) -> Iterator[None]:
    """Let each sharding unit gather its weights once; free them at the end.

    Args:
        network: the model, sharded or not.
        reshards: whether layers and tower free their weights after each pass in training.
    """
    units: list[Any] = [module for module in network.modules() if isinstance(module, FSDPModule)]
    inner = [unit for unit in units if isinstance(unit, DecoderLayer | VisionTower) and reshards]
    try:
        for unit in inner:
            _reshard_after_forward(unit, False)
        yield
    finally:
        for unit in inner:
            _reshard_after_forward(unit, True)
        for unit in units:  # root and output layer keep what they gathered until a backward pass
            unit.reshard()


def _reshard_after_forward(unit: Any, reshard: bool) -> None:
    """Set whether a sharding unit frees its weights after each pass."""
    if hasattr(unit, "set_reshard_after_forward"):
        unit.set_reshard_after_forward(reshard, recurse=False)
    else:  # torch 2.7 has no public way
        group = unit._get_fsdp_state()._fsdp_param_group
        group.post_forward_mesh_info = group.mesh_info if reshard else None
