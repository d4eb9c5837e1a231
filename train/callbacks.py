"""What happens around each step: learning rate, clipping, skipping, checkpoints."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State

from unitoken.storage.store import store_error
from unitoken.train import checkpoints, parallel, ranks
from unitoken.train.config import OptimizerConfig, SaveConfig
from unitoken.train.measures import Measured, Measures
from unitoken.train.optim import learning_rate, set_learning_rate


class Optimisation(Callback):  # type: ignore[misc]
    """Sets the learning rate of each step, a function of how far the run is and nothing else; clips the gradients.

    A step whose loss or gradient is not finite is skipped, on all ranks since they see the same sums: without gradients AdamW
    leaves weights and moments as they are, the decay of weights included. The schedule goes on. Comes before `Saver` in the
    list of callbacks, so that a run that gives up does not save.

    Args:
        by_packs: how the loss is averaged over microbatches, see `Measures`.
    """

    def __init__(
        self, config: OptimizerConfig, warmup_steps: float, total_steps: float, epoch_steps: int, by_packs: bool = False
    ) -> None:
        self.config, self.epoch_steps = config, epoch_steps
        self.warmup_epochs, self.epochs = warmup_steps / epoch_steps, total_steps / epoch_steps
        self.rate = 0.0
        self.measures = Measures(by_packs)
        self.measured: Measured  # of the last step
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
        norm = parallel.gradient_norm(parameters)
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


def _ends_epoch(state: State) -> bool:
    ends: bool = state.timestamp.batch_in_epoch.value == state.dataloader_len.value
    return ends


class Saver(Callback):  # type: ignore[misc]
    """Saves at the interval and at the end. `stage` is kept in the checkpoints, and compared when one is resumed from.

    They also say how many steps the stage is to have, for who begins with what is not finished. Each checkpoint gets an id,
    as two runs save a step of the same number and an export must say of which it is.
    """

    def __init__(self, config: SaveConfig, stage: dict[str, Any], total_steps: int) -> None:
        self.folder, self.keep, self.stage, self.total_steps = Path(config.folder), config.keep, stage, total_steps
        self.number, self.unit = int(config.interval[:-2]), config.interval[-2:]
        self.saved_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {**self.stage, "total_steps": self.total_steps, "id": uuid.uuid4().hex}

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.saved_at = state.timestamp.batch.value
        if ranks.is_first_rank():
            checkpoints.clean_up(self.folder)
        ranks.barrier()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        # The last batch of an epoch is saved after the epoch's end, or the resumed run would begin with an empty rest of it.
        if self._due(state) and not _ends_epoch(state):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self._due(state) or (self.unit == "ep" and state.timestamp.epoch.value % self.number == 0):
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.save(state)

    def _due(self, state: State) -> bool:
        return self.unit == "ba" and state.timestamp.batch.value % self.number == 0

    def save(self, state: State) -> None:
        step = state.timestamp.batch.value
        if step == self.saved_at:
            return
        self.saved_at = step
        written = checkpoints.unpublished(self.folder, step)
        with ranks.together():
            try:
                parallel.write_checkpoint(state, written)
                if ranks.is_first_rank():
                    checkpoints.publish(written, checkpoints.path_of(self.folder, step), self.keep)
            except OSError as error:  # a full disk: what is half written must not keep it full
                written.unlink(missing_ok=True)
                raise store_error(f"step {step} could not be saved: {error.strerror or error}", error) from None


class Interruption(Callback):  # type: ignore[misc]
    """After SIGTERM or Ctrl-C on any rank: all finish the same step, save, and end. Comes after `Saver` in the callbacks."""

    def __init__(self, optimisation: Optimisation, saver: Saver) -> None:
        self._optimisation, self._saver = optimisation, saver
        self.signal = 0

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.signal = self._optimisation.measured.signal
        if self.signal:
            if not _ends_epoch(state):  # else after the epoch's end, as `Saver` does
                self._saver.save(state)
            state.stop_training()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self.signal:
            self._saver.save(state)
