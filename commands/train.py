"""`unitoken train`: Composer's launcher with our program."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unitoken.common.cli import missing_package, one_line_errors
from unitoken.common.errors import ConfigError

if TYPE_CHECKING:
    from unitoken.train.config import StageConfig

StageFile = Annotated[Path, typer.Argument(help="The stage's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's, as seed=1.")
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--nproc",
        min=1,
        help="Ranks on this machine.  [default: one a GPU, or one]",
        show_default=False,
    ),
]
WorldSize = Annotated[int | None, typer.Option("--world-size", min=1, help="Ranks on all machines together.")]
BaseRank = Annotated[int | None, typer.Option("--base-rank", min=0, help="The first rank on this machine.")]
NodeRank = Annotated[int | None, typer.Option("--node-rank", min=0, help="This machine's number.")]
MasterAddress = Annotated[str | None, typer.Option("--master-addr", help="The address of the first machine.")]
MasterPort = Annotated[
    int | None, typer.Option("--master-port", min=1, max=65535, help="A free port of the first machine.")
]


def _check_start(config: StageConfig, nproc: int | None) -> None:
    """Check a stage that one machine trains, as its ranks will. Raises ConfigError."""
    from unitoken.train.overview.facts import check_start
    from unitoken.train.overview.gpus import gpus_here

    here = gpus_here()
    check_start(config, nproc or (1 if here is None else here[1]), has_gpus=here is not None)


def train(
    stage: StageFile,
    overrides: Overrides = None,
    nproc: Ranks = None,
    world_size: WorldSize = None,
    base_rank: BaseRank = None,
    node_rank: NodeRank = None,
    master_addr: MasterAddress = None,
    master_port: MasterPort = None,
) -> None:
    """Train a stage, one process a GPU; rerun to continue.

    This starts Composer's launcher, whose options these are. `composer train.py STAGE.yaml` in the repository
    does the same.
    """
    with one_line_errors():
        from unitoken.common.config import load_config
        from unitoken.train.config import StageConfig

        # Mistakes are found here, before processes are started whose launcher would say them once for each.
        config = load_config(StageConfig, stage, overrides or [])
        if find_spec("composer") is None:
            raise ConfigError(missing_package("composer"))
        if world_size is None:
            _check_start(config, nproc)
        options = {
            "-n": nproc,
            "--world_size": world_size,
            "--base_rank": base_rank,
            "--node_rank": node_rank,
            "--master_addr": master_addr,
            "--master_port": master_port,
        }
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        command = [sys.executable, "-m", "composer.cli", *given, "-m", "unitoken.train.program", str(stage)]
        # This process becomes the launcher, so that signals and statuses are the launcher's own.
        os.execv(sys.executable, [*command, *(overrides or [])])  # noqa: S606 - no shell
