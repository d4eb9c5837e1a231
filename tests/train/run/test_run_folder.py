"""A run's folder: `latest` always names a complete checkpoint, and reading a checkpoint can not run code."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import write_checkpoint, write_whole_file
from unitoken.common.errors import ConfigError
from unitoken.common.files import AsideFolder
from unitoken.train.checkpoint.integrity import check_checkpoint, check_finite, find_damage
from unitoken.train.checkpoint.locations import INDEX, LATEST, find_origin, latest_checkpoint, step_of
from unitoken.train.run import run_folder
from unitoken.train.run.run_folder import (
    check_resumable,
    checkpoint_path,
    open_checkpoint,
    read_whole_file,
    remove_partial_files,
    set_aside_damaged,
)

STAGE = {"name": "one", "trainable": ["vit"]}
FORMS = pytest.mark.parametrize("write", [write_checkpoint, write_whole_file])


def head(step: int) -> dict[str, torch.Tensor]:
    return {"lm_head.weight": torch.full((3, 2), float(step))}


def save(folder: Path, step: int, keep: int = 2, ranks: int = 2) -> Path:
    return write_checkpoint(folder, step, head(step), keep=keep, ranks=ranks, callbacks={"Saver": STAGE})


def test_latest_names_the_newest_and_the_oldest_are_removed(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save(tmp_path, step)
        assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, step)
    assert {path.name for path in tmp_path.iterdir()} == {LATEST, "step-00000010", "step-00000100"}
    assert step_of(checkpoint_path(tmp_path, 100)) == 100


@pytest.mark.parametrize("call", ["fsync", "replace", "symlink"])
def test_a_kill_while_saving_leaves_the_earlier_checkpoint(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 5)
    with AsideFolder(tmp_path / "model") as export:  # an export into this folder by another process
        (tmp_path / ".aside-step-00000010.pt").touch()  # as once
        for path in tmp_path.glob(".aside-*"):
            os.utime(path, (1, 1), follow_symlinks=False)
        remove_partial_files(tmp_path)
        assert sorted(tmp_path.glob(".aside-*")) == [
            export.path,
            export.path.with_name(f"{export.path.name}.lock"),
        ]
    assert checkpoint_path(tmp_path, 10).exists() == (call == "symlink"), "incomplete checkpoints are removed"
    save(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 10)


def test_between_two_checkpoints_there_is_always_a_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composer deletes its link before it makes the new one: a run killed in between would start again."""
    save(tmp_path, 5)
    seen = []
    for name in ("replace", "unlink", "symlink", "remove"):
        real = getattr(os, name)

        def watched(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            seen.append(latest_checkpoint(tmp_path))
            result = real(*args, **kwargs)
            seen.append(latest_checkpoint(tmp_path))
            return result

        monkeypatch.setattr(os, name, watched)
    save(tmp_path, 10, keep=1)
    assert None not in seen
    assert {seen[0], seen[-1]} == {checkpoint_path(tmp_path, 5), checkpoint_path(tmp_path, 10)}


@FORMS
def test_weights_come_without_the_trainers_prefix(write: Any, tmp_path: Path) -> None:
    source = open_checkpoint(find_origin(str(write(tmp_path, 7, head(7)).parent)))
    assert source.shapes == {"lm_head.weight": (3, 2)}
    assert torch.equal(source.load()["lm_head.weight"], torch.full((3, 2), 7.0))


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("echo attacked",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_whole_file(tmp_path, 1, head(1), scaler=Attack())
    with pytest.raises(ConfigError, match=r"it holds a (posix|os)\.system, which could run code"):
        read_whole_file(path)
    assert "attacked" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"state": 1})])
def test_a_file_that_is_not_a_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a checkpoint of this program"):
        read_whole_file(path)


@pytest.mark.parametrize(
    ("expected", "stage", "message"),
    [
        ({"lm_head.weight": (3, 2)}, {**STAGE, "name": "two"}, "`name` 'one', this one has 'two'"),
        ({"lm_head.weight": (3, 2)}, {**STAGE, "trainable": ["model"]}, r"`trainable` \['vit'\]"),
        ({"lm_head.weight": (3, 4)}, STAGE, r"shape \(3, 2\), the model needs \(3, 4\)"),
        ({}, STAGE, r"not part of this model: lm_head\.weight"),
    ],
)
@FORMS
def test_a_checkpoint_of_another_stage_is_not_resumed(
    write: Any, expected: Any, stage: Any, message: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path, 1, head(1), callbacks={"Saver": STAGE})
    with pytest.raises(ConfigError, match=message):
        check_resumable(checkpoint, expected, stage)
    check_resumable(checkpoint, {"lm_head.weight": (3, 2)}, STAGE)


