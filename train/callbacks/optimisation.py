"""What happens around each step: learning rate, clipping, skipping, checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from composer import Callback, Logger, State

from unitoken.train.accounting.step_sums import StepResult, StepSums
from unitoken.train.config import OptimizerConfig
from unitoken.train.distributed import composer_trainer
from unitoken.train.optim import learning_rate, set_learning_rate


class Optimisation(Callback):  # type: ignore[misc]
    """Sets the learning rate of each step, a function of how far the run is and nothing else; clips the gradients.

    A step whose loss or gradient is not finite is skipped, on all ranks since they see the same sums: without gradients AdamW
    leaves weights and moments as they are, the decay of weights included. The schedule goes on. Comes before `Saver` in the
    list of callbacks, so that a run that gives up does not save.

    Args:
        by_packs: how the loss is averaged over microbatches, see `StepSums`.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        warmup_steps: float,
        total_steps: float,
        epoch_steps: int,
        by_packs: bool = False,
    ) -> None:
        self.config, self.epoch_steps = config, epoch_steps
        self.warmup_epochs, self.epochs = warmup_steps / epoch_steps, total_steps / epoch_steps
        self.rate = 0.0
        self.measures = StepSums(by_packs)
        self.measured: StepResult  # of the last step
        self.skipped = self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def batch_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        epoch = state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / self.epoch_steps
        self.rate = learning_rate(epoch, self.config, self.warmup_epochs, self.epochs)
        set_learning_rate(state.optimizers[0], self.rate)

    def after_loss(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.measures.add(state.outputs, state.batch)

    def after_train_batch(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        norm = composer_trainer.gradient_norm(parameters)
        self.measured = self.measures.take(norm)
        if self.measured.finite:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm, foreach=True)
            self.in_a_row = 0
        else:
            state.optimizers[0].zero_grad(set_to_none=True)
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self.in_a_row > self.config.max_skipped:
            step, loss, norm = state.timestamp.batch.value, self.measured.loss, self.measured.norm
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} at step {step}: the last {self.in_a_row} steps were not finite and skipped, "
                f"optimizer.max_skipped is {self.config.max_skipped}; the weights are those after step "
                f"{step - self.in_a_row}"
            )
