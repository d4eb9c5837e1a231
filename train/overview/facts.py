"""What can be known of a stage before it trains: from its settings, its data's small files and a plan."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from unitoken.common.errors import ConfigError
from unitoken.dataset.record import Record
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.plan.lengths import StreamSamples, read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.train.accounting.fitting import (
    Fit,
    Fitting,
    choose,
    describe_fit,
    enough_text,
    expected_speed,
    pack_work,
)
from unitoken.train.accounting.memory import GB, RUNTIME, count_parameters
from unitoken.train.check import ResolvedData, ResolvedStage, check_stage, uses_codec
from unitoken.train.check_tokenizers import load_checked_tokenizer
from unitoken.train.checkpoint.locations import latest_checkpoint, step_of
from unitoken.train.config import StageConfig
from unitoken.train.distributed.precision import check_precision
from unitoken.train.model.lora import add_adapters
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, count_trained, freeze
from unitoken.train.overview.first_batch import Segment, first_batch, read_pack
from unitoken.train.overview.gpus import Gpus
from unitoken.train.overview.speed import can_be_tried, packs_to_try, seconds_of_pack
from unitoken.train.run.bucket import bucket_of, working_folder
from unitoken.train.run.initial_weights import find_initial_weights, growth_of


@dataclass(frozen=True)
class Speed:
    """How fast the stage will be.

    Attributes:
        tokens: a second, over all ranks, by the name of a GPU, or "" for this CPU; empty if unknown.
        how: where the numbers come from, or why there are none.
    """

    tokens: dict[str, float]
    how: str


@dataclass(frozen=True)
class Space:
    """What the stage writes to a disk or bucket, and the room there; None where it is not known."""

    where: str
    needed: float
    what: str
    free: float | None


@dataclass(frozen=True)
class Overview:
    """A stage before it trains.

    Attributes:
        config: the settings, without `auto`.
        resolved: what the check returned for them.
        ranks: number of ranks.
        gpus: what they train on; None on this machine's CPU.
        plan: the first epoch.
        fit: memory and speed of a rank.
        parameters: of the model.
        trained: of them, how many are trained.
        steps: of the whole stage.
        resumed: the step that training goes on from; 0 for a new run.
        speed: of the stage.
        space: what it writes.
        batch: the documents of the first global batch, pack by pack.
        records: the records of the first pack.
        warnings: one per line.
    """

    config: StageConfig
    resolved: ResolvedStage
    ranks: int
    gpus: Gpus | None
    plan: Plan
    fit: Fit
    parameters: int
    trained: int
    steps: int
    resumed: int
    speed: Speed
    space: tuple[Space, ...]
    batch: list[list[Segment]]
    records: list[Record]
    warnings: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return self.plan.packs // self.config.data.global_batch

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a global batch, padding left out."""
        return self.plan.report.fill * self.config.data.packed_length * self.config.data.global_batch


def look_at(config: StageConfig, ranks: int, gpus: Gpus | None) -> Overview:
    """Check a stage as training does at its start, and compute what can be known of it.

    Args:
        config: the settings.
        ranks: number of ranks.
        gpus: what they train on; None for the CPU of this machine.

    Raises:
        ConfigError: the stage would not start, or its settings do not fit the GPUs.
        DataError: the data can not be read.
    """
    resolved, plan, streams, network, trained, checkpoint = check_start(
        config, ranks, has_gpus=gpus is not None
    )
    parameters = count_trained(network)
    fitting = Fitting(
        config, resolved.sizes.decoder, resolved.sizes.vision, trained, parameters, ranks,
        pack_work(plan, config.data),
    )  # fmt: skip
    fit = choose(fitting, None if gpus is None else gpus.bytes)
    _check_memory(fitting, fit, gpus)
    config = fit.settings_in(config)
    batch = first_batch(plan, streams, config.data.global_batch)
    packs = [read_pack(pack, resolved.train.sources, config.data) for pack in batch[: packs_to_try(fit)]]
    total = count_parameters(resolved.sizes.decoder, resolved.sizes.vision).total
    steps = _steps(config.max_duration, plan, resolved.train)
    return Overview(
        config=config,
        resolved=resolved,
        ranks=ranks,
        gpus=gpus,
        plan=plan,
        fit=fit,
        parameters=total,
        trained=parameters,
        steps=steps,
        resumed=0 if checkpoint is None else step_of(checkpoint),
        speed=_speed(fitting, fit, gpus, network, resolved, packs),
        space=_space(config, resolved, plan, total, parameters, steps),
        batch=batch,
        records=packs[0],
        warnings=(*resolved.warnings, *plan.report.warnings()),
    )


class CheckedStage(NamedTuple):
    """A stage that would start: its first plan, and the model without memory."""

    resolved: ResolvedStage
    plan: Plan
    streams: list[StreamSamples]
    network: UniToken
    trained: list[str]  # names of the trained parameters
    checkpoint: Path | None  # that training goes on from


def check_start(config: StageConfig, ranks: int, has_gpus: bool) -> CheckedStage:
    """Check what training checks at its start, on as many ranks, without starting any.

    Raises:
        ConfigError: the stage would not start.
    """
    if not has_gpus:
        check_precision(config)
    resolved = check_stage(config, ranks)
    if config.codec is not None and uses_codec(config):
        load_checked_tokenizer(config.codec, resolved.vocabulary)
    if resolved.evaluation is not None:
        try:
            _plan_of(resolved.evaluation, resolved)
        except ConfigError as error:
            raise ConfigError(f"eval: {error}") from None
    plan, streams = _plan_of(resolved.train, resolved)
    network, trained = _build_network(config, resolved)
    checkpoint = latest_checkpoint(working_folder(config))
    if checkpoint is None:
        find_initial_weights(network, config, growth_of(config, resolved.vocabulary, resolved.new_rows))
    return CheckedStage(resolved, plan, streams, network, trained, checkpoint)


