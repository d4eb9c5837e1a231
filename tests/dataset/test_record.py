"""A record and its MDS columns: reading gives what was written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unitoken.dataset.record import IGNORED, Record, columns, labels, pack_bytes, spans_of, unpack_bytes

masks = hnp.arrays(np.bool_, st.integers(0, 60))


@given(masks)
def test_labels_of_a_masks_spans_are_the_mask(mask: np.ndarray) -> None:
    spans = spans_of(mask)
    tokens = np.arange(1, len(mask) + 1)
    assert labels(tokens, spans).tolist() == [
        token if on else IGNORED for token, on in zip(tokens.tolist(), mask, strict=True)
    ]
    flat = spans.reshape(-1).astype(int)
    assert (np.diff(flat) > 0).all()  # no empty spans, and none that touch


def test_spans_are_half_open() -> None:
    assert spans_of(np.array([1, 0, 1, 1], bool)).tolist() == [[0, 1], [2, 4]]


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_packed_bytes_are_unpacked(parts: list[bytes]) -> None:
    assert unpack_bytes(pack_bytes(parts)) == tuple(parts)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.binary(min_size=1, max_size=9))
def test_packed_bytes_of_another_length_are_an_error(parts: list[bytes], more: bytes) -> None:
    packed = pack_bytes(parts)
    with pytest.raises(ValueError, match=r"bytes"):
        unpack_bytes(packed + more)
    for length in range(len(packed)):
        with pytest.raises(ValueError, match=r".+"):
            unpack_bytes(packed[:length])


def test_no_images_take_four_bytes() -> None:
    assert unpack_bytes(pack_bytes([])) == ()
    assert len(pack_bytes([])) == 4


@pytest.mark.parametrize(("size", "width"), [(65_536, "uint16"), (65_537, "uint32")])
def test_tokens_take_16_bits_if_the_vocabulary_fits(size: int, width: str) -> None:
    assert columns(size)["tokens"] == f"ndarray:{width}"


@pytest.mark.parametrize("images", [(), (b"first", b"second")])
def test_a_record_goes_through_mds_encodings(images: tuple[bytes, ...]) -> None:
    from streaming.base.format.mds.encodings import mds_decode, mds_encode

    spans = np.arange(4 * len(images), dtype=np.uint32).reshape(-1, 4)
    record = Record("a", np.arange(9, dtype=np.uint16), np.array([[2, 4], [6, 9]], np.uint32), spans, images)
    types = columns(65_536)
    sample = {
        name: mds_decode(types[name], mds_encode(types[name], value))
        for name, value in record.to_mds().items()
    }
    found = Record.from_mds(sample)
    assert (found.id, found.images) == ("a", images)
    assert found.tokens.dtype == np.uint16
    assert (found.tokens == record.tokens).all()
    assert (found.target_spans == record.target_spans).all()
    assert (found.image_spans == spans).all()
    assert found.labels().tolist() == [-100, -100, 2, 3, -100, -100, 6, 7, 8]
