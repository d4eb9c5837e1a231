"""The metrics of a run: metrics.jsonl, TensorBoard, the terminal."""

import os
import pty
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from support.killing import KilledError, kill_at
from support.paths import ROOT
from support.stages import evaluations, metrics, stage, write_data
from unitoken.common.errors import ConfigError
from unitoken.train.callbacks.loggers import build_loggers
from unitoken.train.callbacks.metrics import Metrics
from unitoken.train.callbacks.progress import StepProgressLines
from unitoken.train.check import check_stage
from unitoken.train.config import StageConfig
from unitoken.train.distributed import ranks
from unitoken.train.run.log_files import read_metrics
from unitoken.train.stage import run_stage

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's, streaming's and tensorboard's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    write_data(folder / "data")
    return folder


def two_streams(folder: Path) -> dict[str, Any]:
    """Two streams, each with 30 % held out."""
    local = {"local": str(folder / "data")}
    return {
        "streams": {
            "drawn": {**local, "kinds": ["generation"], "held_out": 0.3},
            "asked": {**local, "held_out": 0.3},
        },
        "packed_length": 64,
        "global_batch": 4,
        "cache": str(folder / "cache"),
    }


def train(config: StageConfig) -> Path:
    run_stage(config, check_stage(config, 1))
    return Path(config.save.folder)


def killed_at(step: int, config: StageConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(KilledError):
            train(config)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    overrides = (
        f"save.folder={folder}/whole",
        "max_duration=2ep",
        "log={every: 2}",
        "eval.interval=4ba",
        "name=whole",
    )
    return train(stage(folder, *overrides, "optimizer.lr_scales={vit: 0.5}", data=two_streams(folder)))


def test_a_line_has_losses_rates_and_tokens_by_name(whole: Path) -> None:
    lines, seen = metrics(whole), 0
    for line in lines:
        assert line["lr_vit"] == line["lr"] / 2
        assert line["lr_rest"] == line["lr"]
        assert set(line["tokens_seen"]) == {"drawn", "asked"}
        seen += line["tokens"]
        assert sum(line["tokens_seen"].values()) == seen
        assert line["skipped"] == 0
        assert {"memory_gib", "mfu"}.isdisjoint(line)  # of GPUs
        kinds = [line[key] for key in ("loss_text", "loss_image") if key in line]
        assert min(kinds) - 1e-6 <= line["ce"] <= max(kinds) + 1e-6
    assert {key for line in lines for key in line if key.startswith("loss_")} == {
        "loss_text", "loss_image", "loss_text_only", "loss_understanding", "loss_generation"
    }  # fmt: skip


def test_a_killed_run_goes_on_counting_tokens(folder: Path, whole: Path, tmp_path: Path) -> None:
    """It writes the same lines and evaluations, bit for bit, except for times."""
    overrides = (f"save.folder={tmp_path}", "max_duration=2ep", "eval.interval=4ba", "name=whole")
    config = stage(folder, *overrides, "optimizer.lr_scales={vit: 0.5}", data=two_streams(folder))
    killed_at(9, config)
    train(config)

    def timeless(run: Path) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in line.items() if "second" not in k}
            for line in read_metrics(run / "metrics.jsonl")
        ]

    assert timeless(tmp_path) == timeless(whole)


