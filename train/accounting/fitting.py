"""Which settings of a stage fit its GPUs, and which of them are the fastest.

For `auto` in `activation_checkpointing` and `microbatch`, and for `unitoken plan-memory`.

    fitting = Fitting(config, decoder, vision, trained, ranks=8, work=work)
    fastest, *others = fitting.that_fit(gpu_bytes=80e9)

Settings are ordered by their cost in FLOPs a pack: what the step needs (flops.py) and what the backward pass
recomputes; or, where it is more, what a GPU could compute while parameters are gathered and gradients
reduced. The constants are an H100's and none is measured. The memory is that of memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import CANVASES
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.settings import DataConfig
from unitoken.train.accounting.flops import step_flops
from unitoken.train.accounting.memory import GB, MemoryEstimate, count_parameters, estimate_memory
from unitoken.train.config import DecoderConfig, StageConfig, VisionTowerConfig
from unitoken.train.model.activation_checkpointing import RecomputeMode

Recompute = RecomputeMode | int
# From the least recomputed to the most.
CANDIDATES: tuple[Recompute, ...] = ("none", "selective", 8, 4, 2, "full")

# Computed for the 7B model on an H100. Elementwise operations move 4,080 kB a token and layer, compiled
# 1,400 kB, a third of it forward; at 2.8 TB/s that takes 0.8 and 0.3 times as long as the layer's products at
# 690 TFLOP/s.
ELEMENTWISE = {False: 0.45, True: 0.22}  # share of a layer's forward time, by `model.compile`
REACHED = {False: 0.42, True: 0.54}  # share of the peak FLOP/s, by `model.compile`
# FLOPs in the time of a byte between GPUs: 450 TFLOP/s against 250 GB/s in a machine, 50 GB/s between two.
FLOPS_A_BYTE, FLOPS_A_BYTE_BETWEEN_MACHINES = 1800, 9000
GPUS_A_MACHINE = 8


class PackWork(NamedTuple):
    """What a pack of the data holds.

    Attributes:
        tokens: mean number of tokens.
        squares: mean sum of the squares of the documents' lengths.
        targets: mean number of supervised tokens.
        views: mean number of views (images or tiles) that the vision tower sees.
        most_views: views of the pack with the most of them.
    """

    tokens: float
    squares: float
    targets: float
    views: float
    most_views: int


def pack_work(plan: Plan, data: DataConfig) -> PackWork:
    """Return what the packs of an epoch hold."""
    images, most = float(plan.images.mean()), int(plan.images.max())
    return PackWork(
        tokens=plan.report.fill * data.packed_length,
        squares=float(plan.squares.mean()),
        targets=sum(stream.target_tokens for stream in plan.report.streams) / plan.packs,
        views=images * most_views(data),
        most_views=most * most_views(data),
    )


def most_views(data: DataConfig) -> int:
    """Return the most views (images or tiles) that the vision tower sees of an image."""
    return 1 + (max(across * down for across, down in CANVASES) if data.anyres else 0)


@dataclass(frozen=True)
class Fit:
    """Settings of a stage with what they take.

    Attributes:
        recompute: `activation_checkpointing`.
        microbatch: packs.
        memory: of each GPU.
        needed: FLOPs that a pack needs.
        cost: FLOPs that a GPU could compute in the time of a pack.
    """

    recompute: Recompute
    microbatch: int
    memory: MemoryEstimate
    needed: float
    cost: float

    def settings_in(self, config: StageConfig) -> StageConfig:
        """Return a stage with these settings."""
        update = {"activation_checkpointing": self.recompute, "microbatch": self.microbatch}
        return config.model_copy(update=update)


@dataclass(frozen=True)
class Fitting:
    """A stage on so many GPUs, whose `activation_checkpointing` and `microbatch` are to be chosen.

    Attributes:
        config: the stage.
        decoder: sizes of the decoder.
        vision: sizes of the vision tower, or None.
        trained: names of the trained parameters.
        parameters: number of the trained parameters.
        ranks: number of GPUs.
        work: what a pack holds.
    """

    config: StageConfig
    decoder: DecoderConfig
    vision: VisionTowerConfig | None
    trained: Sequence[str]
    parameters: int
    ranks: int
    work: PackWork

    def fit(self, recompute: Recompute, microbatch: int) -> Fit:
        """Return what these settings take."""
        update = {"activation_checkpointing": recompute, "microbatch": microbatch}
        memory = estimate_memory(
            self.config.model_copy(update=update),
            self.decoder,
            self.vision,
            ranks=self.ranks,
            trained=self.parameters,
            views=microbatch * self.work.most_views,
        )
        needed, recomputed = self._flops(recompute)
        cost = max(needed + recomputed, self._traffic() / microbatch)
        return Fit(recompute, microbatch, memory, needed, cost)

    def that_fit(
        self, gpu_bytes: float, modes: Sequence[Recompute] = CANDIDATES, microbatches: Sequence[int] = ()
    ) -> list[Fit]:
        """Return for each mode the largest microbatch that fits, the fastest first.

        Args:
            gpu_bytes: memory of the smallest GPU.
            modes: to choose from; those that the stage's other settings exclude are left out.
            microbatches: to choose from; () stands for all that divide a rank's share of the global batch.
        """
        found = []
        for recompute in modes:
            if recompute == "selective" and not self.config.supports_selective:
                continue
            fits = [self.fit(recompute, packs) for packs in microbatches or self._microbatches()]
            found += [fit for fit in fits if fit.memory.total <= gpu_bytes][-1:]
        return sorted(found, key=lambda fit: (fit.cost, -fit.microbatch))  # modes keep their order if equal

    def enough_gpus(self, gpu_bytes: float) -> int | None:
        """Return the least number of GPUs, of those that can share a global batch, which fit the stage."""
        batch, replicas = self.config.data.global_batch, self.config.fsdp.replicas
        for more in range(self.ranks + 1, batch + 1):
            if batch % more or more % replicas:
                continue
            if replace(self, ranks=more).that_fit(gpu_bytes, ["full"], [1]):
                return more
        return None

    def _microbatches(self) -> list[int]:
        packs = self.config.data.global_batch // self.ranks
        return [count for count in range(1, packs + 1) if packs % count == 0]

    def _flops(self, recompute: Recompute) -> tuple[float, float]:
        """Return the FLOPs that a pack needs, and those of what is recomputed of it."""
        work = self.work
        step = step_flops(self.decoder, self.vision, self.trained)
        forward = step_flops(self.decoder, self.vision, ())
        layers = forward.token * work.tokens + forward.square * work.squares
        if any(name.startswith("vit.") for name in self.trained):
            layers += forward.view * work.views
        needed = step.total(work.tokens, work.squares, work.views, work.targets)
        return needed, _recomputed_share(recompute, self.decoder, self.config.model.compile) * layers

    def _traffic(self) -> float:
        """Return the FLOPs in the time of a microbatch's traffic between GPUs."""
        shards = self.ranks // self.config.fsdp.replicas
        if self.ranks == 1:
            return 0.0
        bf16 = self.config.precision == "bf16"
        gathered = (1 + self.config.fsdp.reshard) * (2 if bf16 else 4)  # forward, and again backward
        reduced = 2 if bf16 and self.config.fsdp.reduce == "bf16" else 4
        sent = gathered * count_parameters(self.decoder, self.vision).total + reduced * self.parameters
        each = FLOPS_A_BYTE if shards <= GPUS_A_MACHINE else FLOPS_A_BYTE_BETWEEN_MACHINES
        return each * sent * (shards - 1) / shards


