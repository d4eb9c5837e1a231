"""Where metrics go besides the run's folder: TensorBoard, and Composer's own loggers for Weights & Biases and MLflow.

Each gets what our callbacks log (`train/...`, `eval/...`), at the run's step; Composer's own counters, logged every batch,
are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from composer import Logger, State
from composer.loggers import LoggerDestination, MLFlowLogger, WandBLogger

from unitoken.train.config import StageConfig
from unitoken.train.distributed import ranks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OURS = ("train/", "eval/")


class OursOnly:
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if ours := {name: value for name, value in metrics.items() if name.startswith(OURS)}:
            super().log_metrics(ours, step)  # type: ignore[misc]


class WandB(OursOnly, WandBLogger):  # type: ignore[misc]
    """Composer asks for wandb below 0.19, which fails beside protobuf 6 and later; its `init` fails with newer ones."""

    def init(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self._enabled:
            importlib.import_module("wandb").init(name=state.run_name, **self._init_kwargs)


class MLflow(OursOnly, MLFlowLogger):  # type: ignore[misc]
    pass


class TensorBoard(LoggerDestination):  # type: ignore[misc]
    """Event files in one folder. What a killed run wrote after the step that is resumed from is hidden.

    Not Composer's: that one keeps such points beside their repetition, and begins a new file at each flush.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None  # of the first rank

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if ranks.is_first_rank():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=state.timestamp.batch.value + 1)  # type: ignore[no-untyped-call]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.writer is not None:
            for name, value in metrics.items():
                if name.startswith(OURS):
                    self.writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
            self.writer.flush()  # type: ignore[no-untyped-call]

    def log_images(
        self,
        images: Any,
        name: str = "Images",
        channels_last: bool = False,
        step: int | None = None,
        masks: Any = None,  # noqa: ARG002 - these two are for Weights & Biases
        mask_class_labels: Any = None,  # noqa: ARG002
        use_table: bool = True,  # noqa: ARG002
    ) -> None:
        """One image (3, H, W), or several that are shown as one; (H, W, 3) with `channels_last`; uint8, or 0.0 to 1.0."""
        if self.writer is not None:
            pixels = (
                np.stack([np.asarray(image) for image in images])
                if isinstance(images, Sequence)
                else np.asarray(images)
            )
            add, form = (self.writer.add_images, "N") if pixels.ndim == 4 else (self.writer.add_image, "")
            add(name, pixels, step, dataformats=form + ("HWC" if channels_last else "CHW"))  # type: ignore[no-untyped-call]
            self.writer.flush()  # type: ignore[no-untyped-call]

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """A table as text in Markdown."""
        if self.writer is not None:
            cells = [
                [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [columns, *rows]
            ]
            text = "\n".join(
                f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(columns), *cells[1:]]
            )
            self.writer.add_text(name, text, step)  # type: ignore[no-untyped-call]
            self.writer.flush()  # type: ignore[no-untyped-call]

    def close(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        if self.writer is not None:
            self.writer.close()  # type: ignore[no-untyped-call]
            self.writer = None


def build_loggers(config: StageConfig, resumes: bool) -> list[LoggerDestination]:
    """Those that `log` asks for; check.py has seen that they are installed."""
    folder = Path(config.save.folder)
    loggers: list[LoggerDestination] = []
    if config.log.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard"))
    if config.log.wandb:
        # It keeps the run's id in its folder and goes on with a run that did not end. The configuration may change: a run may
        # go on with another number of ranks, which Composer logs.
        loggers.append(
            WandB(
                config.log.wandb, init_kwargs={"dir": str(folder), "resume": "auto", "allow_val_change": True}
            )
        )
    if config.log.mlflow:
        # Found again by its name, so only where this is the same run: another may have been called so before.
        loggers.append(MLflow(config.log.mlflow, resume=resumes, log_system_metrics=False))
    return loggers
