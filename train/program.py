"""Train one stage.

    composer -n 8 train.py yamls/stage1.yaml            eight ranks, sharded (FSDP2)
    composer -n 8 train.py yamls/stage2.yaml init_from=runs/stage1
    python train.py yamls/demo/stage1.yaml              one process

Settings come from the YAML file and from `key=value` after it; train/config.py lists them. The run's folder
(`save.folder`) gets metrics.jsonl, checkpoints, and `latest`, a link to the newest. The same command
continues a killed run from its last checkpoint, and leaves a finished one as it is. Wrong settings end with
status 2 and one line, a full disk or an unreachable store with status 1. SIGTERM and Ctrl-C finish the step,
save, and end with status 143 or 130; a second Ctrl-C ends at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from unitoken.common.interruption import end_with_launcher, install_handlers

GOES_ON = "the same command goes on from where the run was saved last"


def start() -> None:
    """Run this process as a rank: handle signals, use a temporary folder of its own, and train."""
    # Signals are handled before anything heavy is imported.
    install_handlers("interrupted")
    if "LOCAL_WORLD_SIZE" in os.environ:  # set by launchers
        end_with_launcher()
    from unitoken.common.cli import one_line_errors
    from unitoken.common.files import own_temporary_folder

    with one_line_errors(GOES_ON):
        own_temporary_folder()
    train(sys.argv[1:])


def train(arguments: Sequence[str]) -> None:
    """Train a stage from a command line's arguments: the YAML file, then `key=value` settings.

    Raises:
        SystemExit: the arguments ask for help, or the run ended with an error, which was printed.
    """
    from unitoken.common.cli import one_line_errors, report
    from unitoken.common.config import load_config
    from unitoken.common.errors import ConfigError

    if not arguments or arguments[0] in ("-h", "--help"):
        report(__doc__ or "")
        raise SystemExit(0 if arguments else 2)
    with one_line_errors(GOES_ON):
        if "=" in arguments[0]:
            raise ConfigError(
                f"'{arguments[0]}': the first argument is the YAML file, settings come after it"
            )
        from unitoken.train.check import check_stage
        from unitoken.train.config import StageConfig

        config = load_config(StageConfig, arguments[0], arguments[1:])
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            stage = check_stage(config, world_size)
        except ConfigError:
            if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
                # Only this machine's ranks may have the error: the others are told before it ends.
                from unitoken.train.distributed import ranks

                ranks.connect()
                with ranks.share_errors():
                    raise
            raise
        # torch and Composer take ten seconds to import: only for settings that fit.
        from unitoken.train.stage import run_stage

        run_stage(config, stage)


if __name__ == "__main__":
    start()