def _recomputed_share(recompute: Recompute, decoder: DecoderConfig, is_compiled: bool) -> float:
    """Return how much of the layers' forward time the recomputation takes."""
    if isinstance(recompute, str):
        return {"none": 0.0, "selective": ELEMENTWISE[is_compiled], "full": 1.0}[recompute]
    layers = decoder.num_hidden_layers
    return len(range(0, layers, recompute)) / layers


def choose(fitting: Fitting, gpu_bytes: float | None) -> Fit:
    """Return the fastest settings that fit, of those that the stage leaves open (`auto`).

    A pure function of its arguments: the same stage on the same GPUs gets the same settings. The choice
    changes no loss and no gradient, except that the random numbers of dropout depend on the microbatch.

    Args:
        fitting: the stage on its GPUs.
        gpu_bytes: memory of the smallest GPU; None on a CPU, where nothing is recomputed and a microbatch has
            one pack.

    Raises:
        ConfigError: nothing fits.
    """
    mode, packs = fitting.config.activation_checkpointing, fitting.config.microbatch
    is_open = "auto" in (mode, packs)
    if gpu_bytes is None or not is_open:
        return fitting.fit("none" if mode == "auto" else mode, 1 if packs == "auto" else packs)
    modes = CANDIDATES if mode == "auto" else (mode,)
    fits = fitting.that_fit(gpu_bytes, modes, () if packs == "auto" else (packs,))
    if not fits:
        least = fitting.fit("full" if mode == "auto" else mode, 1 if packs == "auto" else packs)
        key = "activation_checkpointing" if mode == "auto" else "microbatch"
        raise ConfigError(
            f"{key}: auto: nothing fits a GPU of {gpu_bytes / GB:.1f} GB: {describe_fit(least)} needs "
            f"{least.memory.summary()}{enough_text(fitting, gpu_bytes)}"
        )
    return fits[0]


def enough_text(fitting: Fitting, gpu_bytes: float) -> str:
    """Return the end of a message that nothing fits: how many GPUs are enough, or what else helps."""
    more = fitting.enough_gpus(gpu_bytes)
    other = "take larger GPUs, or a smaller data.packed_length"
    return f"; {other}" if more is None else f"; {more} GPUs are enough"


def describe_fit(fit: Fit) -> str:
    """Return the settings as they are written in a stage, for a message."""
    return f"activation_checkpointing={fit.recompute} microbatch={fit.microbatch}"


def expected_speed(fit: Fit, work: PackWork, peak_flops: float, is_compiled: bool) -> tuple[float, float]:
    """Return the expected tokens/s of a GPU, and the MFU.

    Args:
        fit: the settings.
        work: what a pack holds.
        peak_flops: FLOP/s of the GPU.
        is_compiled: whether the layers are compiled.
    """
    seconds = fit.cost / (REACHED[is_compiled] * peak_flops)
    return work.tokens / seconds, fit.needed / (seconds * peak_flops)