def test_all_metrics_of_a_step_are_one_reduction_bug_27(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference waited for the GPU three times per step, and reduced each metric by itself."""
    sizes, entries = [], []
    real, batch_end = ranks.sum_over_ranks, Metrics.batch_end

    def watched(self: Metrics, state: Any, logger: Any) -> None:
        entries.append(list(state.total_loss_dict))  # what Composer reduces, each by itself
        batch_end(self, state, logger)

    def counted(values: torch.Tensor) -> torch.Tensor:
        sizes.append(len(values))
        return real(values)

    monkeypatch.setattr(ranks, "sum_over_ranks", counted)
    monkeypatch.setattr(Metrics, "batch_end", watched)
    train(stage(folder, f"save.folder={tmp_path}", "max_duration=3ba"))
    assert len(sizes) == 3
    assert entries == [["loss/train/total"]] * 3


def test_mfu_follows_from_flops_and_seconds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Metrics.__init__

    def init(self: Metrics, *arguments: Any, **settings: Any) -> None:
        real(self, *arguments, **{**settings, "peak_flops": 1e9})

    monkeypatch.setattr(Metrics, "__init__", init)
    for line in metrics(train(stage(folder, f"save.folder={tmp_path}", "max_duration=3ba"))):
        # All weights are trained: 6 FLOPs per weight and token; some for attention, tower and output layer.
        weights = 2 * (4 * 32**2 + 3 * 32 * 48)
        assert 1 < line["mfu"] * line["seconds"] * 1e9 / (6 * weights * line["tokens"]) < 3


def points(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_gets_the_metrics_at_the_interval(whole: Path) -> None:
    lines = {line["step"]: line for line in metrics(whole)}
    shown = sorted({step for step in lines if step % 2 == 0} | {len(lines)})
    for key in ("loss", "grad_norm", "lr_vit", "useful"):
        assert points(whole, f"train/{key}") == [
            (step, pytest.approx(lines[step][key], rel=1e-6)) for step in shown
        ]
    assert points(whole, "train/tokens_seen/drawn")[-1][1] == lines[len(lines)]["tokens_seen"]["drawn"]
    found = evaluations(whole)
    assert points(whole, "eval/loss") == [
        (step, pytest.approx(values["loss"], rel=1e-6)) for step, values in found.items()
    ]


def test_tensorboard_shows_each_step_of_a_killed_run_once(folder: Path, tmp_path: Path) -> None:
    config = stage(folder, f"save.folder={tmp_path}", "log={every: 1}", "save.interval=4ba")
    killed_at(7, config)
    train(config)
    assert [step for step, _ in points(tmp_path, "train/loss")] == list(range(1, 10))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # a file a start


def test_tensorboard_takes_images_and_tables(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real = Metrics.batch_end

    def batch_end(self: Any, state: Any, logger: Any) -> None:
        real(self, state, logger)
        logger.log_images([torch.zeros(3, 4, 5, dtype=torch.uint8)] * 2, name="samples/drawn")
        logger.log_images(
            torch.zeros(4, 5, 3, dtype=torch.uint8).numpy(), name="samples/one", channels_last=True
        )
        logger.log_table(["asked", "answer"], [["what?", "a | b"]], name="samples/answers")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "batch_end", batch_end)
        train(stage(folder, f"save.folder={tmp_path}", "log={every: 1}", "max_duration=1ba"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {
        "samples/drawn",
        "samples/one",
    }  # several are one picture, side by side
    assert (
        "| what? | a \\| b |"
        in events.Tensors("samples/answers/text_summary")[0].tensor_proto.string_val[0].decode()
    )


@pytest.mark.parametrize("package", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_not_installed_is_named_at_once(
    package: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package).mkdir()  # a folder of that name, as wandb makes for its logs, is no package
    monkeypatch.setattr(
        sys,
        "path",
        [str(tmp_path), *(p for p in sys.path if not (Path(p) / package / "__init__.py").exists())],
    )
    monkeypatch.delitem(sys.modules, package, raising=False)
    setting = "true" if package == "tensorboard" else "mine"
    with pytest.raises(
        ConfigError, match=f"log.{package}: the package {package} is not installed; pip install {package}"
    ):
        check_stage(stage(folder, f"log.{package}={setting}"), 1)


def test_wandb_gets_only_our_metrics(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged, begun = [], []
    fake = types.ModuleType("wandb")
    fake.log = lambda values, step: logged.append((values, step))  # type: ignore[attr-defined]
    fake.init = lambda **settings: begun.append(settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (wandb,) = build_loggers(stage(folder, "log.wandb=mine").log, tmp_path, resumes=False)
    wandb.init(types.SimpleNamespace(run_name="stage1"), None)
    settings = {"dir": str(tmp_path), "resume": "auto", "allow_val_change": True}
    assert begun == [{"project": "mine", "name": "stage1", **settings}]
    wandb.log_metrics({"time/batch": 3.0, "trainer/device_train_microbatch_size": 1.0}, 4)
    wandb.log_metrics({"time/batch": 3.0, "train/loss": 2.0}, 4)
    assert logged == [({"train/loss": 2.0}, 4)]


def test_lines_are_printed_where_there_is_no_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(stage(folder, f"save.folder={tmp_path}", "log.every=4"))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in printed] == ["step 4/9", "step 8/9", "step 9/9"]
    for line in printed:
        assert all(word in line for word in ("loss ", "grad ", "lr ", "tokens/s", "% useful", " left")), line
    assert printed[-1].endswith("0:00:00 left")


def test_the_time_left_follows_from_the_time_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = StepProgressLines("stage", 1000, 10)
    lines.start(200)
    now = 150.0  # 50 steps in 50 seconds, after those that an earlier run did
    assert str(lines.time_left(250)) == "0:12:30"
    line = {"step": 250, "loss": None, "grad_norm": 2.0, "skipped": 1}  # a loss that is not finite is null
    assert lines.status(line, "loss", "grad_norm", "mfu", "skipped") == "grad 2.000  1 skipped  0:12:30 left"


@pytest.mark.slow
def test_a_bar_is_drawn_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    from support.stages import write_stage

    yaml = write_stage(folder, name="seen")
    overrides = [f"save.folder={tmp_path}", "eval.interval=4ba", "data.streams.all.held_out=0.3"]
    controller, terminal = pty.openpty()
    os.set_blocking(controller, True)
    program = ROOT / "train.py"
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        "LINES": "30",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, program, yaml, *overrides], stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(controller, 1 << 16):
            shown += data
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    steps = len(metrics(tmp_path))
    for words in (f"{steps}/{steps}", "tokens/s", "useful", " left", "evaluation at step 4: loss ", "━"):
        assert words in text, text
    assert text.count("step 4/") == 0  # no lines besides
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is there again


def test_a_broken_line_is_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "loss": 2.0}',
        b'{"step": 2, "lo',
        bytes(20),
        b"\xff\xfe",
        b"[" * 3000,
        b"7",
        b'{"step": 3}',
        b'{"st',
    ]
    path.write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_metrics(path)] == [1, 3]
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition("jsonl: line ")[2][:1] for line in warnings] == ["2", "3", "4", "5", "6", "8"]
