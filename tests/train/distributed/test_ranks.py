"""Several ranks with FSDP2, on CPUs through gloo.

Where the launcher matters they are started as a user does: `composer -n 2 train.py ...`. A rank imports for
ten seconds and then trains for one, so few processes run most stages, for several tests: see rank_program.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import all_tensors
from support.paths import ROOT, TESTS
from support.rank_program import train
from support.ranks import finish, free_port, start
from support.stages import curve, metrics, stage, write_data, write_stage
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.locations import latest_checkpoint, step_of
from unitoken.train.run import run_folder

PROGRAM = TESTS / "support" / "rank_program.py"
BIN = Path(sys.executable).parent
TIED = (  # a Qwen2 with tied embeddings
    "model.decoder.qk_norm=none",
    "model.decoder.attention_bias=true",
    "model.decoder.num_key_value_heads=1",
    "model.decoder.tie_word_embeddings=true",
    "trainable=[vit, adapter, model]",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder / "data")
    write_stage(folder, name="dry")  # without dropout, to compare numbers of ranks
    return folder


def dry(folder: Path, run: str | Path, *overrides: str, stop: int = 0, steps: int = 5) -> dict[str, Any]:
    """Return the arguments of `train` for a run without dropout; 0 steps train a whole epoch."""
    duration = f"max_duration={steps}ba" if steps else "max_duration=1ep"
    settings = ["model.dropout=0", f"save.folder={folder / run}", duration, *overrides]
    return {"yaml": str(folder / "dry.yaml"), "overrides": settings, "stop": stop}


def launch(ranks: int, *stages: dict[str, Any]) -> None:
    """Run stages one after the other on so many ranks."""
    assert finish(start(ranks, [PROGRAM, json.dumps(stages)])) == [0] * ranks


@pytest.fixture(scope="module")
def by_one(folder: Path) -> Path:
    train(**dry(folder, "one"))
    return folder / "one"


@pytest.fixture(scope="module")
def by_two(folder: Path) -> Path:
    launch(
        2,
        dry(folder, "two"),
        dry(
            folder,
            "recomputed",
            "model.compile=true",
            "activation_checkpointing=selective",
            "fsdp.reshard=false",
        ),
        dry(folder, "moved", steps=0, stop=4),
        dry(folder, "tied", *TIED, stop=3),
        dry(folder, "tied", *TIED),
        dry(folder, "tied-moved", *TIED, stop=3),
        *other_settings_halfway(folder, "two-changed"),
        *new_rows_halfway(folder, "two-rows"),
        dry(folder, "two-lora", *LORA, stop=3),
        dry(folder, "two-lora", *LORA),
    )
    return folder / "two"


@pytest.fixture(scope="module")
def by_four(folder: Path, by_two: Path) -> Path:
    train(**dry(folder, "moved", steps=0, stop=6))  # one rank resumes where two were stopped, then four
    launch(
        4,
        dry(folder, "four", "activation_checkpointing=full"),
        dry(folder, "moved", steps=0),
        dry(folder, "hsdp", "fsdp.replicas=2", stop=3),
        dry(folder, "hsdp", "fsdp.replicas=2"),
        *new_rows_halfway(folder, "four-rows"),
        dry(folder, "hsdp-rows", *NEW_ROWS, "fsdp.replicas=2"),
    )
    return folder / "four"


def other_settings_halfway(folder: Path, run: str) -> list[dict[str, Any]]:
    """Return a run that is stopped, and resumed with another decay and another group of parameters."""
    return [
        dry(folder, run, stop=3),
        dry(folder, run, "optimizer.weight_decay=5", "optimizer.lr_scales={model: 3}"),
    ]


# 50 of 170 rows are old, which ends inside of the first rank's shard of two, and of the second's of four.
NEW_ROWS = ("model.grow={init: normal}", "trainable=[new_rows]", "optimizer.weight_decay=1")


LORA = ("model.lora={rank: 4}", "trainable=[lora, image_rows, vit, adapter]")


def new_rows_halfway(folder: Path, run: str) -> list[dict[str, Any]]:
    """Return a run that trains new rows alone, is stopped, and resumed."""
    return [dry(folder, run, *NEW_ROWS, stop=3), dry(folder, run, *NEW_ROWS)]


def assert_same(run: Path, expected: Path) -> None:
    """Compare the metrics of all steps."""
    for key in ("loss", "grad_norm", "tokens"):
        assert [line[key] for line in metrics(run)] == pytest.approx(
            [line[key] for line in metrics(expected)], rel=1e-5
        ), key


def test_two_ranks_train_as_one(by_one: Path, by_two: Path) -> None:
    """The losses and gradient norms are the same, also when one of the ranks has no image in a microbatch."""
    assert_same(by_two, by_one)


def test_two_ranks_train_tied_embeddings_as_one(folder: Path, by_two: Path) -> None:
    """Stopped and resumed on two ranks; also stopped on two and resumed on one."""
    train(**dry(folder, "tied-one", *TIED))
    train(**dry(folder, "tied-moved", *TIED))
    weights = run_folder.open_checkpoint(folder / "tied-one" / "step-00000005").load()
    assert "lm_head.weight" not in weights
    for run in ("tied", "tied-moved"):
        assert_same(folder / run, folder / "tied-one")
        found = run_folder.open_checkpoint(folder / run / "step-00000005").load()
        name = "model.embed_tokens.weight"
        torch.testing.assert_close(found[name], weights[name], rtol=1e-3, atol=1e-4)


def test_two_ranks_change_optimizer_settings_as_one_does(folder: Path, by_one: Path, by_two: Path) -> None:
    for part in other_settings_halfway(folder, "one-changed"):
        train(**part)
    assert_same(folder / "two-changed", folder / "one-changed")
    assert curve(folder / "one-changed")[:3] == curve(by_one)[:3]
    assert abs(curve(folder / "one-changed")[4][1] - curve(by_one)[4][1]) > 1e-3


def test_four_ranks_train_as_one(by_one: Path, by_four: Path) -> None:
    assert_same(by_four, by_one)


def test_replicas_of_the_sharded_model_train_as_one(folder: Path, by_one: Path, by_four: Path) -> None:
    """HSDP, with a save and a resume in between."""
    assert_same(folder / "hsdp", by_one)


def test_compiled_and_recomputed_layers_train_as_plain_ones(folder: Path, by_one: Path, by_two: Path) -> None:
    assert_same(folder / "recomputed", by_one)


def test_two_ranks_then_one_then_four_see_the_same_batches(folder: Path, by_four: Path) -> None:
    train(**dry(folder, "unmoved", steps=0))
    assert [line["step"] for line in metrics(folder / "moved")] == list(range(1, 10))
    assert_same(folder / "moved", folder / "unmoved")


def test_any_number_of_ranks_saves_the_same_weights(folder: Path, by_one: Path, by_four: Path) -> None:
    expected = run_folder.open_checkpoint(by_one / "step-00000005").load()
    for run in ("two", "four", "hsdp"):
        found = run_folder.open_checkpoint(folder / run / "step-00000005").load()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=f"{run}: {name}")


def test_new_rows_alone_train_on_any_number_of_ranks(folder: Path, by_four: Path) -> None:
    """Every other number stays as it was to the bit, its moments 0; with a resume in between."""
    # The first step has a learning rate of 0.
    train(**dry(folder, "start-rows", *NEW_ROWS, steps=1))
    before = run_folder.open_checkpoint(folder / "start-rows" / "step-00000001").load()
    for part in new_rows_halfway(folder, "one-rows"):
        train(**part)
    for run in ("one-rows", "two-rows", "four-rows", "hsdp-rows"):
        assert_same(folder / run, folder / "one-rows")
        checkpoint = folder / run / "step-00000005"
        after = run_folder.open_checkpoint(checkpoint).load()
        matrices = ("model.embed_tokens.weight", "lm_head.weight")
        for name, tensor in after.items():
            kept = 50 if name in matrices else len(tensor)
            assert torch.equal(tensor[:kept], before[name][:kept]), f"{run}: {name}"
            assert (tensor[kept:] != before[name][kept:]).all(), f"{run}: {name}"
        moments = {name: t for name, t in all_tensors(checkpoint).items() if name.startswith("exp_avg_sq/")}
        assert moments.keys() == {f"exp_avg_sq/{name}" for name in matrices}
        for name, moment in moments.items():
            assert not moment[:50].any(), f"{run}: {name}"
            assert moment[50:].any(), f"{run}: {name}"


def test_two_ranks_train_adapters_as_one(folder: Path, by_two: Path) -> None:
    """Frozen and trained parameters share sharding units; with a resume in between."""
    train(**dry(folder, "one-lora", *LORA))
    assert_same(folder / "two-lora", folder / "one-lora")
    states = [all_tensors(folder / run / "step-00000005") for run in ("two-lora", "one-lora")]
    assert sum("model/" in name and "lora_b" in name for name in states[0]) == 2 * 7
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run of the whole program with dropout, started as a user does."""
    command = [
        str(BIN / "composer"),
        "-n",
        "2",
        str(ROOT / "train.py"),
        str(write_stage(folder)),
        f"save.folder={folder}/whole",
        "max_duration=3ep",
    ]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=240)
    return folder / "whole"


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """A run of the same settings after SIGKILL in the middle of its second epoch."""
    run = folder / "killed"
    ranks = start(2, [ROOT / "train.py", write_stage(folder), f"save.folder={run}", "max_duration=3ep"])
    deadline = time.monotonic() + 240
    while (saved := latest_checkpoint(run)) is None or step_of(saved) < 12:
        assert all(rank.poll() is None for rank in ranks), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()
    saved = latest_checkpoint(run)
    assert saved is not None
    assert 12 <= step_of(saved) < 27
    return run


