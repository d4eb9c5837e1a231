"""When a checkpoint is saved: at the interval, at the end, and after an interruption."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State

from unitoken.storage.store import store_error
from unitoken.train.callbacks.optimisation import Optimisation
from unitoken.train.checkpoint import run_folder
from unitoken.train.config import SaveConfig
from unitoken.train.distributed import composer_trainer, ranks


def _ends_epoch(state: State) -> bool:
    ends: bool = state.timestamp.batch_in_epoch.value == state.dataloader_len.value
    return ends


class Saver(Callback):  # type: ignore[misc]
    """Saves at the interval and at the end. `stage` is kept in the checkpoints, and compared when one is resumed from.

    They also say how many steps the stage is to have, for who begins with what is not finished. Each checkpoint gets an id,
    as two runs save a step of the same number and an export must say of which it is.
    """

    def __init__(self, config: SaveConfig, stage: dict[str, Any], total_steps: int) -> None:
        self.folder, self.keep, self.stage, self.total_steps = (
            Path(config.folder),
            config.keep,
            stage,
            total_steps,
        )
        self.number, self.unit = int(config.interval[:-2]), config.interval[-2:]
        self.saved_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {**self.stage, "total_steps": self.total_steps, "id": uuid.uuid4().hex}

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.saved_at = state.timestamp.batch.value
        if ranks.is_first_rank():
            run_folder.remove_partial_files(self.folder)
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
        written = run_folder.temporary_path(self.folder, step)
        with ranks.share_errors():
            try:
                composer_trainer.write_checkpoint(state, written)
                if ranks.is_first_rank():
                    run_folder.publish_checkpoint(
                        written, run_folder.checkpoint_path(self.folder, step), self.keep
                    )
            except OSError as error:  # a full disk: what is half written must not keep it full
                written.unlink(missing_ok=True)
                raise store_error(
                    f"step {step} could not be saved: {error.strerror or error}", error
                ) from None


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
