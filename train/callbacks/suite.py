"""The scores on a suite of tasks, during training (`suite:` of a stage).

    save.folder/suite/step-00001000/result.json, TASK/replies.jsonl, ...   as `unitoken evaluate` writes them

The scores go to metrics.jsonl and to the loggers. Training is not affected.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from composer import Callback, Logger, State

from unitoken.train.callbacks.intervals import is_due
from unitoken.train.callbacks.metrics import Metrics, logger_metrics
from unitoken.train.distributed import composer_trainer, ranks
from unitoken.train.evaluation.model import EvaluatedModel
from unitoken.train.evaluation.opened_suite import OpenedSuite
from unitoken.train.evaluation.suite import PreparedTask, prepare_tasks, score_tasks, write_result

SUITE = "suite"


class SuiteScores(Callback):  # type: ignore[misc]
    """Evaluates on a suite; all ranks go through the sharded model together, and the first one scores.

    Args:
        opened: the suite.
        model: how the model is prompted; each evaluation gives it the network as it is then.
        metrics: writes the results.
        folder: the run's folder.
        every: steps between two evaluations.
    """

    def __init__(
        self, opened: OpenedSuite, model: EvaluatedModel, metrics: Metrics, *, folder: Path, every: int
    ) -> None:
        self._opened, self._model, self._metrics = opened, model, metrics
        self._folder, self._every = folder, every

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Load the tokenizers and check the prompts against the model."""
        with ranks.share_errors(), composer_trainer.evaluation_mode(state) as network:
            self._model.device = str(network.output_weight.device)
            prepare_tasks(self._opened, self._model, self._folder / SUITE)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Evaluate if it is due, then write, log and print the scores."""
        step = state.timestamp.batch.value
        if not is_due(step, self._every, self._metrics.total_steps):
            return
        start, out = time.monotonic(), self._folder / SUITE / f"step-{step:08d}"
        python_state, numpy_state = random.getstate(), np.random.get_state()
        with composer_trainer.evaluation_mode(state) as network, torch.no_grad():
            self._model.network = network
            self._model.checkpoint = {"path": str(self._folder.resolve()), "step": step, "sha256": None}
            tasks = prepare_tasks(self._opened, self._model, out)
            with ranks.share_errors():
                if ranks.is_first_rank():
                    # A run that goes on from an older checkpoint repeats steps.
                    shutil.rmtree(out, ignore_errors=True)
                    for task in tasks.values():
                        task.folder.begin()
            for task in tasks.values():
                _do_together(task)
            with ranks.share_errors():
                scores = self._score(out, tasks) if ranks.is_first_rank() else {}
            del self._model.network
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        flat = logger_metrics(scores, "")
        self._metrics.write({"step": step, SUITE: {name.removeprefix("/"): flat[name] for name in flat}})
        logger.log_metrics(logger_metrics(scores, SUITE))
        self._print(step, scores, time.monotonic() - start)

    def _score(self, out: Path, tasks: dict[str, PreparedTask]) -> dict[str, dict[str, float]]:
        scores = score_tasks(tasks, self._model.device)
        write_result(out, self._opened, self._model, tasks, scores)
        return {name: task.scores for name, task in scores.items()}

    def _print(self, step: int, scores: dict[str, dict[str, float]], seconds: float) -> None:
        shown = [f"{name} {next(iter(task.values())):.4f}" for name, task in scores.items() if task]
        self._metrics.print_line(f"suite at step {step}: {'  '.join(shown)}  ({seconds:.0f} s)")


def _do_together(task: PreparedTask) -> None:
    """Do all units of a task on all ranks; the first one writes them."""
    for unit in range(task.work.units):
        lines, pictures = task.work.do(unit)
        with ranks.share_errors():
            if ranks.is_first_rank():
                task.folder.add(unit, lines, pictures)