def test_a_killed_run_resumes_as_if_never_killed(
    folder: Path, whole: Path, killed: Path, tmp_path: Path
) -> None:
    """The losses are equal bit for bit, with dropout."""
    shutil.copytree(killed, tmp_path / "run", symlinks=True)
    assert finish(
        start(2, [ROOT / "train.py", write_stage(folder), f"save.folder={tmp_path}/run", "max_duration=3ep"])
    ) == [0, 0]
    assert curve(tmp_path / "run") == curve(whole)


def test_one_rank_resumes_from_two_with_the_same_batches(
    folder: Path, whole: Path, killed: Path, tmp_path: Path
) -> None:
    from unitoken.train.stage import run_stage

    shutil.copytree(killed, tmp_path / "run", symlinks=True)
    smaller = stage(folder, f"save.folder={tmp_path}/run", "max_duration=3ep")
    run_stage(smaller, check_stage(smaller, 1))
    expected, found = metrics(whole), metrics(tmp_path / "run")
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    # Dropout differs.
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=0.02)


def test_a_folder_not_shared_is_one_error_on_all_machines(folder: Path, by_one: Path, tmp_path: Path) -> None:
    """Rank 0 would resume from a checkpoint and rank 1 start anew, and both would wait for ever."""
    shutil.copytree(by_one, tmp_path / "0", symlinks=True)
    commands = [
        [ROOT / "train.py", folder / "dry.yaml", f"save.folder={tmp_path}/{rank}", "max_duration=9ba"]
        for rank in (0, 1)
    ]
    ranks = start(2, *commands, nodes=2, stderr=subprocess.PIPE, text=True)
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    message = (
        "error: save.folder: rank 0 finds step-00000005 and rank 1 finds no checkpoint; "
        "it must be the same on all machines"
    )
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert all(message in words.splitlines() for words in errors), errors


