"""Some prompts for images lose their text: the same ones in every world and after a resume."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.small_datasets import BLOCK, make_record, small_vocabulary, write_dataset
from unitoken.common.errors import ConfigError
from unitoken.dataset.record import IGNORED, Record
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading.batch import unpack
from unitoken.streaming_data.reading.loader import PackedLoader, build_loader
from unitoken.streaming_data.reading.null_prompts import drop_captions, is_drawn, without_text
from unitoken.streaming_data.settings import DataConfig

VOCABULARY = small_vocabulary()
GROUP = 4
Rows = list[tuple[int, ...]]


def drawing(name: str, text: int, question_images: int = 0) -> Record:
    """Return a record whose text is all in the question and whose answer is an image, like real ones."""
    record = make_record(name, VOCABULARY, text, question_images, answer_images=1)
    first = int(record.image_spans[-1, 0])
    asked, answer = record.tokens[:first], record.tokens[first:]
    spans = record.image_spans.copy()
    spans[-1, :2] += 1
    tokens = np.concatenate([asked, [VOCABULARY.end_of_turn], answer]).astype(np.uint16)
    targets = np.array([[first + 1, len(tokens)]], np.uint32)
    return Record(name, tokens, targets, spans, record.images)


def test_a_null_prompt_is_beginning_images_and_end_of_turn() -> None:
    record = drawing("d", 6, question_images=2)
    end = int(record.target_spans[0, 0])
    null = without_text(record, end)
    pictures = record.tokens[1 : 1 + 2 * BLOCK].tolist()
    assert null.tokens[: 2 + 2 * BLOCK].tolist() == [VOCABULARY.bos, *pictures, VOCABULARY.end_of_turn]
    assert null.tokens[2 + 2 * BLOCK :].tolist() == record.tokens[end:].tolist()
    assert null.images == record.images
    for (first, last, *size), (old_first, old_last, *old_size) in zip(
        null.image_spans, record.image_spans, strict=True
    ):
        assert null.tokens[first:last].tolist() == record.tokens[old_first:old_last].tolist()
        assert size == old_size


def test_null_prompts_keep_all_targets() -> None:
    record = drawing("d", 6)
    null = without_text(record, int(record.target_spans[0, 0]))
    labels, old = null.labels(), record.labels()
    assert labels[labels != IGNORED].tolist() == old[old != IGNORED].tolist()
    assert labels[:2].tolist() == [IGNORED, IGNORED]
    assert null.tokens[:3].tolist() == [VOCABULARY.bos, VOCABULARY.end_of_turn, VOCABULARY.image_start]


def test_only_what_begins_with_an_image_is_drawn() -> None:
    assert is_drawn(drawing("d", 6))
    assert is_drawn(drawing("d", 6, question_images=1))
    assert not is_drawn(make_record("q", VOCABULARY, 6, question_images=1))
    assert not is_drawn(make_record("text", VOCABULARY, 6))
    assert not is_drawn(make_record("text first", VOCABULARY, 6, answer_images=1))


def test_the_fraction_is_exact_and_other_documents_stay() -> None:
    drawn, asked = (
        [drawing(f"d{n}", 6) for n in range(4000)],
        [make_record(f"q{n}", VOCABULARY, 6, 1) for n in range(50)],
    )
    (found,) = drop_captions([drawn + asked], 0.25, seed=0, epoch=0)
    dropped = [len(a.tokens) < len(b.tokens) for a, b in zip(found, drawn + asked, strict=True)]
    assert 0.22 < np.mean(dropped[:4000]) < 0.28  # four standard deviations
    assert not any(dropped[4000:])
    assert found[4000:] == asked
    others = [
        [len(a.tokens) for a in next(drop_captions([drawn], 0.25, seed, epoch))]
        for seed, epoch in ((0, 0), (1, 0), (0, 1))
    ]
    assert others[0] != others[1] != others[2] != others[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [drawing(f"d{n}", 4 + n % 7) for n in range(120)]
    records += [make_record(f"q{n}", VOCABULARY, 6 + n % 5, question_images=1) for n in range(40)]
    return write_dataset(tmp_path_factory.mktemp("data") / "all", records, VOCABULARY).parent


def open_loader(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int = 0, ranks: int = 1, **settings: Any
) -> PackedLoader:
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, str(value))
    given = {"packed_length": 64, "global_batch": GROUP, "cache": str(folder / "cache"), **settings}
    config = DataConfig.model_validate(
        {"streams": {"all": {"local": str(folder / "all"), "held_out": 0.2}}, **given}
    )
    return build_loader(
        config,
        views=Views(8, 4),
        vocabulary=VOCABULARY,
        batch_packs=config.global_batch // ranks,
        compat=False,
    )


def rows(loader: PackedLoader) -> list[Rows]:
    return [sorted(map(tuple, batch["input_ids"].tolist())) for batch in loader]


def null_blocks(batches: list[Rows]) -> set[str]:
    """Return the images with a null prompt before them."""
    text = "".join(chr(token) for batch in batches for row in batch for token in row)
    prompt = chr(VOCABULARY.bos) + chr(VOCABULARY.end_of_turn)
    return {block[:BLOCK] for block in text.split(prompt)[1:]}


def drawings(batches: list[Rows]) -> int:
    text = "".join(chr(token) for batch in batches for row in batch for token in row)
    return text.count(chr(VOCABULARY.end_of_turn) + chr(VOCABULARY.image_start))


def test_the_same_batches_on_two_ranks_and_after_a_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(folder, monkeypatch, null_prompt_fraction=0.4)
    first, second = rows(loader), rows(loader)
    nulls = [null_blocks(first), null_blocks(second)]
    assert all(0.25 < len(blocks) / drawings(first) < 0.55 for blocks in nulls)
    assert len(nulls[0] & nulls[1]) < 0.7 * len(nulls[0]), "other ones in each epoch"
    halves = [rows(open_loader(folder, monkeypatch, rank, 2, null_prompt_fraction=0.4)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == first
    assert rows(open_loader(folder, monkeypatch, null_prompt_fraction=0.4, workers=2)) == first

    stopped = open_loader(folder, monkeypatch, null_prompt_fraction=0.4)
    iterator = iter(stopped)
    for _ in range(3):
        next(iterator)
    resumed = open_loader(folder, monkeypatch, null_prompt_fraction=0.4)
    resumed.dataset.load_state_dict(stopped.dataset.state_dict(3 * GROUP, True))
    assert rows(resumed) == first[3:]
    assert rows(resumed) == second


def test_without_a_fraction_or_held_out_nothing_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, none = open_loader(folder, monkeypatch), open_loader(folder, monkeypatch, null_prompt_fraction=0.0)
    assert none.dataset.recipe.hash == plain.dataset.recipe.hash
    batches = rows(plain)
    assert rows(none) == batches
    assert not null_blocks(batches)
    held_out: dict[str, Any] = {"split": "held_out", "global_batch": 1}
    assert rows(open_loader(folder, monkeypatch, null_prompt_fraction=0.9, **held_out)) == rows(
        open_loader(folder, monkeypatch, **held_out)
    )


def test_resuming_with_another_fraction_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = open_loader(folder, monkeypatch, null_prompt_fraction=0.1).dataset.state_dict(0, True)
    with pytest.raises(ConfigError, match=r"null_prompt_fraction: 0\.1, now 0\.2"):
        open_loader(folder, monkeypatch, null_prompt_fraction=0.2).dataset.load_state_dict(state)


def test_labels_and_places_of_features_follow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in questions that lost their text keep their features inside their blocks."""
    record = drawing("d", 6, question_images=1)
    null = without_text(record, int(record.target_spans[0, 0]))
    loader = open_loader(folder, monkeypatch)
    batch = unpack(loader.collate_fn([[null, dataclasses.replace(record, id="e")]]))
    columns = batch["feature_columns"].tolist()
    assert columns == [BLOCK + 1 + n for n in range(4)] + [(columns[4] + n) for n in range(4)]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids[columns[0] - 1] == VOCABULARY.separator
    assert ids[columns[3] + 1] == VOCABULARY.image_end
    assert ids[columns[3] + 2] == VOCABULARY.end_of_turn
    assert labels[columns[3] + 3] == ids[columns[3] + 3] == VOCABULARY.image_start
