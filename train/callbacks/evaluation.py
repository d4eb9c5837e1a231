"""The loss by kind on samples that are not trained on, while training.

The same whole global batches each time and for any number of ranks, every token weighing the same. Training does not notice:
nothing is drawn from its random state, and its data, its clock and its counts stay where they are.
"""

from __future__ import annotations

import itertools
import time

import torch
from composer import Callback, Logger, State
from composer.core.precision import get_precision_context
from torch import Tensor

from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading.collate import Batch, split_batch
from unitoken.streaming_data.reading.loader import PackedLoader, build_loader
from unitoken.train.accounting.step_sums import StepResult, StepSums
from unitoken.train.callbacks.metrics import Metrics, losses, named
from unitoken.train.check import ResolvedStage
from unitoken.train.config import StageConfig
from unitoken.train.distributed import ranks


def evaluation_loader(
    config: StageConfig, checked: ResolvedStage, views: Views | None
) -> PackedLoader | None:
    """This rank's share of what is evaluated on; None where nothing is. Raises ConfigError."""
    if checked.evaluation is None:
        return None
    try:
        return build_loader(
            checked.evaluation,
            views=views,
            vocabulary=checked.vocabulary,
            batch_packs=config.data.global_batch // ranks.world_size(),
            compat=config.compat == "unitoken",
        )
    except ConfigError as error:
        raise ConfigError(f"eval: {error}") from None


class Evaluation(Callback):  # type: ignore[misc]
    """Evaluates at the interval and after the last step. Comes after `Metrics` in the list of callbacks."""

    def __init__(self, config: StageConfig, loader: PackedLoader, metrics: Metrics, epoch_steps: int) -> None:
        assert config.eval is not None
        number, unit = int(config.eval.interval[:-2]), config.eval.interval[-2:]
        self.every = number * (epoch_steps if unit == "ep" else 1)
        self.loader, self.metrics, self.microbatch, self.limit = (
            loader,
            metrics,
            config.microbatch,
            config.eval.batches,
        )
        self.looks = config.model.vision is not None
        self.first_epoch = loader.dataset.state_dict(0, from_beginning=True)

    @property
    def summary(self) -> str:
        report = self.loader.dataset.plan.report
        batches = report.packs // self.loader.dataset.recipe.global_batch
        seen = f"{self.limit} of them" if self.limit and self.limit < batches else "all of them"
        left = f"{report.dropped_packs} packs ({report.dropped_samples} samples) are left out, which fill no global batch"
        return f"evaluation every {self.every} steps: {batches} global batches held out, {seen} each time; {left}"

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.metrics.say(self.summary)

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if step % self.every and step != self.metrics.total_steps:
            return
        begun = time.monotonic()
        measured = self.measure(state)
        found = {**losses(measured), "targets": measured.targets}
        self.metrics.write({"step": step, "eval": found})
        logger.log_metrics(named(found, "eval"))
        words = "  ".join(
            f"{name} {value:.4f}" for name, value in losses(measured).items() if name.startswith("loss")
        )
        self.metrics.say(f"evaluation at step {step}: {words}  ({time.monotonic() - begun:.0f} s)")

    def measure(self, state: State) -> StepResult:
        measures = StepSums()
        self.loader.dataset.load_state_dict(self.first_epoch)  # the same packs each time
        state.model.eval()
        with torch.no_grad():
            for batch in itertools.islice(self.loader, self.limit):
                for part in split_batch(batch, self.microbatch):
                    part = state.device.batch_to_device(part)
                    if self.looks and not len(part["pixel_values"]):
                        part = with_a_view(part)
                    with get_precision_context(state.precision, state.precision_config):
                        outputs = state.model(part)
                    measures.add(outputs, part)
        state.model.train()
        return measures.take()


def with_a_view(batch: Batch) -> dict[str, Tensor]:
    """Under FSDP2 all ranks gather the tower at once: one that has no image looks at a black one, and uses nothing of it."""
    pixels = batch["pixel_values"]
    return {**batch, "pixel_values": pixels.new_zeros(1, *pixels.shape[1:])}
