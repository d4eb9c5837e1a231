"""The whole job on real data, on a laptop: make demo

Handwritten digits -> conversations -> two datasets (2 workers each) -> one packed, mixed stream -> a small UniToken model
on 2 ranks: base training, Stage I, Stage II (killed halfway, resumed, and compared with an uninterrupted run) -> reading
held-out digits, drawing all ten with guidance -> demo/out/report.html. The last line on stdout is one JSON object of
measured figures. Settings of Stage I and II may follow: make demo ARGS=data.anyres=true
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = ROOT / "demo" / "out"
DATA = OUT / "data"
RUNS = OUT / "runs"
STAGES = ("base", "stage1", "stage2")
RANKS = 2
# On CPUs also where there is a GPU (two ranks can not share one); one thread a rank: two ranks on two cores.
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
ENVIRONMENT = {**os.environ, **SETTINGS}

start = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)


def tokenize(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "unitoken.tokenize",
        "run",
        "--config",
        "yamls/demo/tokenize.yaml",
        "--splits",
        str(RANKS),
    ]
    subprocess.run(
        [*command, "--in_filename", str(DATA / f"{name}.json"), "--out_dir", str(DATA / name)],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
    )


def launch(stage: str, run: str) -> subprocess.Popen[bytes]:
    """Start a stage under Composer's launcher, in a process group of its own so that all of it can be killed."""
    launcher = str(Path(sys.executable).with_name("composer"))
    command = [
        launcher,
        "-n",
        str(RANKS),
        "train.py",
        f"yamls/demo/{stage}.yaml",
        f"save.folder={RUNS / run}",
    ]
    if stage != "base":  # without a vision tower, and with little to change
        command += sys.argv[1:]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    if code := process.wait():
        raise SystemExit(f"error: {' '.join(map(str, process.args))} ended with status {code}")  # type: ignore[union-attr]


def losses(run: str) -> list[float]:
    """The loss of every step, from the run's own log."""
    lines = map(json.loads, (RUNS / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "eval" not in line]


def steps_logged(run: str) -> int:
    log = RUNS / run / "metrics.jsonl"
    return log.read_bytes().count(b'"grad_norm"') if log.exists() else 0


def kill_halfway(process: subprocess.Popen[bytes], run: str, steps: int) -> int:
    """SIGKILL every process of a run once half of its steps are logged. Returns the step it was killed after."""
    while steps_logged(run) < steps // 2:
        if process.poll() is not None:
            raise SystemExit(f"error: {run} ended with status {process.returncode} before it could be killed")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return steps_logged(run)


def train() -> int:
    """Base, Stage I, Stage II twice: uninterrupted, and killed halfway and resumed. Returns the step of the kill."""
    for stage in STAGES:
        say(f"training: {stage}")
        finish(launch(stage, stage))
    steps = steps_logged("stage2")
    say("training: stage2 once more, to be killed halfway")
    killed_at = kill_halfway(launch("stage2", "stage2-resumed"), "stage2-resumed", steps)
    say(f"killed all ranks with SIGKILL after step {killed_at} of {steps}; the same command again")
    finish(launch("stage2", "stage2-resumed"))
    return killed_at


def _rounded(shares: Any) -> dict[str, float]:
    return {key: round(value, 4) for key, value in shares.model_dump().items()}


def describe_samples() -> Iterator[list[tuple[str, bool]]]:
    from streaming import StreamingDataset
    from transformers import AutoTokenizer

    from unitoken.dataset.manifest import load_vocabulary
    from unitoken.dataset.record import Record
    from unitoken.tokenize.checks.preview import describe

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/assets/tokenizer")
    for name in ("captions", "drawings"):
        dataset = StreamingDataset(
            local=str(DATA / name), batch_size=1
        )  # stock: any MDS reader reads the folder
        record = Record.from_mds(dataset[0])
        yield [
            (text, trained) for _, text, trained in describe(record, load_vocabulary(DATA / name), tokenizer)
        ]


def main() -> None:
    from demo import digits  # scikit-learn: only after the module's docstring can be shown

    shutil.rmtree(OUT, ignore_errors=True)
    say("writing scikit-learn's handwritten digits as conversations")
    digits.write(DATA)
    for name in ("captions", "drawings"):
        say(f"tokenizing {name}.json with {RANKS} workers")
        tokenize(name)
    killed_at = train()

    say("reading held-out digits and drawing all ten")
    from demo import report
    from demo.evaluate import Evaluation

    evaluation = Evaluation(RUNS / "stage2-resumed")
    answers = evaluation.read(DATA / "heldout.json")
    drawings = evaluation.draw()
    manifests = [
        json.loads((DATA / name / "manifest.json").read_text(encoding="utf-8"))
        for name in ("captions", "drawings")
    ]
    plan = evaluation.plan()
    curves = {stage: losses(stage) for stage in STAGES}
    figures = {
        **{key: sum(manifest[key] for manifest in manifests) for key in ("items", "samples", "rejected")},
        "packs": plan.packs,
        "fill": round(plan.fill, 4),
        **{f"{stage}_loss": [round(curves[stage][0], 4), round(curves[stage][-1], 4)] for stage in STAGES},
        "caption_accuracy": round(sum(a.answer == a.asked for a in answers) / len(answers), 4),
        "drawing_accuracy": sum(d.read == d.asked for d in drawings) / len(drawings),
        "resumed_equal": losses("stage2") == losses("stage2-resumed"),
        "share_in_batches": {share.name: _rounded(share.in_batches) for share in plan.streams},
        "seconds": round(time.monotonic() - start, 1),
    }
    report.write_report(
        OUT / "report.html", figures, curves, killed_at, drawings, answers[:30], list(describe_samples())
    )
    say(f"the report: {(OUT / 'report.html').relative_to(ROOT)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
