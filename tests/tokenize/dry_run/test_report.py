"""`unitoken tokenize --dry-run`: what the whole input would take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.tokenizing import TOKENIZER, content, settings, some_items, turns, write_items
from unitoken.commands.app import app
from unitoken.tokenize.dry_run.measure import Measured
from unitoken.tokenize.dry_run.report import estimate_of
from unitoken.tokenize.pipeline.timing import Times


def call(source: Path, out: Path, vqgan: Path, *arguments: str) -> tuple[int, str, str]:
    given = ["tokenize", "--in-filename", str(source), "--out-dir", str(out), "--dry-run", "20"]
    vision = [f"vision.weights={vqgan}", "target_size=16", "vision.precision=fp32"]
    result = CliRunner().invoke(app, [*given, f"tokenizer={TOKENIZER}", *vision, *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_twenty_items_tell_what_all_will_take(tmp_path: Path, vqgan: Path) -> None:
    source = write_items(tmp_path / "in", some_items(tmp_path, 60))
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "in" / path.name)
    status, out, error = call(source, tmp_path / "out", vqgan)
    assert (status, error) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["dry"].startswith("dry run: 20 items through the whole pipeline on the CPU")
    rejected = int(lines["kept"].rpartition(" ")[2])
    assert 0 < rejected < 8, "one in seven is bad"
    assert any("items.json (" in line for line in out.splitlines()), "an example of the rejects"
    assert "pictures/s, " in lines["speed"]
    assert lines["input"].endswith("60 items (counted)")
    assert "output    about " in lines["output"]
    assert all(len(line) <= 110 for line in out.splitlines())
    assert not (tmp_path / "out").exists()


def test_a_begun_dataset_stays_and_refuses_other_settings(tmp_path: Path, vqgan: Path) -> None:
    from unitoken.tokenize.prepare import prepare

    source = write_items(tmp_path, [{"conversations": turns("Hi.", "Ho.")}])
    out = tmp_path / "out"
    prepare(settings(vqgan, vision={"weights": str(vqgan), "precision": "fp32"}), [str(source)], str(out))
    before = content(out)
    status, _, error = call(source, out, vqgan, "target_size=32", "chunk_size=4")
    assert (status, error.count("\n")) == (2, 1)
    assert "target_size is 16 there and 32 now" in error
    assert call(source, out, vqgan, "chunk_size=4")[0] == 0
    assert content(out) == before


def test_items_that_fit_another_adapter_are_told_which(tmp_path: Path, vqgan: Path) -> None:
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    source = write_items(tmp_path, [{"messages": messages}] * 30)
    status, _, error = call(source, tmp_path / "out", vqgan)
    assert (status, error.count("\n")) == (2, 1)
    assert "none of 20 items can be used" in error
    assert "adapter=messages reads 20 of them" in error


@pytest.mark.parametrize(
    ("gpus", "splits", "rate", "slowest"),
    [
        (0, 1, 1.0, "the image tokenizer"),  # 20 s for 20 items
        (1, 1, 1.0, "the image tokenizer"),
        (2, 4, 2.0, "the image tokenizer"),  # workers that share a GPU do not add
    ],
)
def test_the_slowest_stage_bounds_the_rate(
    gpus: int, splits: int, rate: float, slowest: str, monkeypatch: pytest.MonkeyPatch, vqgan: Path
) -> None:
    monkeypatch.setattr("unitoken.tokenize.dry_run.report.cores", lambda: 64)
    times = Times(total=30, read=1, pictures=16, encode=20, write=5, images=20)
    measured = Measured(times, 1.0, [], 20, 100, 10, 1000, 100, gpus, threads=8)
    found = estimate_of(settings(vqgan), measured, splits)
    assert found.slowest == slowest
    assert found.rate == pytest.approx(rate)


def test_json_of_no_items_is_one_line(tmp_path: Path, vqgan: Path) -> None:
    (tmp_path / "empty.json").write_text(json.dumps([]))
    status, _, error = call(tmp_path / "empty.json", tmp_path / "out", vqgan)
    assert (status, error.count("\n")) == (2, 1)
    assert "holds no items" in error