def test_different_settings_are_one_error_on_all_machines(folder: Path, tmp_path: Path) -> None:
    """An old YAML file on one of two machines would train half of the model at another learning rate."""
    command = [ROOT / "train.py", folder / "dry.yaml", f"save.folder={tmp_path}/run"]
    ranks = start(
        2,
        [*command, "optimizer.lr=1e-2"],
        [*command, "optimizer.lr=1e-9"],
        nodes=2,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    message = (
        "error: optimizer.lr: rank 0 has 0.01 and rank 1 has 1e-09; settings must be the same on all machines"
    )
    assert all(message in words.splitlines() for words in errors), errors
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_machine_is_raised_on_all(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").symlink_to("step-00000001")  # which does not exist
    commands = [
        [ROOT / "train.py", folder / "dry.yaml", f"save.folder={tmp_path}/{name}"] for name in ("none", "run")
    ]
    ranks = start(2, *commands, nodes=2, stderr=subprocess.PIPE, text=True)
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert "error: rank 1: " in errors[0]
    assert all("it names step-00000001, which does not exist" in words for words in errors), errors


OUT_OF_MEMORY = """
import os, runpy
from unitoken.train.model.unitoken import UniToken

forward, seen = UniToken.forward, []

def fail_at_the_third(self, batch):
    seen.append(batch)
    if os.environ["RANK"] == "1" and len(seen) == 3:
        raise RuntimeError("out of memory, on rank 1 alone")
    return forward(self, batch)

UniToken.forward = fail_at_the_third
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_rank_that_fails_alone_ends_all_with_its_error(folder: Path, tmp_path: Path) -> None:
    """The other ranks wait for its shards; if it waited for them the run would hang for half an hour."""
    command = ["-c", OUT_OF_MEMORY, write_stage(folder), f"save.folder={tmp_path}/run"]
    ranks = start(2, command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in reversed(ranks)]
    finally:
        finish(ranks, timeout=1)
    assert all(rank.returncode for rank in ranks)
    assert "RuntimeError: out of memory, on rank 1 alone" in errors[0], errors


def test_two_machines_train_as_one_under_torchrun(folder: Path, by_two: Path) -> None:
    """Two launchers of one rank each that connect to one address, with the command of the README."""
    port, settings = free_port(), dry(folder, "torchrun")["overrides"]
    options = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
        "--node_rank",
    ]
    nodes = [
        subprocess.Popen(
            [BIN / "torchrun", *options, str(node), ROOT / "train.py", folder / "dry.yaml", *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]
    assert finish(nodes) == [0, 0]
    assert curve(folder / "torchrun") == curve(by_two)


def test_two_machines_train_as_one_under_slurm_and_composer(
    folder: Path, by_two: Path, tmp_path: Path
) -> None:
    """The example starts Composer's launcher on each machine of a simulated cluster."""
    (tmp_path / ".venv").symlink_to(BIN.parent)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    commands = {
        "scontrol": 'test "$*" = "show hostnames 127.0.0.[1-2]"; echo 127.0.0.1; echo 127.0.0.2',
        "srun": "while [[ $1 == --* ]]; do shift; done; "
        'SLURM_NODEID=0 "$@" & first=$!; SLURM_NODEID=1 "$@"; wait $first',
    }
    for name, text in commands.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": free_port(),
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }
    subprocess.run(
        ["bash", ROOT / "examples/slurm-train.sh", folder / "dry.yaml", *dry(folder, "slurm")["overrides"]],
        env={
            **os.environ,
            **slurm,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    assert curve(folder / "slurm") == curve(by_two)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.global_batch=3",
            "data.global_batch: 3 packs can not be shared evenly by 2 ranks; take a multiple of 2",
        ),
        ("fsdp.replicas=3", "fsdp.replicas: 2 ranks can not be shared evenly by 3 copies of the model"),
    ],
)
def test_wrong_settings_are_one_line_and_status_2_at_once(override: str, message: str, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", write_stage(folder, name="wrong"), override],
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""
