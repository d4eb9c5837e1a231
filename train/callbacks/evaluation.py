"""The loss by kind on held-out samples, during training.

Each evaluation takes the same whole global batches, for any number of ranks, and every token has the same
weight. Training is not affected: its random state, data, clock and counts stay as they are.
"""

from __future__ import annotations

import itertools
import time

import torch
from composer import Callback, Logger, State
from composer.core.precision import get_precision_context
from torch import Tensor

from unitoken.streaming_data.reading.batch import Batch, split_batch, unpack
from unitoken.streaming_data.reading.loader import PackedLoader
from unitoken.train.accounting.step_sums import StepResult, StepSums
from unitoken.train.callbacks.intervals import is_due
from unitoken.train.callbacks.metrics import Metrics, logger_metrics, losses


class Evaluation(Callback):  # type: ignore[misc]
    """Evaluates at an interval and after the last step.

    Args:
        loader: this rank's batches of the data to evaluate on.
        metrics: writes the results.
        every: steps between two evaluations.
        batches: global batches per evaluation; None: all.
        microbatch: packs in one forward pass.
        has_vision: whether the model has a vision tower.
    """

    def __init__(
        self,
        loader: PackedLoader,
        metrics: Metrics,
        *,
        every: int,
        batches: int | None,
        microbatch: int,
        has_vision: bool,
    ) -> None:
        self.loader, self.metrics = loader, metrics
        self.every, self.batches, self.microbatch = every, batches, microbatch
        self.has_vision = has_vision
        self.first_epoch = loader.dataset.state_dict(0, from_beginning=True)

    @property
    def summary(self) -> str:
        """One line about the interval and the held-out batches."""
        report = self.loader.dataset.plan.report
        batches = report.packs // self.loader.dataset.recipe.global_batch
        used = f"{self.batches} of them" if self.batches and self.batches < batches else "all of them"
        return (
            f"evaluation every {self.every} steps: {batches} global batches held out, {used} each time; "
            f"{report.dropped_packs} packs ({report.dropped_samples} samples) are left out, "
            "which fill no global batch"
        )

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Print the summary."""
        self.metrics.print_line(self.summary)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Evaluate if it is due, then write, log and print the losses."""
        step = state.timestamp.batch.value
        if not is_due(step, self.every, self.metrics.total_steps):
            return
        start = time.monotonic()
        measured = self.measure(state)
        results = {**losses(measured), "targets": measured.targets}
        self.metrics.write({"step": step, "eval": results})
        logger.log_metrics(logger_metrics(results, "eval"))
        shown = "  ".join(
            f"{name} {value:.4f}" for name, value in losses(measured).items() if name.startswith("loss")
        )
        self.metrics.print_line(f"evaluation at step {step}: {shown}  ({time.monotonic() - start:.0f} s)")

    def measure(self, state: State) -> StepResult:
        """Compute the losses on the held-out batches, over all ranks."""
        measures = StepSums()
        self.loader.dataset.load_state_dict(self.first_epoch)  # the same packs each time
        state.model.eval()
        with torch.no_grad():
            for batch in itertools.islice(self.loader, self.batches):
                for part in split_batch(batch, self.microbatch):
                    microbatch = unpack(state.device.batch_to_device(part))
                    if self.has_vision and not len(microbatch["pixel_values"]):
                        microbatch = with_unused_view(microbatch)
                    with get_precision_context(state.precision, state.precision_config):
                        outputs = state.model(microbatch)
                    measures.add(outputs, microbatch)
        state.model.train()
        return measures.take()


def with_unused_view(batch: Batch) -> dict[str, Tensor]:
    """Add one black view, whose features are used nowhere, to a batch without images.

    Under FSDP2 all ranks gather the vision tower together, so a rank without images must run it, too.
    """
    pixels = batch["pixel_values"]
    return {**batch, "pixel_values": pixels.new_zeros(1, *pixels.shape[1:])}
