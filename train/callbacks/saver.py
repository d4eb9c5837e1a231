"""Saving of checkpoints: at an interval, at the end, and after an interruption."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State

from unitoken.storage.store import store_error
from unitoken.train.callbacks.intervals import is_due
from unitoken.train.callbacks.optimisation import Optimisation
from unitoken.train.checkpoint import run_folder
from unitoken.train.config import SaveConfig
from unitoken.train.distributed import composer_trainer, ranks


def _ends_epoch(state: State) -> bool:
    ends: bool = state.timestamp.batch_in_epoch.value == state.dataloader_len.value
    return ends


class Saver(Callback):  # type: ignore[misc]
    """Saves checkpoints at an interval and at the end.

    Each checkpoint gets an id, as two runs may save a step of the same number, and an export names the
    checkpoint it was made from. It also keeps the number of steps of the stage, so that init_from can warn
    about an unfinished stage.

    Args:
        config: where to save, and how many checkpoints to keep.
        every: steps between two checkpoints.
        stage: the stage's identity; kept in checkpoints, and compared when a run resumes from one.
        total_steps: steps of the stage.
    """

    def __init__(self, config: SaveConfig, every: int, stage: dict[str, Any], total_steps: int) -> None:
        self.folder, self.keep = Path(config.folder), config.keep
        self.every, self.stage, self.total_steps = every, stage, total_steps
        self.saved_at = -1

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep: the stage's identity, and the checkpoint's own id."""
        return {**self.stage, "total_steps": self.total_steps, "id": uuid.uuid4().hex}

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Remove the incomplete files of a killed run."""
        self.saved_at = state.timestamp.batch.value
        if ranks.is_first_rank():
            run_folder.remove_partial_files(self.folder)
        ranks.barrier()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Save if it is due.

        The last step of an epoch is saved in `epoch_checkpoint`; else a resumed run would begin with the
        empty rest of it.
        """
        if self._is_due(state) and not _ends_epoch(state):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Save if it is due."""
        if self._is_due(state):
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Save the last step."""
        self.save(state)

    def _is_due(self, state: State) -> bool:
        return is_due(state.timestamp.batch.value, self.every)

    def save(self, state: State) -> None:
        """Save a checkpoint, unless this step is saved already.

        Raises:
            StoreError: the checkpoint can not be written, on all ranks.
        """
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
            except OSError as error:
                written.unlink(missing_ok=True)  # or an incomplete file would keep a full disk full
                raise store_error(
                    f"step {step} could not be saved: {error.strerror or error}", error
                ) from None


class Interruption(Callback):  # type: ignore[misc]
    """Ends the run after SIGTERM or Ctrl-C on any rank: all ranks finish the same step, and it is saved."""

    def __init__(self, optimisation: Optimisation, saver: Saver) -> None:
        self._optimisation, self._saver = optimisation, saver
        self.signal = 0

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Save and stop after a signal; at the end of an epoch `epoch_checkpoint` saves, as in `Saver`."""
        self.signal = self._optimisation.measured.signal
        if self.signal:
            if not _ends_epoch(state):
                self._saver.save(state)
            state.stop_training()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Save after a signal in the last step of the epoch."""
        if self.signal:
            self._saver.save(state)
