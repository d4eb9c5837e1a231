"""Around each optimizer step: learning rate, gradient clipping, and skipping of steps that are not finite."""

from __future__ import annotations

from typing import Any

import torch
from composer import Callback, Logger, State

from unitoken.train.accounting.step_sums import StepResult, StepSums
from unitoken.train.callbacks.intervals import EpochLength
from unitoken.train.config import OptimizerConfig
from unitoken.train.distributed import composer_trainer
from unitoken.train.optim import decay_new_rows, keep_old_rows, learning_rate, set_learning_rate


class Optimisation(Callback):  # type: ignore[misc]
    """Sets the learning rate, which depends on the step alone, measures the loss, and clips the gradients.

    A step whose loss or gradient is not finite is skipped, on all ranks, as they see the same sums: without
    gradients AdamW changes neither weights nor moments, and does not decay weights. The schedule goes on.

    Args:
        config: learning rate, schedule, clipping and the limit of skipped steps.
        epoch: the length of an epoch, for the warmup and the schedule.
        total_steps: steps of the stage.
        by_packs: how the loss is averaged over microbatches, see `StepSums`.
    """

    def __init__(
        self, config: OptimizerConfig, epoch: EpochLength, total_steps: int, by_packs: bool = False
    ) -> None:
        self.config, self.epoch_steps = config, epoch.steps
        self.warmup_epochs = epoch.steps_of_warmup(config.warmup) / epoch.steps
        self.epochs = total_steps / epoch.steps
        self.rate = 0.0
        self.measures = StepSums(by_packs)
        self.measured: StepResult  # of the last step
        self.skipped = self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def batch_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Set the learning rate of the step."""
        epoch = state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / self.epoch_steps
        self.rate = learning_rate(epoch, self.config, self.warmup_epochs, self.epochs)
        set_learning_rate(state.optimizers[0], self.rate)

    def after_loss(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Measure a microbatch."""
        self.measures.add(state.outputs, state.batch)

    def after_train_batch(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Clip the gradients, or drop them if loss or norm is not finite."""
        parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        keep_old_rows(state.optimizers[0])
        norm = composer_trainer.gradient_norm(parameters)
        self.measured = self.measures.take(norm)
        if self.measured.finite:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm, foreach=True)
            decay_new_rows(state.optimizers[0])
            self.in_a_row = 0
        else:
            state.optimizers[0].zero_grad(set_to_none=True)
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """End the run with FloatingPointError after too many skipped steps in a row."""
        if self.in_a_row > self.config.max_skipped:
            step, loss, norm = state.timestamp.batch.value, self.measured.loss, self.measured.norm
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} at step {step}: the last {self.in_a_row} steps "
                f"were not finite and skipped, optimizer.max_skipped is {self.config.max_skipped}; "
                f"the weights are those after step {step - self.in_a_row}"
            )
