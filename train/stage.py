"""One stage of training, from its settings to the last checkpoint: a list of builds, then `fit`."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
from composer import Callback, Trainer
from composer.core import Time, TimeUnit

from unitoken.common import cli
from unitoken.common.errors import ConfigError, exit_status_of_signal
from unitoken.common.files import exclusive_lock
from unitoken.common.interruption import end_on_signals, remember_signals
from unitoken.streaming_data.plan.report import PlanReport
from unitoken.streaming_data.reading.loader import PackedLoader, build_loader
from unitoken.train.accounting.fitting import Fit, Fitting, choose, describe_fit, expected_speed, pack_work
from unitoken.train.accounting.flops import peak_flops, step_flops
from unitoken.train.callbacks.evaluation import Evaluation
from unitoken.train.callbacks.intervals import EpochLength
from unitoken.train.callbacks.loggers import build_loggers
from unitoken.train.callbacks.metrics import Metrics
from unitoken.train.callbacks.optimisation import Optimisation
from unitoken.train.callbacks.progress import build_progress
from unitoken.train.callbacks.samples import Samples
from unitoken.train.callbacks.saver import Interruption, Saver
from unitoken.train.callbacks.suite import SuiteScores
from unitoken.train.check import ResolvedData, ResolvedStage, uses_codec
from unitoken.train.check_tokenizers import load_checked_tokenizer
from unitoken.train.checkpoint.compatibility import check_finished, settings_of_all_machines
from unitoken.train.checkpoint.integrity import check_checkpoint
from unitoken.train.checkpoint.loading import fill_with_nan, load_weights
from unitoken.train.checkpoint.locations import (
    LOCK,
    find_origin,
    is_checkpoint,
    latest_checkpoint,
    step_of,
)
from unitoken.train.checkpoint.metadata import write_metadata
from unitoken.train.checkpoint.tensors import parameter_shapes
from unitoken.train.config import VOCABULARY_MATRICES, StageConfig
from unitoken.train.distributed import composer_trainer, ranks
from unitoken.train.distributed.precision import check_precision
from unitoken.train.evaluation.model import EvaluatedModel
from unitoken.train.evaluation.opened_suite import open_suite
from unitoken.train.export.model import export_at_end
from unitoken.train.generation.check_samples import SAMPLES_GUIDANCE, guidance_or_default
from unitoken.train.generation.engine import PromptCollate
from unitoken.train.generation.sampling import Sampling
from unitoken.train.model.float8 import use_float8
from unitoken.train.model.lora import add_adapters
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, count_trained, freeze
from unitoken.train.report.page import write_run_report
from unitoken.train.run import run_folder
from unitoken.train.run.bucket import bucket_of, local_origin, working_folder
from unitoken.train.run.initial_weights import find_initial_weights, growth_of


def run_stage(config: StageConfig, resolved: ResolvedStage) -> None:
    """Train a stage, or continue it.

    A checkpoint in `save.folder` takes precedence over `init_from` and all pretrained weights.

    Args:
        config: the settings.
        resolved: what `check_stage` returned for them.

    Raises:
        ConfigError: what `check_stage` can not find out without torch is wrong.
        SystemExit: a signal ended the run, after it saved.
    """
    check_precision(config)
    ranks.connect()
    # The first exchange between ranks: here they learn that `check_stage` failed on another machine.
    with ranks.share_errors():
        if config.codec is not None and uses_codec(config):
            load_checked_tokenizer(config.codec, resolved.vocabulary)
    ranks.check_same_settings(settings_of_all_machines(config))
    folder = working_folder(config)
    with contextlib.ExitStack() as stack:
        with ranks.share_errors():
            folder.mkdir(parents=True, exist_ok=True)
            if ranks.is_first_rank():
                at_work = f"save.folder: {folder}: another run is at work in it and holds {LOCK}"
                stack.enter_context(exclusive_lock(folder / LOCK, at_work))
                for line in run_folder.set_aside_damaged(folder):
                    cli.warn(line)
        _train(config, resolved)


def _train(config: StageConfig, resolved: ResolvedStage) -> None:
    folder = working_folder(config)
    with ranks.share_errors():
        evaluation_loader = build_evaluation_loader(resolved)
        loader = _build_loader(resolved.train, resolved)
        checkpoint = latest_checkpoint(folder)
    plan = loader.dataset.plan.report
    ranks.check_same("save.folder", "no checkpoint" if checkpoint is None else checkpoint.name)
    ranks.check_same("data", f"order {plan.order}")
    epoch = _epoch_length(plan, resolved.train)
    duration = Time.from_timestring(config.max_duration)
    total_steps = math.ceil(epoch.steps_in(duration))
    _report_plan(plan, resolved)

    network, trained = _build_network(config, resolved)
    fitting = _fitting(config, resolved, network, trained, loader)
    fit = choose(fitting, composer_trainer.gpu_bytes())
    config = fit.settings_in(config)  # from here on without `auto`, in stage.yaml, too
    network.set_recompute(fit.recompute)
    if checkpoint is None:
        _load_initial_weights(network, config, resolved)
    elif _is_finished(network, config, checkpoint, total_steps):
        _report(f"{config.name}: finished, {checkpoint} is its last checkpoint")
        _export(config, resolved)
        return
    else:
        _allocate_weights(network, config, checkpoint)
    _report_size(config, resolved, network, len(trained), total_steps)
    _report_fit(fitting, fit)

    callbacks = _build_callbacks(config, resolved, epoch, total_steps, trained, evaluation_loader)
    trainer = composer_trainer.build_trainer(
        config,
        network,
        build_optimizer(network, config.optimizer, resolved.compat, resolved.trained_rows),
        loader,
        callbacks.in_order(),
        build_loggers(config.log, folder, resumes=checkpoint is not None),
        checkpoint,
        # Composer counts tokens as they come, and would end between two global batches of the plan.
        f"{total_steps}ba" if duration.unit == TimeUnit.TOKEN else config.max_duration,
    )
    # Not earlier: if the checkpoint was refused, the folder and its description belong to another stage.
    if ranks.is_first_rank():
        write_metadata(folder, config, resolved.sizes, resolved.vocabulary, resolved.pictures)
    _fit(trainer, fit)
    _finish(config, resolved, callbacks)


def _report(text: str) -> None:
    if ranks.is_first_rank():
        cli.report(text)


def _build_loader(data: ResolvedData, resolved: ResolvedStage) -> PackedLoader:
    return build_loader(
        data.config,
        views=resolved.views,
        vocabulary=resolved.vocabulary,
        batch_packs=data.config.global_batch // ranks.world_size(),
        compat=resolved.compat,
        sources=data.sources,
    )


def build_evaluation_loader(resolved: ResolvedStage) -> PackedLoader | None:
    """Build this rank's loader of the data to evaluate on; None without `eval`. Raises ConfigError."""
    if resolved.evaluation is None:
        return None
    try:
        return _build_loader(resolved.evaluation, resolved)
    except ConfigError as error:
        raise ConfigError(f"eval: {error}") from None


