"""Train one stage: composer train.py yamls/stage1.yaml. See train/program.py, or --help."""

import sys

CURE = "run `make install`, then `source .venv/bin/activate`"

if __name__ == "__main__":
    try:
        from unitoken.train.program import start
    except ModuleNotFoundError as error:
        if error.name != "unitoken":
            raise
        sys.exit(f"error: unitoken is not installed in {sys.prefix}: {CURE}")
    start()
