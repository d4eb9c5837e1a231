"""Loggers of a run's metrics: TensorBoard, and Composer's own for Weights & Biases and MLflow.

They get the metrics of our callbacks (`train/...`, `eval/...`), at the run's step. Composer's own metrics,
which it logs every batch, are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from composer import Logger, State
from composer.loggers import LoggerDestination, MLFlowLogger, WandBLogger

from unitoken.train.config import LogConfig
from unitoken.train.distributed import ranks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OUR_PREFIXES = ("train/", "eval/")  # of the metrics that our callbacks log


class _OurMetricsOnly:
    """Mixin for a logger: drops Composer's own metrics."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = {name: value for name, value in metrics.items() if name.startswith(OUR_PREFIXES)}
        if ours:
            super().log_metrics(ours, step)  # type: ignore[misc]


class WandB(_OurMetricsOnly, WandBLogger):  # type: ignore[misc]
    """Composer's logger for Weights & Biases, for new versions of wandb.

    Composer needs wandb < 0.19, which does not import beside protobuf 6 or later; its `init` fails with newer
    versions.
    """

    def init(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Start or continue the run."""
        if self._enabled:
            importlib.import_module("wandb").init(name=state.run_name, **self._init_kwargs)


class MLflow(_OurMetricsOnly, MLFlowLogger):  # type: ignore[misc]
    """Composer's logger for MLflow."""


class TensorBoard(LoggerDestination):  # type: ignore[misc]
    """Writes event files to a folder.

    When a killed run is resumed, its points after the resumed step are hidden. Composer's own logger keeps
    them beside their repetition, and begins a new file at each flush.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None  # on the first rank

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Open an event file; its points hide those of a killed run."""
        if ranks.is_first_rank():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=state.timestamp.batch.value + 1)  # type: ignore[no-untyped-call]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write a point for each of our metrics."""
        if self.writer is not None:
            for name, value in metrics.items():
                if name.startswith(OUR_PREFIXES):
                    self.writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
            self.writer.flush()  # type: ignore[no-untyped-call]

    def log_images(
        self,
        images: Any,
        name: str = "Images",
        channels_last: bool = False,
        step: int | None = None,
        masks: Any = None,  # noqa: ARG002 - the last three are for Weights & Biases
        mask_class_labels: Any = None,  # noqa: ARG002
        use_table: bool = True,  # noqa: ARG002
    ) -> None:
        """Write one image, or several side by side.

        Args:
            images: one array (3, H, W), or (H, W, 3) with `channels_last`, or a list of them; uint8, or
                floats from 0 to 1.
            name: the tag.
            channels_last: see `images`.
            step: the run's step.
            masks: not used.
            mask_class_labels: not used.
            use_table: not used.
        """
        if self.writer is None:
            return
        layout = "HWC" if channels_last else "CHW"
        if isinstance(images, Sequence):
            images = np.stack([np.asarray(image) for image in images])
        pixels = np.asarray(images)
        if pixels.ndim == 4:
            self.writer.add_images(name, pixels, step, dataformats=f"N{layout}")  # type: ignore[no-untyped-call]
        else:
            self.writer.add_image(name, pixels, step, dataformats=layout)  # type: ignore[no-untyped-call]
        self.writer.flush()  # type: ignore[no-untyped-call]

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Write a table as Markdown text."""
        if self.writer is not None:
            lines = [_markdown_row(columns), _markdown_row(["---"] * len(columns)), *map(_markdown_row, rows)]
            self.writer.add_text(name, "\n".join(lines), step)  # type: ignore[no-untyped-call]
            self.writer.flush()  # type: ignore[no-untyped-call]

    def close(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()  # type: ignore[no-untyped-call]
            self.writer = None


def _markdown_row(cells: Sequence[Any]) -> str:
    escaped = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def build_loggers(config: LogConfig, folder: Path, resumes: bool) -> list[LoggerDestination]:
    """Build the loggers that `log` asks for; `check_stage` has checked that their packages are installed.

    Args:
        config: which loggers.
        folder: the run's folder.
        resumes: whether the run goes on from a checkpoint.
    """
    loggers: list[LoggerDestination] = []
    if config.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard"))
    if config.wandb:
        # wandb keeps the run's id in its folder, and "auto" continues a run that did not end. Its
        # configuration may change: Composer logs the number of ranks, which may be another one.
        init_kwargs = {"dir": str(folder), "resume": "auto", "allow_val_change": True}
        loggers.append(WandB(config.wandb, init_kwargs=init_kwargs))
    if config.mlflow:
        # MLflow finds a run by its name, so only a resumed run may look for one: another run may have had
        # this name.
        loggers.append(MLflow(config.mlflow, resume=resumes, log_system_metrics=False))
    return loggers