def _epoch_length(plan: PlanReport, data: ResolvedData) -> EpochLength:
    tokens = plan.fill * plan.packs * data.config.packed_length
    return EpochLength(steps=plan.packs // data.config.global_batch, tokens=tokens)


def _report_plan(plan: PlanReport, resolved: ResolvedStage) -> None:
    if ranks.is_first_rank():
        cli.report(plan.table())
        for warning in [*resolved.warnings, *plan.warnings()]:
            cli.warn(warning)


def _build_network(config: StageConfig, resolved: ResolvedStage) -> tuple[UniToken, list[str]]:
    """Build the model without memory; return it with the names of its trained parameters."""
    network = build_model(
        resolved.sizes.decoder,
        resolved.sizes.vision,
        config.model,
        image_ids=resolved.vocabulary.image_ids,
    )
    add_adapters(network.model.layers, config.model.lora)
    if config.model.float8:
        use_float8(network.model.layers)
    trained = freeze(network, config.trainable)
    # Only to check the names of `lr_scales` before weights are loaded; the real one needs parameters with
    # memory.
    build_optimizer(network, config.optimizer, resolved.compat, resolved.trained_rows)
    if config.model.compile:
        network.compile_layers()
    return network, trained


def _load_initial_weights(network: UniToken, config: StageConfig, resolved: ResolvedStage) -> None:
    """Load the weights of a new run on the first rank; the other ranks get their shards from it."""
    with ranks.share_errors():
        if config.init_from is not None:  # a URL's checkpoint was fetched by the check
            _check_init_from(find_origin(local_origin(config.init_from, config.data.cache_folder)))
        growth = growth_of(config, resolved.vocabulary, resolved.new_rows)
        parts = find_initial_weights(network, config, growth)
        if ranks.is_first_rank():
            cli.report("\n".join(load_weights(network, parts, config.seed, growth)))


def _check_init_from(origin: Path) -> None:
    """Check the files of a checkpoint to start from; report if its stage is unfinished."""
    if not is_checkpoint(origin):
        return
    if ranks.is_first_rank():  # the only one that reads the weights
        check_checkpoint(origin)
    unfinished = run_folder.describe_unfinished(origin)
    if unfinished is not None:
        _report(f"init_from: {origin}: {unfinished}")


def _is_finished(network: UniToken, config: StageConfig, checkpoint: Path, total_steps: int) -> bool:
    """Return whether a checkpoint is the last of the stage.

    Raises:
        ConfigError: the checkpoint is of another stage, or the finished run had other settings.
    """
    with ranks.share_errors():
        run_folder.check_resumable(checkpoint, parameter_shapes(network), _stage_identity(config))
    if step_of(checkpoint) < total_steps:
        return False
    check_finished(working_folder(config), config)
    return True


def _allocate_weights(network: UniToken, config: StageConfig, checkpoint: Path) -> None:
    """Give the model memory, which is filled from the checkpoint.

    Each rank reads its rows of a sharded checkpoint after the model is sharded: until then nobody writes to
    this memory, so that it is none of the machine's. The first rank reads a whole-file checkpoint.
    """
    _report(f"{config.name}: goes on from {checkpoint}")
    if checkpoint.is_dir():
        network.to_empty(device="cpu")
    elif ranks.is_first_rank():
        fill_with_nan(network)


def _report_size(
    config: StageConfig,
    resolved: ResolvedStage,
    network: UniToken,
    tensors: int,
    total_steps: int,
) -> None:
    """Print the number of trained parameters."""
    parameters = count_trained(network)
    rows, sizes = resolved.trained_rows, resolved.sizes.decoder
    # Matrices of which only some rows train have gradients and moments as a whole.
    still = 0 if rows is None else (sizes.vocab_size - (rows.end - rows.first)) * sizes.hidden_size
    matrices = sum(name in VOCABULARY_MATRICES for name, _ in network.named_parameters())
    where = f"{total_steps} steps on {ranks.world_size()} rank(s), {composer_trainer.describe_devices()}"
    _report(
        f"{config.name}: trains {parameters - matrices * still:,} parameters in {tensors} tensors for {where}"
    )


def _fitting(
    config: StageConfig, resolved: ResolvedStage, network: UniToken, trained: list[str], loader: PackedLoader
) -> Fitting:
    return Fitting(
        config,
        resolved.sizes.decoder,
        resolved.sizes.vision,
        trained,
        count_trained(network),
        ranks.world_size(),
        pack_work(loader.dataset.plan, config.data),
    )


def _report_fit(fitting: Fitting, fit: Fit) -> None:
    """Print what `auto` chose, and on a GPU the estimated memory and the expected speed."""
    config = fitting.config
    if "auto" in (config.activation_checkpointing, config.microbatch):
        _report(f"{config.name}: auto chose {describe_fit(fit)}")
    if composer_trainer.has_gpu():
        _report(f"{config.name}: needs {fit.memory.summary()}")
    peak = _peak_flops(config.precision)
    if peak is not None:
        tokens, mfu = expected_speed(fit, fitting.work, peak, config.model.compile)
        _report(f"{config.name}: about {tokens:,.0f} tokens/s a GPU expected, MFU {mfu:.0%} (computed)")


def _stage_identity(config: StageConfig) -> dict[str, object]:
    """Return the settings that must be the same when a run is resumed: a folder belongs to one stage."""
    lora = config.model.lora
    return {
        "name": config.name,
        "trainable": sorted(config.trainable),
        # Nothing else in a checkpoint says by what its adapters are multiplied.
        "lora": None if lora is None else lora.model_dump(mode="json"),
    }


class _Callbacks(NamedTuple):
    """The callbacks of a stage, in the order in which Composer calls them at each event.

    Optimisation comes before Saver, so that a run that gives up after skipped steps does not save them.
    Interruption comes after Saver, and saves only a step that Saver did not save.
    Metrics comes after both: the clock of a step starts when the step before is saved.
    Evaluation comes after Metrics, then Samples and SuiteScores: the line of a step precedes that of
    its evaluation in metrics.jsonl, and none of them takes part in the step's time.
    """

    optimisation: Optimisation
    saver: Saver
    interruption: Interruption
    metrics: Metrics
    evaluation: Evaluation | None
    samples: Samples | None
    suite: SuiteScores | None

    def in_order(self) -> list[Callback]:
        return [callback for callback in self if callback is not None]


def _build_callbacks(
    config: StageConfig,
    resolved: ResolvedStage,
    epoch: EpochLength,
    total_steps: int,
    trained: list[str],
    evaluation_loader: PackedLoader | None,
) -> _Callbacks:
    folder, log = working_folder(config), config.log
    optimisation = Optimisation(config.optimizer, epoch, total_steps, by_packs=resolved.compat)
    save_every = epoch.steps_between(config.save.interval)
    saver = Saver(config, save_every, _stage_identity(config), total_steps, optimisation)
    metrics = Metrics(
        folder,
        config.data,
        optimisation,
        build_progress(config.name, total_steps, log.every, log.progress),
        every=log.every,
        total_steps=total_steps,
        flops=step_flops(resolved.sizes.decoder, resolved.sizes.vision, trained),
        peak_flops=_peak_flops(config.precision),
    )
    evaluation = None
    if config.eval is not None and evaluation_loader is not None:
        evaluation = Evaluation(
            evaluation_loader,
            metrics,
            every=epoch.steps_between(config.eval.interval),
            batches=config.eval.batches,
            microbatch=config.microbatch_packs,
            has_vision=resolved.sizes.vision is not None,
        )
    interruption = Interruption(optimisation, saver)
    samples = _build_samples(config, resolved, epoch)
    suite = _build_suite(config, resolved, epoch, metrics)
    return _Callbacks(optimisation, saver, interruption, metrics, evaluation, samples, suite)


def _peak_flops(precision: str) -> float | None:
    """Return the peak FLOP/s of this rank's GPU; None without one, and where they are unknown."""
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    return peak_flops(torch.cuda.get_device_name())


def _build_samples(config: StageConfig, resolved: ResolvedStage, epoch: EpochLength) -> Samples | None:
    if config.samples is None:
        return None
    assert config.codec is not None, "check_stage"
    guidance_trained = config.data.null_prompt_fraction > 0
    guidance = guidance_or_default(config.samples.guidance, SAMPLES_GUIDANCE, guidance_trained)
    return Samples(
        config.samples,
        config.codec,
        vocabulary=resolved.vocabulary,
        pictures=resolved.pictures,
        collate=PromptCollate(resolved.views, config.data.continuous, resolved.compat),
        sampling=Sampling(
            config.samples.temperature, top_k_image=config.samples.top_k, guidance=guidance, seed=config.seed
        ),
        folder=working_folder(config),
        every=epoch.steps_between(config.samples.interval),
    )


def _build_suite(
    config: StageConfig, resolved: ResolvedStage, epoch: EpochLength, metrics: Metrics
) -> SuiteScores | None:
    if config.suite is None:
        return None

    def no_network() -> UniToken:
        raise AssertionError("each evaluation gives the model its network")

    model = EvaluatedModel(
        config=config,
        vocabulary=resolved.vocabulary,
        pictures=resolved.pictures,
        views=resolved.views,
        load_network=no_network,
        device="cpu",
        checkpoint={},
        broadcast=ranks.broadcast_from_first_rank,
    )
    return SuiteScores(
        open_suite(Path(config.suite.file), config.codec),
        model,
        metrics,
        folder=working_folder(config),
        every=epoch.steps_between(config.suite.interval),
    )


def _fit(trainer: Trainer, fit: Fit) -> None:
    """Train. Raises MemoryError where a step needs more memory than there is."""
    remember_signals()
    try:
        trainer.fit()
    except BaseException as error:
        # Closes files and loggers. Trainer.close would wait for all ranks, which wait for this one's shards.
        trainer.engine.close()
        if _is_out_of_memory(error):
            raise MemoryError(
                f"out of memory with {describe_fit(fit)}: set microbatch=1 activation_checkpointing=full, or "
                "both to auto, or take more ranks; `unitoken check` shows what a stage needs"
            ) from None
        raise
    trainer.close()


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether a tensor found no memory: on a CPU torch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _finish(config: StageConfig, resolved: ResolvedStage, callbacks: _Callbacks) -> None:
    """Report how the run ended, and export the model. Raises SystemExit after a signal."""
    folder, signal = working_folder(config), callbacks.interruption.signal
    bucket = bucket_of(config)
    if ranks.is_first_rank():
        write_run_report(folder)
        if bucket is not None:
            bucket.send_small_files()  # what was written after the last checkpoint
    if signal:
        saved_at = callbacks.saver.saved_at
        _report(f"{config.name}: interrupted at step {saved_at}, saved; the same command goes on")
        raise SystemExit(exit_status_of_signal(signal))
    _report(
        f"{config.name}: finished, saved in {folder}; next: init_from={folder} in another stage, or "
        f'unitoken generate {folder} --prompt "..." --out FOLDER'
    )
    end_on_signals("interrupted after the last step, which is saved; the same command goes on")
    _export(config, resolved)


def _export(config: StageConfig, resolved: ResolvedStage) -> None:
    if ranks.is_first_rank():
        bucket, saved = bucket_of(config), latest_checkpoint(working_folder(config))
        if bucket is not None and saved is not None and config.save.export is not None:
            bucket.fetch_checkpoint(saved.name)  # the files of the ranks of other machines
        export_at_end(config, resolved.train.manifests)
