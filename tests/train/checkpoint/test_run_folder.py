"""A run's folder: `latest` always names a whole checkpoint, and reading one can not run code."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from unitoken.common.errors import ConfigError
from unitoken.common.files import AsideFolder
from unitoken.train.checkpoint import run_folder
from unitoken.train.checkpoint.integrity import check_checkpoint, check_finite, damage
from unitoken.train.checkpoint.layouts import LATEST, find_origin, latest_checkpoint
from unitoken.train.checkpoint.run_folder import (
    check_resumable,
    clean_up,
    path_of,
    publish_checkpoint,
    read_checkpoint,
    set_aside_damaged,
    source_of,
    step_of,
    unpublished,
)

STAGE = {"name": "one", "trainable": ["vit"]}


def save(folder: Path, step: int, keep: int = 2, **state: Any) -> Path:
    folder.mkdir(exist_ok=True)
    model = {"network.lm_head.weight": torch.full((3, 2), float(step))}
    written = unpublished(folder, step)
    torch.save({"state": {"model": model, "callbacks": {"Saver": STAGE}, **state}}, written)
    publish_checkpoint(written, path_of(folder, step), keep)
    return path_of(folder, step)


def test_latest_names_the_newest_and_the_oldest_go(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save(tmp_path, step)
        assert latest_checkpoint(tmp_path) == path_of(tmp_path, step)
    assert {path.name for path in tmp_path.iterdir()} == {LATEST, "step-00000010.pt", "step-00000100.pt"}
    assert step_of, unpublished(path_of(tmp_path, 100)) == 100


@pytest.mark.parametrize("call", ["fsync", "replace", "symlink"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == path_of(tmp_path, 5)
    with AsideFolder(tmp_path / "model") as export:  # into this folder, by another process
        unpublished(tmp_path, 10).touch()
        for path in tmp_path.glob(".aside-*"):
            os.utime(path, (1, 1), follow_symlinks=False)
        clean_up(tmp_path)
        assert sorted(tmp_path.glob(".aside-*")) == [
            export.path,
            export.path.with_name(f"{export.path.name}.lock"),
        ]
    save(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == path_of(tmp_path, 10)


def test_between_two_checkpoints_there_is_always_a_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composer deletes its link before it makes the new one: killed in between, a run would start from the beginning."""
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
    assert {seen[0], seen[-1]} == {path_of(tmp_path, 5), path_of(tmp_path, 10)}


def test_weights_come_without_the_trainers_prefix(tmp_path: Path) -> None:
    source = source_of(find_origin(str(save(tmp_path, 7).parent)))
    assert source.shapes == {"lm_head.weight": (3, 2)}
    assert torch.equal(source.load()["lm_head.weight"], torch.full((3, 2), 7.0))


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("echo attacked",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, 1, scaler=Attack())
    with pytest.raises(ConfigError, match=r"it holds a (posix|os)\.system, which could run code"):
        read_checkpoint(path)
    assert "attacked" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"state": 1})])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a checkpoint of this program"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("expected", "stage", "message"),
    [
        ({"lm_head.weight": (3, 2)}, {**STAGE, "name": "two"}, "`name` 'one', this one has 'two'"),
        ({"lm_head.weight": (3, 2)}, {**STAGE, "trainable": ["model"]}, r"`trainable` \['vit'\]"),
        ({"lm_head.weight": (3, 4)}, STAGE, r"shape \(3, 2\), the model needs \(3, 4\)"),
        ({}, STAGE, r"not part of this model: lm_head\.weight"),
    ],
)
def test_a_checkpoint_of_another_stage_is_not_resumed(
    expected: Any, stage: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_resumable(save(tmp_path, 1), expected, stage)
    check_resumable(path_of(tmp_path, 1), {"lm_head.weight": (3, 2)}, STAGE)


def test_a_link_to_nothing_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    save(tmp_path, 3).unlink()
    with pytest.raises(ConfigError, match=r"it names step-00000003\.pt, which is not there"):
        latest_checkpoint(tmp_path)


def test_without_the_link_the_newest_checkpoint_is_taken_and_kept(tmp_path: Path) -> None:
    """Copied with `cp -rL` or by way of an object store, a run began anew, and what it saved deleted what was trained."""
    save(tmp_path / "run", 5)
    save(tmp_path / "run", 10)
    for kept in ("as a file", "not at all"):
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / kept))  # follows links
        if kept == "not at all":
            (copy / LATEST).unlink()
        assert latest_checkpoint(copy) == path_of(copy, 10)
        assert find_origin(str(copy)) == path_of(copy, 10)
        save(copy, 15)
        assert {path.name for path in copy.iterdir()} == {LATEST, "step-00000010.pt", "step-00000015.pt"}
        assert (copy / LATEST).readlink() == Path("step-00000015.pt")


def test_a_copied_link_with_nothing_beside_it_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    (tmp_path / LATEST).write_bytes(b"a checkpoint")
    with pytest.raises(
        ConfigError, match=r"latest: it is no link, and there is no step-00000100\.pt or the like beside it"
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
    path = save(tmp_path, 5, big=torch.arange(2000))
    assert damage(path) is None
    at = path.read_bytes().index(torch.arange(2000).numpy().tobytes())
    flipped(path, at + part * 2000)
    assert str(damage(path)).startswith("Bad CRC-32 for file")
    with pytest.raises(ConfigError, match=r"step-00000005\.pt: damaged: Bad CRC-32"):
        check_checkpoint(path)


@pytest.mark.parametrize("size", [0, 100, 5000, -1, -300])
def test_a_cut_checkpoint_is_found(size: int, tmp_path: Path) -> None:
    path = save(tmp_path, 5, big=torch.arange(2000))
    path.write_bytes(path.read_bytes()[:size])
    assert damage(path)


def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step, keep=3)
    assert set_aside_damaged(tmp_path) == []
    for step in (10, 15):
        path = path_of(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-200])
    lines = set_aside_damaged(tmp_path)
    assert [line.rpartition("; ")[2] for line in lines] == [
        "goes on from step-00000010.pt",
        "goes on from step-00000005.pt",
    ]
    assert latest_checkpoint(tmp_path) == path_of(tmp_path, 5)
    assert len(list(tmp_path.glob("damaged-*"))) == 2, "kept to be looked at"
    path_of(tmp_path, 5).write_bytes(b"")
    with pytest.raises(ConfigError, match="no other to go on from: remove it to begin anew"):
        set_aside_damaged(tmp_path)


def test_weights_that_are_no_numbers_are_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    check_finite([("a", torch.ones(3)), ("b", torch.ones(3, dtype=torch.int64))], "here")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="here: the tensor b holds NaN"):
            check_finite([("a", torch.ones(3)), ("b", torch.tensor([1.0, bad]))], "here")
    path = tmp_path / "step-00000001.pt"
    torch.save({"state": {"model": {"network.x": torch.tensor([float("nan")])}}}, path)
    with pytest.raises(ConfigError, match="the tensor x holds NaN"):
        source_of(path).load()
