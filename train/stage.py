"""One stage of training, from settings to the last checkpoint: a straight list of builds, then fit."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import NamedTuple

from composer import Callback

from unitoken.common.files import exclusive_lock
from unitoken.common.interruption import end_on_signals, remember_signals
from unitoken.dataset.vision_views import CANVASES, Views
from unitoken.streaming_data.check import other_codes, uneven_proportions
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.train.accounting.flops import step_flops
from unitoken.train.accounting.memory import MemoryEstimate, estimate_memory
from unitoken.train.callbacks.evaluation import Evaluation, evaluation_loader
from unitoken.train.callbacks.loggers import build_loggers
from unitoken.train.callbacks.metrics import Metrics
from unitoken.train.callbacks.optimisation import Optimisation
from unitoken.train.callbacks.samples import samples_of
from unitoken.train.callbacks.saver import Interruption, Saver
from unitoken.train.check import ResolvedStage, needs_codec
from unitoken.train.check_tokenizers import load_checked_tokenizer
from unitoken.train.checkpoint import run_folder
from unitoken.train.checkpoint.compatibility import check_finished, settings_of_all_machines
from unitoken.train.checkpoint.export import export_at_end
from unitoken.train.checkpoint.integrity import check_checkpoint
from unitoken.train.checkpoint.loading import fill_with_nan, find_weights, load_weights
from unitoken.train.checkpoint.locations import find_origin, latest_checkpoint
from unitoken.train.checkpoint.metadata import ModelSizes, write_metadata
from unitoken.train.checkpoint.tensors import TensorSource, parameter_shapes
from unitoken.train.config import StageConfig
from unitoken.train.distributed import composer_trainer, ranks
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, freeze


def run_stage(config: StageConfig, checked: ResolvedStage) -> None:
    """Train, or go on training: a checkpoint in `save.folder` comes before `init_from` and all pretrained weights."""
    composer_trainer.check_precision(config)
    ranks.connect()
    with (
        ranks.share_errors()
    ):  # the first word that ranks exchange: here they hear that `check` failed on another machine
        if config.codec is not None and needs_codec(config):
            load_checked_tokenizer(config.codec, checked.vocabulary)
    ranks.check_same_settings(settings_of_all_machines(config))
    folder = Path(config.save.folder)
    with contextlib.ExitStack() as stack:
        with ranks.share_errors():
            folder.mkdir(parents=True, exist_ok=True)
            if ranks.is_first_rank():
                at_work = f"save.folder: {folder}: another run is at work in it and holds {run_folder.LOCK}"
                stack.enter_context(exclusive_lock(folder / run_folder.LOCK, at_work))
                for line in run_folder.set_aside_damaged(folder):
                    say(f"warning: {line}")
        _run(config, checked)


def _run(config: StageConfig, checked: ResolvedStage) -> None:
    folder = Path(config.save.folder)
    compat = config.compat == "unitoken"
    views = (
        Views(checked.vision.image_size, checked.vision.patch_size, config.data.anyres)
        if checked.vision
        else None
    )
    with ranks.share_errors():
        held_out = evaluation_loader(config, checked, views)
        share = config.data.global_batch // ranks.world_size()
        loader = build_loader(
            config.data, views=views, vocabulary=checked.vocabulary, batch_packs=share, compat=compat
        )
        resume = latest_checkpoint(folder)
    ranks.check_same("save.folder", "no checkpoint" if resume is None else resume.name)
    ranks.check_same("data", f"order {loader.dataset.plan.report.order}")
    report = loader.dataset.plan.report
    length = Lengths(
        report.packs // config.data.global_batch, report.fill * report.packs * config.data.packed_length
    )
    total_steps = math.ceil(length.steps(config.max_duration))
    say(report.table())
    for line in [
        *uneven_proportions(config.data),
        *other_codes(loader.dataset.sources),
        *report.warnings(),
        *checked.notes,
    ]:
        say(f"warning: {line}")

    network = build_model(
        checked.decoder,
        checked.vision,
        config.model,
        config.activation_checkpointing,
        checked.vocabulary.image_ids,
    )
    trained = freeze(network, config.trainable)
    build_optimizer(
        network, config.optimizer, compat=compat
    )  # a name that is wrong is found before weights are loaded
    if config.model.compile:
        for layer in network.model.layers:
            layer.compile()
    if not _fill(network, config, resume, total_steps):
        check_finished(folder, config)
        say(f"{config.name}: finished, {resume} is its last checkpoint")
        if ranks.is_first_rank():
            export_at_end(config)
        return
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    where = f"{total_steps} steps on {ranks.world_size()} rank(s), {composer_trainer.describe_devices()}"
    say(f"{config.name}: trains {count:,} parameters in {len(trained)} tensors for {where}")
    if composer_trainer.has_gpu():
        say(
            f"{config.name}: needs {_need(config, checked, count, int(loader.dataset.plan.images.max())).summary()}"
        )

    warmup = length.steps(config.optimizer.warmup)
    optimisation = Optimisation(config.optimizer, warmup, total_steps, length.epoch_steps, by_packs=compat)
    metrics = Metrics(config, optimisation, total_steps, step_flops(checked.decoder, checked.vision, trained))
    saver = Saver(config.save, stage_identity(config), total_steps)
    interruption = Interruption(optimisation, saver)
    callbacks: list[Callback] = [optimisation, saver, interruption, metrics]
    if held_out is not None:
        callbacks.append(Evaluation(config, held_out, metrics, length.epoch_steps))
    trainer = composer_trainer.build_trainer(
        config,
        network,
        build_optimizer(network, config.optimizer, compat=compat),
        loader,
        [*callbacks, *samples_of(config, checked.vocabulary, checked.pictures)],
        build_loggers(config, resume is not None),
        resume,
        # Composer counts tokens as they come, and would end between two batches of an epoch that no plan names.
        f"{total_steps}ba" if config.max_duration.endswith("tok") else config.max_duration,
    )
    if (
        ranks.is_first_rank()
    ):  # not before: a checkpoint that was refused is another stage's, and so is what the folder says
        write_metadata(
            folder,
            config,
            ModelSizes(decoder=checked.decoder, vision=checked.vision),
            checked.vocabulary,
            checked.pictures,
        )
    remember_signals()
    try:
        trainer.fit()
    except BaseException:
        trainer.engine.close()  # files and loggers; Trainer.close waits for all ranks, and the others wait for this one's shards
        raise
    trainer.close()
    if interruption.signal:
        say(f"{config.name}: interrupted at step {saver.saved_at}, saved; the same command goes on")
        raise SystemExit(128 + interruption.signal)
    say(
        f"{config.name}: finished, saved in {folder}; next: init_from={folder} in another stage, or "
        f'python -m unitoken.train generate {folder} --prompt "..." --out FOLDER'
    )
    end_on_signals("interrupted after the last step, which is saved; the same command goes on")
    if ranks.is_first_rank():
        export_at_end(config)


def _fill(network: UniToken, config: StageConfig, resume: Path | None, total_steps: int) -> bool:
    """Give the `meta` model its memory, and on the first rank its weights; the other ranks get their shards from it.

    False where there is nothing left to train.
    """
    with ranks.share_errors():
        if resume is None:
            earlier = _earlier(config.init_from) if config.init_from else None
            parts = find_weights(network, config.model, earlier)
            if ranks.is_first_rank():
                say("\n".join(load_weights(network, parts, config.seed)))
            return True
        run_folder.check_resumable(resume, parameter_shapes(network), stage_identity(config))
    if run_folder.step_of(resume) >= total_steps:
        return False
    say(f"{config.name}: goes on from {resume}")
    if ranks.is_first_rank():
        fill_with_nan(network)
    return True


def _earlier(init_from: str) -> TensorSource:
    origin = find_origin(init_from)
    if origin.is_file() and ranks.is_first_rank():  # which alone reads the weights
        check_checkpoint(origin)
    if origin.is_file() and (where := run_folder.describe_unfinished(origin)) is not None:
        say(f"init_from: {origin}: {where}")
    return run_folder.open_weights(origin)


def _need(config: StageConfig, checked: ResolvedStage, trained: int, most_images: int) -> MemoryEstimate:
    """What it takes of a GPU; `most_images` is the most that a pack of the plan has."""
    views = 1 + max(across * down for across, down in CANVASES) if config.data.anyres else 1
    views *= config.microbatch * most_images
    return estimate_memory(
        config, checked.decoder, checked.vision, ranks=ranks.world_size(), trained=trained, views=views
    )


class Lengths(NamedTuple):
    """What an epoch of the plan holds, so that epochs, batches and tokens can be told in steps."""

    epoch_steps: int
    epoch_tokens: float

    def steps(self, duration: str) -> float:
        """`2ep`, `500ba` or `1000000tok`, these by the plan's mean of tokens a batch."""
        match = re.fullmatch(r"([\d.]+)(ep|ba|tok)", duration)
        assert match is not None, "checked by the settings"
        of_one = {"ba": 1.0, "ep": self.epoch_steps, "tok": self.epoch_steps / self.epoch_tokens}
        return float(match[1]) * of_one[match[2]]


def stage_identity(config: StageConfig) -> dict[str, object]:
    """What must not change when a run is resumed: a folder of another stage is not this one's."""
    return {"name": config.name, "trainable": sorted(config.trainable)}


def say(text: str) -> None:
    if ranks.is_first_rank():
        print(text, flush=True)
