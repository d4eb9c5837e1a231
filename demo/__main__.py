"""Run the whole job on real data, on a laptop.

    make demo
    make demo ARGS=data.anyres=true     settings for Stage I and Stage II

1. Write scikit-learn's handwritten digits as conversations.
2. Tokenize them into two datasets, with 2 workers each.
3. Train a small UniToken model on both, mixed and packed, on 2 ranks: base training, Stage I, Stage II.
   Stage II is trained a second time: it is killed halfway and resumed, and its losses are compared with those
   of the first time.
4. Let the model read held-out digits and draw all ten: `unitoken evaluate` with demo/suite.yaml.
5. Write demo/out/report.html. The last line on stdout is a JSON object with the measured figures.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

if TYPE_CHECKING:
    from unitoken.streaming_data.plan.report import PlanReport

ROOT = Path(__file__).parent.parent
OUT = ROOT / "demo" / "out"
DATA = OUT / "data"
RUNS = OUT / "runs"
RESULTS = OUT / "evaluation"
DATASETS = ("captions", "drawings")
STAGES = ("base", "stage1", "stage2")
RESUMED = "stage2-resumed"
RANKS = 2
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",  # two ranks can not share one GPU
    "OMP_NUM_THREADS": "1",  # two ranks on two cores
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}

start = time.monotonic()


def say(text: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)


def tokenize(name: str) -> None:
    """Tokenize DATA/name.json into the dataset folder DATA/name."""
    command = [sys.executable, "-m", "unitoken.tokenize", "run", "--config", "yamls/tokenize/digits.yaml"]
    paths = ["--in_filename", str(DATA / f"{name}.json"), "--out_dir", str(DATA / name)]
    subprocess.run([*command, "--splits", str(RANKS), *paths], cwd=ROOT, env=ENVIRONMENT, check=True)


def launch(stage: str, run: str) -> subprocess.Popen[bytes]:
    """Start a stage with Composer's launcher, in a process group of its own that can be killed as a whole."""
    launcher = str(Path(sys.executable).with_name("composer"))
    command = [launcher, "-n", str(RANKS), "train.py", f"yamls/demo/{stage}.yaml"]
    # Base training has no vision tower, so the settings from the command line are for the other stages.
    overrides = [] if stage == "base" else sys.argv[1:]
    return subprocess.Popen(
        [*command, f"save.folder={RUNS / run}", *overrides],
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes], run: str) -> None:
    """Wait for a run, and end the demo where the run failed."""
    if status := process.wait():
        raise SystemExit(f"error: the training run {run} ended with status {status}")


def losses(run: str) -> list[float]:
    """Read the loss of every step from the run's metrics."""
    lines = map(json.loads, (RUNS / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def steps_logged(run: str) -> int:
    """Count the steps of a run that may still be writing its metrics."""
    log = RUNS / run / "metrics.jsonl"
    return log.read_bytes().count(b'"grad_norm"') if log.exists() else 0


def kill_halfway(process: subprocess.Popen[bytes], run: str, steps: int) -> int:
    """Kill every process of a run (SIGKILL) once half of its steps are logged.

    Returns:
        The last step that it logged.
    """
    while steps_logged(run) < steps // 2:
        if process.poll() is not None:
            raise SystemExit(f"error: {run} ended with status {process.returncode} before it could be killed")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return steps_logged(run)


def train() -> int:
    """Train the three stages, and Stage II again with a kill halfway. Returns the step of the kill."""
    for stage in STAGES:
        say(f"training: {stage}")
        finish(launch(stage, stage), stage)
    steps = steps_logged("stage2")
    say("training: stage2 once more, to be killed halfway")
    killed_at = kill_halfway(launch("stage2", RESUMED), RESUMED, steps)
    say(f"killed all ranks with SIGKILL after step {killed_at} of {steps}; starting the same command again")
    finish(launch("stage2", RESUMED), RESUMED)
    return killed_at


def evaluate(run: str) -> dict[str, dict[str, float]]:
    """Score a run on demo/suite.yaml. Returns the scores of each task."""
    command = [sys.executable, "-m", "unitoken.train", "evaluate", str(RUNS / run)]
    options = ["--suite", "demo/suite.yaml", "--out", str(RESULTS)]
    subprocess.run([*command, *options], cwd=ROOT, env=ENVIRONMENT, check=True)
    result = json.loads((RESULTS / "result.json").read_text(encoding="utf-8"))
    return {name: task["scores"] for name, task in result["tasks"].items()}


def describe_samples() -> list[list[tuple[str, bool]]]:
    """Show the first sample of each dataset as (piece of text, whether it is trained on)."""
    from streaming import StreamingDataset
    from transformers import AutoTokenizer

    from unitoken.codec.passages import describe
    from unitoken.dataset.manifest import load_vocabulary
    from unitoken.dataset.record import Record

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/assets/tokenizer")
    samples = []
    for name in DATASETS:
        # streaming's own class: any reader of MDS can read the folder.
        record = Record.from_mds(StreamingDataset(local=str(DATA / name), batch_size=1)[0])
        pieces = describe(record, load_vocabulary(DATA / name), tokenizer)
        samples.append([(text, trained) for _, text, trained in pieces])
    return samples


def measured_figures(plan: PlanReport, caption_accuracy: float, drawing_accuracy: float) -> dict[str, Any]:
    """Collect the figures for the report and the last line of the output."""
    manifests = [json.loads((DATA / name / "manifest.json").read_text(encoding="utf-8")) for name in DATASETS]
    curves = {stage: losses(stage) for stage in STAGES}
    return {
        **{key: sum(manifest[key] for manifest in manifests) for key in ("items", "samples", "rejected")},
        "packs": plan.packs,
        "fill": round(plan.fill, 4),
        **{f"{stage}_loss": [round(curve[0], 4), round(curve[-1], 4)] for stage, curve in curves.items()},
        "caption_accuracy": round(caption_accuracy, 4),
        "drawing_accuracy": drawing_accuracy,
        "resumed_equal": curves["stage2"] == losses(RESUMED),
        "share_in_batches": {stream.name: _rounded(stream.in_batches) for stream in plan.streams},
        "seconds": round(time.monotonic() - start, 1),
    }


def _rounded(shares: pydantic.BaseModel | None) -> dict[str, float]:
    assert shares is not None, "only plans of older versions have none"
    return {key: round(value, 4) for key, value in shares.model_dump().items()}


def main() -> None:
    """Run all parts in their order."""
    from demo import digits  # late, as scikit-learn takes a while to import

    shutil.rmtree(OUT, ignore_errors=True)
    say("writing scikit-learn's handwritten digits as conversations")
    digits.write(DATA)
    for name in DATASETS:
        say(f"tokenizing {name}.json with {RANKS} workers")
        tokenize(name)
    killed_at = train()

    say("reading held-out digits and drawing all ten")
    from demo import report
    from demo.evaluate import answers_of_suite, drawings_of_suite, trained_plan

    scores = evaluate(RESUMED)
    figures = measured_figures(
        trained_plan(RUNS / RESUMED),
        caption_accuracy=scores["reading"]["exact_match"],
        drawing_accuracy=scores["drawing"]["classifier"],
    )
    answers, drawings = answers_of_suite(RESULTS, DATA), drawings_of_suite(RESULTS)
    curves = {stage: losses(stage) for stage in STAGES}
    parts = report.Report(figures, curves, killed_at, drawings, answers[:30], describe_samples())
    report.write_report(OUT / "report.html", parts)
    say(f"the report: {(OUT / 'report.html').relative_to(ROOT)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