def _plan_of(data: ResolvedData, resolved: ResolvedStage) -> tuple[Plan, list[StreamSamples]]:
    """Return the plan of the first epoch, which training then finds in the cache, and the samples."""
    recipe = Recipe.of(data.config, data.sources, resolved.views)
    streams = [read_lengths(source, recipe, resolved.views) for source in data.sources]
    return load_or_build(data.config.cache_folder / "plans", recipe, 0, lambda: streams), streams


def _build_network(config: StageConfig, resolved: ResolvedStage) -> tuple[UniToken, list[str]]:
    """Build the model without memory; return it with the names of its trained parameters."""
    network = build_model(resolved.sizes.decoder, resolved.sizes.vision, config.model)
    add_adapters(network.model.layers, config.model.lora)
    trained = freeze(network, config.trainable)
    build_optimizer(network, config.optimizer, resolved.compat, resolved.trained_rows)  # checks `lr_scales`
    return network, trained


def _check_memory(fitting: Fitting, fit: Fit, gpus: Gpus | None) -> None:
    """Raise ConfigError if the stage does not fit the GPUs; it names the fastest settings that do."""
    if gpus is None or fit.memory.total <= gpus.bytes:
        return
    fits = fitting.that_fit(gpus.bytes)
    nothing = f"nothing fits{enough_text(fitting, gpus.bytes)}"
    cure = f"{describe_fit(fits[0])} fits" if fits else nothing
    raise ConfigError(
        f"microbatch: {fit.microbatch} needs {fit.memory.total / GB:.1f} GB of a GPU's "
        f"{gpus.bytes / GB:.0f} with activation_checkpointing={fit.recompute}; {cure}"
    )


def _steps(duration: str, plan: Plan, data: ResolvedData) -> int:
    """Return the steps of `max_duration`, as training counts them."""
    match = re.fullmatch(r"(\d+)(ep|ba|tok)", duration)
    assert match is not None, "checked by the settings"
    number, each = int(match[1]), plan.packs // data.config.global_batch
    tokens = plan.report.fill * plan.packs * data.config.packed_length
    return math.ceil(number * {"ep": each, "ba": 1.0, "tok": each / tokens}[match[2]])


def _speed(
    fitting: Fitting,
    fit: Fit,
    gpus: Gpus | None,
    network: UniToken,
    resolved: ResolvedStage,
    packs: Sequence[Sequence[Record]],
) -> Speed:
    config, work = fitting.config, fitting.work
    if gpus is not None:
        if config.precision != "bf16" or not gpus.peaks:
            return Speed({}, "unknown: computed for bf16 on H100, H200, A100, L40S and L4 only")
        tokens, shares = {}, []
        for name, peak in gpus.peaks.items():
            a_gpu, mfu = expected_speed(fit, work, peak, config.model.compile)
            tokens[name] = a_gpu * fitting.ranks
            shares.append(f"{mfu:.0%}")
        return Speed(tokens, f"computed from FLOPs with an MFU of {shares[0]} assumed, not measured")
    total = count_parameters(resolved.sizes.decoder, resolved.sizes.vision).total
    if not can_be_tried(config, fit, total):
        return Speed({}, "unknown on this CPU: `unitoken train ... max_duration=5ba` measures it")
    seconds = seconds_of_pack(network, config, resolved, packs)
    return Speed({"": work.tokens / seconds}, "a microbatch was tried out on this CPU, forward and backward")


def _space(
    config: StageConfig, resolved: ResolvedStage, plan: Plan, total: int, trained: int, steps: int
) -> tuple[Space, ...]:
    """Return what the stage writes: checkpoints, the export, and the cache."""
    each = 4.0 * total + 8.0 * trained  # weights, and Adam's moments
    most = min(config.save.keep + 1, steps)  # with the one that is being written
    what = f"{most} checkpoint{'s' if most > 1 else ''} of {size_text(each)}: weights, and Adam's moments"
    what += ", with the one that is being written" if most > config.save.keep else ""
    folder = Path(config.save.folder)
    is_bucket = bucket_of(config) is not None
    found = [Space(config.save.folder, most * each, what, None if is_bucket else _free(folder))]
    if config.save.export is not None:
        export = Path(config.save.export)
        found.append(Space(config.save.export, 2.0 * total, "the exported model in bf16", _free(export)))
    cache = config.data.cache_folder
    arrays = (plan.ids, plan.offsets, plan.squares, plan.images)
    needed = float(sum(array.nbytes for array in arrays))
    remote = [source for source in resolved.train.sources if source.store is not None]
    shards = float(sum(entry["raw_data"]["bytes"] for source in remote for entry in source.shards))
    limit = config.data.cache_limit
    shards = shards if limit is None else min(shards, float(limit))
    parts = ["the plan of an epoch"] + ([f"{size_text(shards)} of remote shards"] if shards else [])
    found.append(Space(str(cache), needed + shards, " and ".join(parts), _free(cache)))
    return tuple(found)


def _free(folder: Path) -> float | None:
    """Return the bytes that are free where a folder is or will be."""
    for path in (folder, *folder.absolute().parents):
        try:
            return float(shutil.disk_usage(path).free)
        except OSError:
            continue
    return None


def memory_here(fit: Fit) -> tuple[float, float | None]:
    """Return the bytes that the stage takes on a CPU, and those that this machine has, if that is known."""
    try:
        match = re.search(r"^MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return fit.memory.total - RUNTIME, 1024.0 * int(match[1]) if match else None


def size_text(size: float) -> str:
    """Return bytes as text with a unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.0f} kB"
