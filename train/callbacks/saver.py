"""Saving of checkpoints: at an interval, at the end, and after an interruption.

A save stops training only while each rank copies what it holds to its host's memory. Then:

1. Each rank writes its file in the background, and reports with the sums of each step how far it is.
2. At the step at which all ranks report that they are ready, the first rank gets the hashes of their files,
   and writes the index in the background: the checkpoint is complete.
3. At the step at which it reports that it is ready, the save is over.

An error of any rank is raised on all ranks at that step. A save that is due before waits for the one before.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from composer import Callback, Logger, State

from unitoken.storage.store import store_error
from unitoken.train.accounting.step_sums import Readiness
from unitoken.train.callbacks.intervals import is_due
from unitoken.train.callbacks.optimisation import Optimisation
from unitoken.train.checkpoint.locations import step_of
from unitoken.train.checkpoint.sharded import HeldRows, RankPart, build_index, rank_file, write_pieces
from unitoken.train.config import StageConfig
from unitoken.train.distributed import ranks, sharded_state
from unitoken.train.run import run_folder
from unitoken.train.run.bucket import bucket_of, working_folder


def _ends_epoch(state: State) -> bool:
    ends: bool = state.timestamp.batch_in_epoch.value == state.dataloader_len.value
    return ends


class _Save(NamedTuple):
    """A save in the background.

    Attributes:
        checkpoint: its folder.
        state: all state but the tensors, encoded.
        writes_index: whether the first rank writes the index now, and no longer all ranks their files.
        task: what this rank does now.
    """

    checkpoint: Path
    state: dict[str, Any]
    writes_index: bool
    task: Future[Any]


def _in_background(action: Callable[[], Any]) -> Future[Any]:
    """Start an action in a thread that does not keep the process from ending."""
    task: Future[Any] = Future()

    def run() -> None:
        try:
            task.set_result(action())
        except BaseException as error:
            task.set_exception(error)

    threading.Thread(target=run, name="save", daemon=True).start()
    return task


class Saver(Callback):  # type: ignore[misc]
    """Saves checkpoints at an interval and at the end.

    Each checkpoint gets an id, as two runs may save a step of the same number, and an export names the
    checkpoint it was made from. It also keeps the number of steps of the stage, so that init_from can warn
    about an unfinished stage.

    Args:
        config: the stage; it says where to save, and how many checkpoints to keep.
        every: steps between two checkpoints.
        stage: the stage's identity; kept in checkpoints, and compared when a run resumes from one.
        total_steps: steps of the stage.
        optimisation: measures the steps, whose sums also carry how far the ranks' writing is.
    """

    def __init__(
        self,
        config: StageConfig,
        every: int,
        stage: dict[str, Any],
        total_steps: int,
        optimisation: Optimisation,
    ) -> None:
        self.folder, self.keep = working_folder(config), config.save.keep
        self._bucket = bucket_of(config)
        self.every, self.stage, self.total_steps = every, stage, total_steps
        self.saved_at = -1
        self._optimisation = optimisation
        self._copies = sharded_state.HostCopies()
        self._save: _Save | None = None
        self._sent: Path | None = None  # this rank's file of the checkpoint before, which is in the bucket

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep: the stage's identity, and the checkpoint's own id."""
        return {**self.stage, "total_steps": self.total_steps, "id": uuid.uuid4().hex}

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Remove the incomplete files of a killed run."""
        step = self.saved_at = state.timestamp.batch.value
        with ranks.share_errors():
            if ranks.is_first_rank():
                run_folder.remove_partial_files(self.folder)
                if self._bucket is not None:
                    resumed = run_folder.checkpoint_path(self.folder, step).name if step else None
                    self._bucket.remove_unfinished(resumed)

    def batch_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Report how far this rank is."""
        readiness = Readiness.WORKING
        if self._save is not None and self._save.task.done():
            readiness = Readiness.FAILED if self._save.task.exception() else Readiness.READY
        self._optimisation.measures.readiness = readiness

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Complete what was written, and save if it is due.

        The last step of an epoch is saved in `epoch_checkpoint`; else a resumed run would begin with the
        empty rest of it.
        """
        if self._save is not None and self._optimisation.measured.background_over:
            self._advance(self._save)
        if self._is_due(state) and not _ends_epoch(state):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Save if it is due."""
        if self._is_due(state):
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Save the last step, and wait until it is complete."""
        self.save(state)
        self.finish()

    def close(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Complete the checkpoint in the background if another error ends the run.

        Of several ranks some may have ended, so then none waits for the others: its own file is complete
        before the process ends, and the checkpoint if all files were.
        """
        if self._save is None:
            return
        save, self._save = self._save, None
        with contextlib.suppress(Exception):  # the error that ends the run is reported
            part = save.task.result()
            if not save.writes_index and ranks.world_size() == 1:
                self._publish(save, [part])

    def _is_due(self, state: State) -> bool:
        return is_due(state.timestamp.batch.value, self.every)

    def save(self, state: State) -> None:
        """Start to save a checkpoint, unless this step is saved already.

        Raises:
            StoreError: the checkpoint before can not be written, on all ranks.
        """
        step = state.timestamp.batch.value
        if step == self.saved_at:
            return
        self.finish()
        self.saved_at = step
        checkpoint = run_folder.checkpoint_path(self.folder, step)
        path = rank_file(checkpoint, ranks.rank(), ranks.world_size())
        loop_state = sharded_state.loop_state(state)
        pieces = self._copies.take(sharded_state.own_pieces(state))
        task = _in_background(lambda: self._write(path, pieces))
        self._save = _Save(checkpoint, loop_state, writes_index=False, task=task)

    def _write(self, path: Path, pieces: list[HeldRows]) -> RankPart:
        """Write this rank's file, and send it to the bucket; the one before is no longer needed here."""
        part = write_pieces(path, pieces)
        if self._bucket is not None:
            self._bucket.send(path)
            if self._sent is not None:
                self._sent.unlink(missing_ok=True)
            self._sent = path
        return part

    def finish(self) -> None:
        """Wait until the save in the background is complete. All ranks have to call it."""
        while self._save is not None:
            self._advance(self._save)

    def _advance(self, save: _Save) -> None:
        """Wait until all ranks are ready, and begin what comes next.

        Raises:
            StoreError: a rank could not write, on all ranks.
        """
        self._save = None
        try:
            with ranks.share_errors():
                result = _result(save)
        except Exception:
            if ranks.is_first_rank():  # or incomplete files would keep a full disk full
                run_folder.remove_partial_files(self.folder)
            raise
        if save.writes_index:
            return
        parts = ranks.gather(result)
        publish = (lambda: self._publish(save, parts)) if ranks.is_first_rank() else (lambda: None)
        self._save = save._replace(writes_index=True, task=_in_background(publish))

    def _publish(self, save: _Save, parts: list[RankPart]) -> None:
        keep = self.keep if self._bucket is None else 1  # the bucket has the others
        run_folder.publish_checkpoint(save.checkpoint, build_index(parts, save.state), keep)
        if self._bucket is not None:
            self._bucket.publish(save.checkpoint, self.keep)


def _result(save: _Save) -> Any:
    """Wait for a task. Raises StoreError with the step if a file could not be written."""
    try:
        return save.task.result()
    except OSError as error:
        step = step_of(save.checkpoint)
        raise store_error(f"step {step} could not be saved: {error.strerror or error}", error) from None


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
