"""Sharded checkpoints: any number of ranks reads what any number has written, and nothing in them can run."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from support.checkpoints import share, write_checkpoint
from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.locations import INDEX, find_origin
from unitoken.train.checkpoint.plain_values import from_plain, to_plain
from unitoken.train.checkpoint.sharded import WEIGHTS, ShardedCheckpoint
from unitoken.train.checkpoint.sharded_index import dump_checkpoint_index, read_checkpoint_index
from unitoken.train.checkpoint.tensor_file import write_tensors

WHOLE = {
    "matrix": torch.arange(70.0).reshape(10, 7),
    "gain": torch.arange(3.0),  # fewer rows than ranks
    "rounded": torch.arange(12.0).reshape(4, 3).to(torch.bfloat16),
}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4), (3, 5)])
def test_any_number_of_ranks_reads_its_own_rows(before: int, after: int, tmp_path: Path) -> None:
    saved = ShardedCheckpoint(write_checkpoint(tmp_path, 1, WHOLE, ranks=before))
    for rank in range(after):
        for piece in share(WHOLE, rank, after):
            rows = torch.full_like(piece.rows, -1)
            saved.read_rows(piece.name, piece.first, rows)
            assert torch.equal(rows, piece.rows), piece.name
    for name, tensor in WHOLE.items():
        assert torch.equal(saved.read(f"{WEIGHTS}{name}"), tensor)


def test_a_ranks_file_is_a_safetensors_file(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1, WHOLE, ranks=2)
    with safe_open(checkpoint / "00001-of-00002.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"{WEIGHTS}{name}" for name in WHOLE}
        assert torch.equal(file.get_tensor(f"{WEIGHTS}matrix"), WHOLE["matrix"][5:])


def test_the_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    import hashlib

    layout: Any = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in WHOLE.items()}
    names = ["gain", "matrix", "rounded"]  # large elements first, so that all are aligned
    written = write_tensors(tmp_path / "x", layout, [(name, WHOLE[name]) for name in names])
    content = (tmp_path / "x").read_bytes()
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert all(offset % WHOLE[name].itemsize == 0 for name, offset in written.offsets.items())


def test_the_state_of_a_loop_comes_back_exactly() -> None:
    state = {
        "time": datetime.timedelta(days=3, seconds=5, microseconds=7),
        "random": (3, (1, 2**31), None),
        "numbers": np.arange(5, dtype=np.uint32),
        "bytes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "float": 0.1 + 0.2,
        "nested": [{"a": {1: "b", "$c": 2}}, True, np.float64(0.5), np.int64(3)],
    }
    back = from_plain(json.loads(json.dumps(to_plain(state))))
    assert str(back) == str({**state, "nested": [{"a": {1: "b", "$c": 2}}, True, 0.5, 3]})
    assert back["numbers"].dtype == np.uint32
    assert (back["bytes"].dtype, type(back["random"][1])) == (torch.uint8, tuple)
    with pytest.raises(TypeError, match="a checkpoint can not hold a PosixPath"):
        to_plain([Path()])


@pytest.mark.parametrize(
    "value",
    [
        {"$call": ["os.system", "echo attacked"]},
        {"$array": ["O", [1], "AAAAAAAAAAA="]},
        {"$array": ["<f4", [10**12], "AAAA"]},
        {"$tensor": ["F32", [3], "AAAA"]},
        {"$tensor": ["pickle", [1], "AAAA"]},
        {"$tensor": 3},
        {"$time": ["a"]},
        {"$items": [1]},
    ],
)
def test_a_state_of_another_form_is_refused(value: Any, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1, WHOLE)
    change(checkpoint, lambda fields: fields["state"].update(x=value))
    with pytest.raises(ConfigError, match=r"step-00000001: not a checkpoint of this program: (\$|unknown)"):
        ShardedCheckpoint(checkpoint)


def change(checkpoint: Path, action: Any) -> None:
    """Change the index of a checkpoint, as one from elsewhere may have been made."""
    fields = json.loads((checkpoint / INDEX).read_bytes())
    del fields["sha256"]
    action(fields)
    (checkpoint / INDEX).write_bytes(dump_checkpoint_index(fields))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda f: f["files"][0].update(name="../../etc/passwd"), "should match pattern"),
        (lambda f: f["files"][0].update(bytes=100), "has no place for its row 0"),
        (lambda f: f["tensors"]["model/matrix"]["rows"].pop(0), "model/matrix has no place for its row 0"),
        (lambda f: f["tensors"]["model/matrix"]["rows"].pop(), "model/matrix has 5 of 10 rows"),
        (lambda f: f["tensors"]["model/matrix"].update(shape=[10, 10**9]), "has no place for its row 0"),
        (lambda f: f["tensors"]["model/gain"].update(dtype="O"), "has the data type O"),
        (lambda f: f.update(version=2), "version: Input should be 1|version"),
        (lambda f: f.update(more=1), "more"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(action: Any, message: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1, WHOLE, ranks=2)
    change(checkpoint, action)
    with pytest.raises(ConfigError, match=message) as caught:
        read_checkpoint_index(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_index_is_an_incomplete_one(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1, WHOLE)
    assert find_origin(str(checkpoint)) == checkpoint
    (checkpoint / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"an incomplete checkpoint: it has no checkpoint\.json"):
        find_origin(str(checkpoint))
