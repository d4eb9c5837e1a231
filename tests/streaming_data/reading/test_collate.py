"""Packs of records become batches."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support.small_datasets import BLOCK, make_record, small_vocabulary
from unitoken.dataset.record import IGNORED, Record
from unitoken.dataset.vision_views import Views
from unitoken.storage.shard_cache import ShardError
from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.reading.batch import Batch, unpack
from unitoken.streaming_data.reading.collate import Collate, FeaturePlace, featured_images, insert_features

VOCABULARY = small_vocabulary()
VIEWS = Views(image_size=8, patch_size=4)
F = 4
SEP = VOCABULARY.separator


def collate(
    continuous: str = "questions", length: int = 80, threads: int | None = None, streams: int = 1
) -> Callable[[list[list[Record]]], Batch]:
    """Return a function that makes of packs what a model reads."""
    packed = Collate(length, VIEWS, continuous, SEP, VOCABULARY.newline, False, streams, threads=threads)
    return lambda packs: unpack(packed(packs))


def record(name: str, text: int = 6, questions: int = 0, answers: int = 0) -> Record:
    return make_record(name, VOCABULARY, text, questions, answers)


def inserted(
    rec: Record, continuous: str, compat: bool = False
) -> tuple[Integers, Integers, list[FeaturePlace]]:
    document = insert_features(
        rec, dict.fromkeys(featured_images(rec.labels(), rec.image_spans, continuous), F), SEP, compat
    )
    return document.ids, document.labels, list(document.places)


def test_features_follow_a_separator_before_the_end_of_the_image() -> None:
    rec = record("a", questions=1)
    ids, labels, places = inserted(rec, "questions")
    end = 1 + BLOCK - 1  # bos, block without its last token
    assert ids.tolist() == [*rec.tokens[:end], SEP, 0, 0, 0, 0, VOCABULARY.image_end, *rec.tokens[end + 1 :]]
    assert labels.tolist() == [*rec.labels()[:end], *[IGNORED] * 5, *rec.labels()[end:]]
    assert places == [(0, end + 1)]


@pytest.mark.parametrize(("continuous", "images"), [("questions", [0, 1]), ("all", [0, 1, 2]), ("none", [])])
def test_which_images_have_features(continuous: str, images: list[int]) -> None:
    rec = record("a", questions=2, answers=1)
    ids, labels, places = inserted(rec, continuous)
    assert [image for image, _ in places] == images
    assert len(ids) == len(labels) == len(rec.tokens) + (1 + F) * len(images)
    assert np.delete(ids, [p + i for _, p in places for i in range(-1, F)]).tolist() == rec.tokens.tolist(), (
        "all else stays"
    )
    for _, start in places:
        assert ids[start - 1] == SEP
        assert (labels[start - 1 : start + F] == IGNORED).all()
        assert ids[start + F] == VOCABULARY.image_end


def test_compat_trains_on_the_separator_of_every_image() -> None:
    rec = record("a", questions=1, answers=1)
    ids, labels, places = inserted(rec, "all", compat=True)
    assert [image for image, _ in places] == [0, 1]
    assert [labels[start - 1] for _, start in places] == [SEP, SEP]
    assert (labels == SEP).sum() == 2
    for _, start in places:
        assert (labels[start : start + F] == IGNORED).all()
    assert ids[places[1][1] + F] == labels[places[1][1] + F] == VOCABULARY.image_end


def test_no_image_block_is_cut() -> None:
    rec = record("a", questions=2, answers=1)
    ids, _, places = inserted(rec, "all")
    for start in np.flatnonzero(ids == VOCABULARY.image_start):
        end = start + int(np.flatnonzero(ids[start:] == VOCABULARY.image_end)[0]) + 1
        block = [i for i in range(start, end) if not any(p - 1 <= i < p + F for _, p in places)]
        VOCABULARY.image_codes(ids[block])  # raises if the layout is broken


def test_a_batch_keeps_the_contract() -> None:
    packs = [[record("a", questions=1), record("b", text=9)], [record("c", text=3)]]
    supervised = sum(int((rec.labels()[1:] != IGNORED).sum()) for pack in packs for rec in pack)
    batch = collate()(packs)
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "input_ids": ((2, 80), torch.int64),
        "labels": ((2, 80), torch.int64),
        "position_ids": ((2, 80), torch.int64),
        "document_ids": ((2, 80), torch.int32),
        "kinds": ((2, 80), torch.int8),
        "stream_tokens": ((2, 1), torch.int64),
        "target_rows": ((supervised,), torch.int64),
        "target_columns": ((supervised,), torch.int64),
        "pixel_values": ((1, 3, 8, 8), torch.uint8),
        "view_rows": ((1,), torch.int64),
        "feature_rows": ((F,), torch.int64),
        "feature_columns": ((F,), torch.int64),
        "feature_views": ((F,), torch.int64),
        "feature_patches": ((F,), torch.int64),
    }
    first, second = 1 + BLOCK + 6 + 1 + 1 + F, 1 + 9 + 1
    assert batch["document_ids"][0].tolist() == [0] * first + [1] * second + [-1] * (80 - first - second)
    assert batch["position_ids"][0].tolist() == [*range(first), *range(second), *[0] * (80 - first - second)]
    used = first + second
    assert (batch["input_ids"][0, used:] == 0).all()
    assert (batch["labels"][0, used:] == IGNORED).all()
    assert batch["input_ids"][0, first : first + second].tolist() == packs[0][1].tokens.tolist()
    assert batch["labels"][0, first : first + second].tolist() == packs[0][1].labels().tolist(), "not shifted"


def test_kinds_tell_each_tokens_document_and_if_it_is_an_image() -> None:
    packs = [[record("t", text=9), record("q", questions=1), record("a", questions=1, answers=1)]]
    batch = collate(length=200, streams=2)(packs)
    kinds, ids = batch["kinds"][0].numpy(), batch["input_ids"][0].numpy()
    document = batch["document_ids"][0].numpy()
    assert (kinds[document < 0] == -1).all()
    assert [set(kinds[document == n].tolist()) for n in range(3)] == [{0}, {2, 3}, {4, 5}]
    inside = np.zeros(len(ids), int)
    for first, end in zip(
        np.flatnonzero(ids == VOCABULARY.image_start),
        np.flatnonzero(ids == VOCABULARY.image_end) + 1,
        strict=True,
    ):
        inside[first:end] = 1
    assert (kinds[document >= 0] % 2 == inside[document >= 0]).all()
    assert batch["stream_tokens"].tolist() == [[int((document >= 0).sum()), 0]]


def test_no_document_predicts_the_next_ones_first_token() -> None:
    trained_from_the_start = Record(
        "x", np.array([5, 6], np.uint16), np.array([[0, 2]], np.uint32), np.empty((0, 4), np.uint32), ()
    )
    labels = collate()([[record("a"), trained_from_the_start]])["labels"][0]
    start = len(record("a").tokens)
    assert labels[start : start + 2].tolist() == [IGNORED, 6]
    assert labels[0] == IGNORED


def test_feature_places_and_pixels_belong_to_their_image() -> None:
    packs = [[record("c", text=3)], [record("a", questions=2), record("b", questions=1)]]
    batch = collate(length=120)(packs)
    assert batch["view_rows"].tolist() == [1, 1, 1]
    assert batch["feature_rows"].tolist() == [1] * 3 * F
    assert batch["feature_views"].view(3, F).tolist() == [[n] * F for n in range(3)]
    assert batch["feature_patches"].view(3, F).tolist() == [list(range(F))] * 3
    images = [*packs[1][0].images, *packs[1][1].images]
    for pixels, positions, data in zip(
        batch["pixel_values"], batch["feature_columns"].view(3, F), images, strict=True
    ):
        expected = Image.open(io.BytesIO(data)).getpixel((0, 0))
        assert (pixels == torch.tensor(expected, dtype=torch.uint8)[:, None, None]).all()
        ids = batch["input_ids"][1]
        assert ids[positions[0] - 1] == SEP
        assert (ids[positions] == 0).all()
        assert (batch["labels"][1][positions] == IGNORED).all()
        assert ids[positions[-1] + 1] == VOCABULARY.image_end
        assert positions.tolist() == list(range(int(positions[0]), int(positions[0]) + F))


def test_a_batch_without_images_keeps_its_shapes() -> None:
    batch = collate("none")([[record("a", questions=1)]])
    assert batch["pixel_values"].shape == (0, 3, 8, 8)
    of_images = [name for name in batch if name.startswith(("feature", "view"))]
    assert len(of_images) == 5
    assert all(len(batch[name]) == 0 for name in of_images)
    without = Collate(80, None, "none", SEP, VOCABULARY.newline, False)([[record("a", questions=1)]])
    assert unpack(without)["input_ids"].tolist() == batch["input_ids"].tolist()


def test_a_pack_that_is_too_long_names_the_sample() -> None:
    with pytest.raises(ShardError, match="sample 'b' ends at 22 in a pack of 20"):
        collate(length=20)([[record("a", text=10), record("b", text=8)]])


def test_an_image_that_cannot_be_decoded_names_its_sample() -> None:
    rec = record("a", questions=1)
    broken = Record(rec.id, rec.tokens, rec.target_spans, rec.image_spans, (b"no image",))
    with pytest.raises(ValueError, match="sample 'a', image 0"):
        collate()([[broken]])


@given(
    text=st.integers(1, 30),
    questions=st.integers(0, 3),
    answers=st.integers(0, 3),
    limit=st.integers(1, 120),
    everything=st.booleans(),
)
def test_cutting_keeps_the_beginning_and_no_part_of_an_image(
    text: int, questions: int, answers: int, limit: int, everything: bool
) -> None:
    rec = record("a", text, questions, answers)
    images = featured_images(rec.labels(), rec.image_spans, "all" if everything else "questions")
    whole = insert_features(rec, dict.fromkeys(images, F), SEP)
    cut = whole.cut(limit)
    assert len(cut.ids) <= limit
    assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
    assert cut.labels.tolist() == whole.labels[: len(cut.ids)].tolist()
    assert (
        (cut.ids == VOCABULARY.image_start).sum()
        == (cut.ids == VOCABULARY.image_end).sum()
        == len(cut.blocks)
    )
    assert [image for image, _ in cut.places] == [image for image in images if image < len(cut.blocks)]
    if len(whole.ids) <= limit:
        assert cut is whole
    elif len(cut.ids) < limit:
        assert whole.ids[len(cut.ids)] == VOCABULARY.image_start, "cut short only where an image begins"


def test_an_id_beyond_the_vocabulary_names_its_sample() -> None:
    """On a GPU the embedding would end the process with an assertion that names no sample."""
    good, bad = record("a", text=5), record("b", text=5)
    bad = dataclasses.replace(bad, tokens=np.array([*bad.tokens[:-1], VOCABULARY.size], np.uint32))
    collate = Collate(80, VIEWS, "questions", SEP, VOCABULARY.newline, False, vocabulary_size=VOCABULARY.size)
    collate([[good, record("c", 1)]])
    with pytest.raises(
        ShardError,
        match=rf"sample 'b' holds the token id {VOCABULARY.size}, the vocabulary has {VOCABULARY.size}",
    ):
        collate([[good], [good, bad]])


def test_with_limits_documents_are_cut_to_their_streams_limit() -> None:
    cutting = Collate(80, VIEWS, "questions", SEP, VOCABULARY.newline, False, streams=2, limits=(80, 9))
    packs = [
        [
            dataclasses.replace(record("a", text=20), stream=1),
            dataclasses.replace(record("b", 3, 1), stream=1),
            record("c"),
        ]
    ]
    batch = unpack(cutting(packs))
    lengths = np.bincount(batch["document_ids"][0][batch["document_ids"][0] >= 0])
    assert lengths.tolist() == [9, 1, len(record("c").tokens)]
    assert len(batch["pixel_values"]) == 0
    assert batch["input_ids"][0, :9].tolist() == packs[0][0].tokens[:9].tolist()


def test_tiles_follow_the_whole_image_row_by_row() -> None:
    """A wide image: two tiles side by side, with black above and below."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 15), (200, 0, 0)).save(buffer, "PNG")
    rec = record("a", questions=1)
    rec = dataclasses.replace(rec, images=(buffer.getvalue(),))
    views = Views(image_size=8, patch_size=2, anyres=True)
    layout = views.layout(40, 15)
    batch = unpack(Collate(200, views, "questions", SEP, VOCABULARY.newline, False)([[rec]]))
    across, down = views.canvas(40, 15)
    assert batch["pixel_values"].shape == (1 + across * down, 3, 8, 8)
    places = batch["feature_columns"]
    start = int(places[0])
    newlines = [start + n for n in np.flatnonzero(layout < 0).tolist()]
    assert len(newlines) > 1
    assert (batch["input_ids"][0, newlines] == VOCABULARY.newline).all()
    assert (batch["labels"][0, start : start + len(layout)] == IGNORED).all()
    assert sorted([*places.tolist(), *newlines]) == list(range(start, start + len(layout)))
    sources = batch["feature_views"] * 16 + batch["feature_patches"]
    assert sources.tolist() == layout[layout >= 0].tolist()
    assert batch["input_ids"][0, start + len(layout)] == VOCABULARY.image_end


def test_threads_change_nothing() -> None:
    packs = [[record(f"{row}-{n}", questions=n) for n in range(3)] for row in range(3)]
    one, four = (collate(length=120, threads=threads)(packs) for threads in (1, 4))
    for name, value in one.items():
        assert torch.equal(value, four[name]), name
