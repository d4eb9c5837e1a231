"""Train one stage.

    python train.py yamls/demo/stage1.yaml              one process
    composer -n 2 train.py yamls/demo/stage1.yaml       two ranks, sharded (FSDP2)
    composer -n 8 train.py yamls/stage2.yaml init_from=runs/stage1

Settings come from the YAML file and from `key=value` after it; train/config.py
lists them. The run's folder (`save.folder`) gets metrics.jsonl, checkpoints, and
`latest`, a link to the newest. The same command goes on where a killed run was
saved last; a finished one is left as it is. Wrong settings end with status 2 and
one line, a full disk or a lost store with status 1. SIGTERM and Ctrl-C finish the
step, save, and end with status 143 or 130; Ctrl-C again ends at once.
"""

from __future__ import annotations

import os
import sys

from unitoken.common.interruption import end_with_launcher, install_handlers

if __name__ == "__main__":
    install_handlers("interrupted")
    if "LOCAL_WORLD_SIZE" in os.environ:  # of the launchers
        end_with_launcher()

from unitoken.common.cli import one_line_errors
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.common.files import own_temporary_folder

GOES_ON = "the same command goes on from where the run was saved last"


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if arguments else 2)
    with one_line_errors(GOES_ON):
        if __name__ == "__main__":
            own_temporary_folder()
        if "=" in arguments[0]:
            raise ConfigError(
                f"'{arguments[0]}': the first argument is the YAML file, overrides come after it"
            )
        from unitoken.train.check import check_stage
        from unitoken.train.config import StageConfig

        config = load_config(StageConfig, arguments[0], arguments[1:])
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            checked = check_stage(config, world_size)
        except ConfigError:
            if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
                from unitoken.train.distributed import ranks

                ranks.connect()
                with ranks.share_errors():
                    raise
            raise
        from unitoken.train.stage import (
            run_stage,  # torch and Composer: ten seconds, and only for settings that fit
        )

        run_stage(config, checked)


if __name__ == "__main__":
    main(sys.argv[1:])
