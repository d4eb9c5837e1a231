"""`unitoken plan-memory` prints the settings that fit, in 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.simulated_step import LUMINA_7B, SIGLIP_SO400M
from support.paths import ROOT
from support.stages import write_data, write_stage
from unitoken.commands.app import app

SIZES = (f"model.decoder={LUMINA_7B.model_dump_json()}", f"model.vision={SIGLIP_SO400M.model_dump_json()}")


def call(*arguments: str) -> tuple[int, list[str], str]:
    result = CliRunner().invoke(app, ["plan-memory", *arguments])
    return result.exit_code, result.stdout.splitlines(), result.stderr


def stage2(*arguments: str) -> tuple[int, list[str], str]:
    return call(str(ROOT / "yamls/stage2.yaml"), *arguments, *SIZES)


def test_the_table_has_the_fastest_settings_first() -> None:
    status, lines, _ = stage2("--gpu", "80gb", "--gpus", "8", "activation_checkpointing=full", "microbatch=8")
    assert status == 0
    assert all(len(line) <= 80 for line in lines[:7])
    head, *rows = [line.split() for line in lines[:7]]
    assert head == ["activation_checkpointing", "microbatch", "GB", "a", "GPU", "speed"]
    assert (rows[0][0], rows[0][3]) == ("none", "100%")
    assert (rows[-1][0], rows[-1][1]) == ("full", "8")
    speeds = [int(row[3].removesuffix("%")) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert all(float(row[2]) <= 80 for row in rows)
    assert lines[7].startswith(f"first row: about {rows[0][2]} GB a GPU: ")
    assert lines[8].startswith("the stage's own, activation_checkpointing=full microbatch=8, fits: ")
    # Without its data, a pack has as many views as there is room for.
    assert lines[9].startswith("without data (")
    assert lines[9].endswith("): full packs, each with 5 views for the tower")


def test_too_few_gpus_are_told_how_many_are_enough() -> None:
    status, lines, error = stage2("--gpu", "80 GB")
    assert (status, lines, error.count("\n")) == (2, [], 1)
    assert "nothing fits 1 GPU(s) of 80 GB: activation_checkpointing=full microbatch=1 needs about " in error
    assert error.endswith("; 2 GPUs are enough\n")


def test_a_stage_with_its_data_is_planned_from_its_packs(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    status, lines, _ = call(str(write_stage(tmp_path)), "--gpu", "4gb", "--gpus", "2", "microbatch=auto")
    assert status == 0
    assert lines[1].split() == ["none", "2", "3.0", "100%"]
    assert not any("without data" in line or "own" in line for line in lines)


def test_sizes_that_come_from_the_data_need_it(tmp_path: Path) -> None:
    asked = (str(write_stage(tmp_path)), "--gpu", "4gb", "model.decoder.vocab_size=auto")
    status, _, error = call(*asked)
    assert (status, error.count("\n")) == (2, 1)
    assert str(tmp_path / "data") in error
    write_data(tmp_path / "data")
    assert call(*asked)[0] == 0


@pytest.mark.parametrize("gpu", ["80", "gb", "0gb", "80 tb"])
def test_a_gpu_of_no_size_is_an_error(gpu: str) -> None:
    status, _, error = stage2("--gpu", gpu)
    assert (status, error.count("\n")) == (2, 1)
    assert f"--gpu {gpu}: expected the GPU's memory, as 80gb" in error


def test_gpus_that_can_not_share_the_batch_are_an_error() -> None:
    status, _, error = stage2("--gpu", "80gb", "--gpus", "3")
    assert (status, error.count("\n")) == (2, 1)
    assert "data.global_batch: 64 packs can not be shared evenly by 3 ranks" in error