def test_a_link_to_nothing_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    (save(tmp_path, 3) / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"it names step-00000003, which has no checkpoint\.json"):
        latest_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(ConfigError, match="it names step-00000003, which does not exist"):
        latest_checkpoint(tmp_path)


def test_without_the_link_the_newest_checkpoint_is_used(tmp_path: Path) -> None:
    """Copied with `cp -rL` or by an object store, a run once started again and deleted its checkpoints."""
    save(tmp_path / "run", 5)
    save(tmp_path / "run", 10)
    for kept in ("as a folder", "not at all"):
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / kept))  # follows links
        if kept == "not at all":
            shutil.rmtree(copy / LATEST)
        assert latest_checkpoint(copy) == checkpoint_path(copy, 10)
        assert find_origin(str(copy)) == checkpoint_path(copy, 10)
        save(copy, 15)
        assert {path.name for path in copy.iterdir()} == {LATEST, "step-00000010", "step-00000015"}
        assert (copy / LATEST).readlink() == Path("step-00000015")


def test_a_copied_link_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LATEST).write_bytes(b"a checkpoint")
    with pytest.raises(
        ConfigError, match=r"latest: it is not a link, and there is no step-\* beside it to resume from"
    ):
        latest_checkpoint(tmp_path)


def test_a_folder_without_a_checkpoint_is_an_error_for_init_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did that stage run"):
        find_origin(str(tmp_path))
    assert run_folder.SAFE_TYPES


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", range(7))
def test_a_flipped_bit_of_a_tensor_is_found(part: int, tmp_path: Path) -> None:
    big = torch.arange(2000.0)
    path = write_whole_file(tmp_path, 5, {"big": big})
    assert find_damage(path) is None
    flipped(path, path.read_bytes().index(big.numpy().tobytes()) + part * 1000)
    assert str(find_damage(path)).startswith("Bad CRC-32 for file")
    with pytest.raises(ConfigError, match=r"step-00000005\.pt: damaged: Bad CRC-32"):
        check_checkpoint(path)


@pytest.mark.parametrize("name", ["00000-of-00002.safetensors", "00001-of-00002.safetensors", INDEX])
def test_a_flipped_bit_of_any_file_is_found(name: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 5)
    assert find_damage(checkpoint) is None
    whole = (checkpoint / name).read_bytes()
    for at in range(0, len(whole) - 1, 7):  # the last byte of the index is the end of its line
        flipped(checkpoint / name, at)
        assert find_damage(checkpoint), at
        with pytest.raises(ConfigError, match="step-00000005: damaged: "):
            check_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(whole)
    (checkpoint / name).unlink()
    assert find_damage(checkpoint)


@pytest.mark.parametrize("size", [0, 100, 5000, -1, -300])
def test_a_cut_checkpoint_is_found(size: int, tmp_path: Path) -> None:
    path = write_whole_file(tmp_path, 5, {"big": torch.arange(2000.0)})
    path.write_bytes(path.read_bytes()[:size])
    assert find_damage(path)


def test_a_run_resumes_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step, keep=3)
    assert set_aside_damaged(tmp_path) == []
    for step in (10, 15):
        path = checkpoint_path(tmp_path, step) / "00001-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    lines = set_aside_damaged(tmp_path)
    assert [line.rpartition("; ")[2] for line in lines] == [
        "resumes from step-00000010",
        "resumes from step-00000005",
    ]
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 5)
    assert len(list(tmp_path.glob("damaged-*"))) == 2, "kept for inspection"
    (checkpoint_path(tmp_path, 5) / INDEX).write_bytes(b"")
    with pytest.raises(ConfigError, match="no other to resume from: remove it to start again"):
        set_aside_damaged(tmp_path)


def test_non_finite_weights_are_an_error_naming_the_tensor(tmp_path: Path) -> None:
    check_finite([("a", torch.ones(3)), ("b", torch.ones(3, dtype=torch.int64))], "here")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="here: the tensor b holds NaN"):
            check_finite([("a", torch.ones(3)), ("b", torch.tensor([1.0, bad]))], "here")
    for write in (write_checkpoint, write_whole_file):
        with pytest.raises(ConfigError, match="the tensor x holds NaN"):
            open_checkpoint(write(tmp_path, 1, {"x": torch.tensor([float("nan")])})).load()
