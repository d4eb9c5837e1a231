"""Plain pickles are read, and nothing in any pickle is run."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from unitoken.codec.conversations import ItemError
from unitoken.tokenize.plain_pickle import PlainUnpickler, load_plain


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    touched = tmp_path / "touched"
    data = pickle.dumps({"token": Evil(touched)}, protocol)
    with pytest.raises(
        ItemError, match=r"not a plain pickle: a.pkl: (GLOBAL|STACK_GLOBAL|UNICODE|MARK|PUT|.*) at byte \d+"
    ):
        load_plain(data, "a.pkl")
    with pytest.raises(pickle.UnpicklingError, match=r"system is not a list, dict, text or number"):
        PlainUnpickler(io.BytesIO(data)).load()  # the second wall, behind the first
    assert not touched.exists()
    pickle.loads(data)
    assert touched.exists(), "it would have done harm"


@pytest.mark.parametrize(
    "value", [{"a": [1, -1, 256, 70000, -(2**40), 2**100, 1.5, True, False, None, "text", "x" * 300]}, [], {}]
)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read(value: Any, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol), "a.pkl") == value
    # More values than fit in one frame or a memo number of one byte:
    many = [[n] * 3 + [str(n)] for n in range(2000)]
    assert load_plain(pickle.dumps(many, protocol), "a.pkl") == many


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04K\x01r" + struct.pack("<I", 1 << 31) + b".",  # a memo of 32 GB
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a bytearray of a terabyte
        b"\x80\x04X" + struct.pack("<I", 1 << 31) + b".",  # a text longer than the file
        b"\x80\x04\x8b" + struct.pack("<I", 1 << 30) + b".",  # a number of a gigabyte
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02}Pone\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x04]}b.",  # BUILD
    ],
)
def test_other_operations_of_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(ItemError, match="not a plain pickle"):
        load_plain(data, "a.pkl")
