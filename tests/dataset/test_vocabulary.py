"""The vocabulary: ids are looked up by name, and image blocks are decoded to their codes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import (
    MAX_GRID,
    SPECIAL_NAMES,
    Vocabulary,
    check_same_vocabulary,
    grid_name,
    image_code_name,
)

PLAIN = Vocabulary.from_tokens({f"t{n}": n for n in range(50)}, codebook_size=64)


def test_names_of_image_codes() -> None:
    assert [image_code_name(code) for code in (0, 12, 8191)] == ["IMGIMGAZ", "IMGIMGBCZ", "IMGIMGIBJBZ"]
    assert grid_name(16) == "<reserved08816>"


def test_ids_are_looked_up_by_name_and_not_computed() -> None:
    """As a real vocabulary may be: codes are sorted by name as text, with gaps between their ids."""
    names = sorted(image_code_name(code) for code in range(200))
    ids = {name: 10 + 3 * n for n, name in enumerate(names)} | {"<eoss>": 2}
    vocabulary = Vocabulary.from_tokens(ids, 200)
    assert [vocabulary.image_ids[code] for code in range(200)] == [
        ids[image_code_name(code)] for code in range(200)
    ]
    assert vocabulary.image_end == 2
    codes = np.arange(200).reshape(2, 100)
    assert (vocabulary.image_codes(vocabulary.image_block(codes)) == codes).all()


def test_the_recorded_vocabulary(golden: Path) -> None:
    tokens = json.loads((golden / "assets" / "tokenizer" / "tokenizer.json").read_text())
    ids = tokens["model"]["vocab"] | {token["content"]: token["id"] for token in tokens["added_tokens"]}
    vocabulary = Vocabulary.from_tokens(ids, 8192)
    assert vocabulary.size == 11008
    found = [
        getattr(vocabulary, name)
        for name in ("bos", "image_end", "image_start", "separator", "end_of_turn", "newline")
    ]
    assert found == [0, 8196, 8197, 8198, 8710, 8803]
    assert vocabulary.grid_ids[15] == 8820
    assert vocabulary.image_ids == tuple(range(4, 8196))
    assert vocabulary.image_block(np.zeros((32, 32), np.int64)).shape == (1060,)


def test_tokens_that_a_tokenizer_lacks_are_appended() -> None:
    assert PLAIN.size == 50 + len(SPECIAL_NAMES) + MAX_GRID + 64
    assert len(PLAIN.special_ids) == PLAIN.size - 50
    assert min(PLAIN.special_ids) == 50


@given(st.integers(1, MAX_GRID), st.integers(1, MAX_GRID), st.integers(0, 2**32 - 1))
def test_the_codes_of_an_image_block_are_read_back(height: int, width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 64, (2 * height, 2 * width))
    block = PLAIN.image_block(codes)
    assert len(block) == 4 + codes.shape[0] * (codes.shape[1] + 1)
    assert (PLAIN.image_codes(block) == codes).all()


def test_the_height_comes_before_the_width() -> None:
    block = PLAIN.image_block(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]))
    i, v = PLAIN.image_ids, PLAIN
    rows = [*(i[n] for n in (1, 2, 3, 4)), v.newline, *(i[n] for n in (5, 6, 7, 8)), v.newline]
    assert block.tolist() == [v.image_start, v.grid_ids[0], v.grid_ids[1], *rows, v.image_end]


@given(st.data())
def test_a_changed_block_is_an_error_or_another_image(data: st.DataObject) -> None:
    codes = np.arange(8).reshape(2, 4)
    block = PLAIN.image_block(codes)
    position = data.draw(st.integers(0, len(block) - 1))
    block[position] = data.draw(st.integers(0, PLAIN.size - 1).filter(lambda i: i != block[position]))
    try:
        found = PLAIN.image_codes(block)
    except ValueError:
        return
    assert (found != codes).sum() == 1


def test_the_grammar_allows_an_image_block() -> None:
    block = PLAIN.image_block(np.arange(8).reshape(2, 4))
    grammar = list(PLAIN.image_grammar(2, 4))
    assert len(grammar) == len(block)
    assert all(token in allowed for token, allowed in zip(block.tolist(), grammar, strict=True))


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (0, 2), (200, 2)])
def test_sides_without_a_grid_token_are_an_error(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected an even number from 2 to 198"):
        PLAIN.image_block(np.zeros(shape, np.int64))


def test_a_saved_vocabulary_is_read_back(tmp_path: Path) -> None:
    PLAIN.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == PLAIN
    assert loaded.fingerprint == PLAIN.fingerprint


def test_any_difference_changes_the_fingerprint() -> None:
    others = [
        Vocabulary.from_tokens({f"t{n}": n for n in range(51)}, 64),
        Vocabulary.from_tokens({f"t{n}": n for n in range(50)}, 65),
        Vocabulary.from_tokens({f"u{n}": n for n in range(50)}, 64),
        replace(PLAIN, newline=PLAIN.image_end),
    ]
    assert len({vocabulary.fingerprint for vocabulary in [PLAIN, *others]}) == 5


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"size": 3}', '{"grid_ids": 3, "image_ids": []}'])
def test_a_file_that_is_not_a_vocabulary_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ConfigError, match=r"v.json: not a vocabulary file"):
        Vocabulary.load(tmp_path / "v.json")


def test_different_vocabularies_are_an_error_that_names_both() -> None:
    other = Vocabulary.from_tokens({f"t{n}": n for n in range(51)}, 64)
    check_same_vocabulary(PLAIN, "codec", Vocabulary.parse(PLAIN.dump(), "v.json"), "the data")
    expected = (
        f"codec has a vocabulary with fingerprint {PLAIN.fingerprint} ({PLAIN.size} tokens), "
        f"the data has {other.fingerprint} ({other.size} tokens)"
    )
    for hint, end in (("", ""), ("use one tokenizer", "; use one tokenizer")):
        with pytest.raises(ConfigError) as error:
            check_same_vocabulary(PLAIN, "codec", other, "the data", hint)
        assert str(error.value) == expected + end
