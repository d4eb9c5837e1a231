"""What happens around each step: learning rate, clipping, the metrics file, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

import torch
from composer import Callback, Logger, State

from unitoken.streaming_data.files import write_aside
from unitoken.train import checkpoints, parallel
from unitoken.train.config import OptimizerConfig, SaveConfig
from unitoken.train.optim import learning_rate, set_learning_rate

METRICS = "metrics.jsonl"


class Optimisation(Callback):  # type: ignore[misc]
    """Sets the learning rate of each step, a function of how far the run is and nothing else; clips the gradients."""

    def __init__(self, config: OptimizerConfig, warmup_steps: float, total_steps: float, epoch_steps: int) -> None:
        self.config, self.epoch_steps = config, epoch_steps
        self.warmup_epochs, self.epochs = warmup_steps / epoch_steps, total_steps / epoch_steps
        self.rate = self.norm = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        epoch = state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / self.epoch_steps
        self.rate = learning_rate(epoch, self.config, self.warmup_epochs, self.epochs)
        set_learning_rate(state.optimizers[0], self.rate)

    def after_train_batch(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        norm = parallel.gradient_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        self.norm = norm.item()


class Metrics(Callback):  # type: ignore[misc]
    """Writes a line a step to `metrics.jsonl`, and one every `every` steps to the console. First rank only.

    A run that resumes at step s first drops the lines after s, so that no step is there twice.
    """

    def __init__(self, folder: Path, every: int, optimisation: Optimisation, batch_positions: int, total_steps: int) -> None:
        self.path, self.every, self.total_steps = folder / METRICS, every, total_steps
        self.optimisation = optimisation
        self.batch_positions = batch_positions  # tokens and padding in a global batch
        self.file: TextIO | None = None

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if parallel.is_first_rank():
            done = state.timestamp.batch.value
            kept = [line for line in read_metrics(self.path) if line["step"] <= done] if self.path.exists() else []
            write_aside(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def batch_end(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        loss = {name.removeprefix("loss/train/"): value for name, value in state.total_loss_dict.items()}
        step = state.timestamp.batch.value
        if not math.isfinite(loss["total"]):  # the same number on all ranks, so all of them stop
            raise FloatingPointError(f"the loss of step {step} is {loss['total']}; the last checkpoint is from before it")
        if self.file is None:
            return
        tokens = state.timestamp.token.value - state.previous_timestamp.token.value
        seconds = state.timestamp.batch_wct.total_seconds()
        line = {
            "step": step,
            "loss": loss["total"],
            "ce": loss["ce"],
            "z": loss["z"],
            "grad_norm": self.optimisation.norm,
            "lr": self.optimisation.rate,
            "tokens": tokens,
            "useful": tokens / self.batch_positions,  # the rest is padding
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if step % self.every == 0 or step == self.total_steps:
            print(
                f"step {step}/{self.total_steps}  loss {line['loss']:.4f}  grad {line['grad_norm']:.3f}  lr {line['lr']:.2e}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  {line['useful']:.0%} useful",
                flush=True,
            )

    def close(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self.file is not None:
            self.file.close()
            self.file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a killed run left half written is dropped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Saver(Callback):  # type: ignore[misc]
    """Saves at the interval and at the end. `stage` is kept in the checkpoints, and compared when one is resumed from."""

    def __init__(self, config: SaveConfig, stage: dict[str, Any]) -> None:
        self.folder, self.keep, self.stage = Path(config.folder), config.keep, stage
        self.number, self.unit = int(config.interval[:-2]), config.interval[-2:]
        self.saved_at = -1

    def state_dict(self) -> dict[str, Any]:
        return self.stage

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self.saved_at = state.timestamp.batch.value
        if parallel.is_first_rank():
            checkpoints.clean_up(self.folder)
        parallel.barrier()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        # The last batch of an epoch is saved after the epoch's end, or the resumed run would begin with an empty rest of it.
        if self._due(state) and state.timestamp.batch_in_epoch.value != state.dataloader_len.value:
            self._save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self._due(state) or (self.unit == "ep" and state.timestamp.epoch.value % self.number == 0):
            self._save(state)

    def fit_end(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        self._save(state)

    def _due(self, state: State) -> bool:
        return self.unit == "ba" and state.timestamp.batch.value % self.number == 0

    def _save(self, state: State) -> None:
        step = state.timestamp.batch.value
        if step == self.saved_at:
            return
        self.saved_at = step
        written = self.folder / f".aside-step-{step:08d}.pt"  # the same name on all ranks
        parallel.write_checkpoint(state, written)
        if parallel.is_first_rank():
            checkpoints.publish(written, checkpoints.path_of(self.folder, step), self.keep)
        parallel.barrier()
