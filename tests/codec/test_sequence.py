"""Conversation + codes -> record: the places of images, and the tokens that are trained on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tokenizing import GOLDEN, turns
from unitoken.codec.conversations import ItemError, parse
from unitoken.codec.sequence import assemble, check_length, lay_out
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import Vocabulary

TOKENIZER = load_tokenizer(str(GOLDEN / "assets" / "tokenizer"))
VOCABULARY = Vocabulary.from_tokens(TOKENIZER.get_vocab(), 8192)
TEXT = TextEncoder(TOKENIZER, VOCABULARY)


def record(*texts: str | None, sizes: list[tuple[int, int]] | None = None) -> Record:
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 8192, size) for size in sizes or []]
    item = {"conversations": turns(*texts), "image": [f"{n}.png" for n in range(len(codes))]}
    return assemble(parse(item, "0"), codes, [bytes([n]) for n in range(len(codes))], TEXT, VOCABULARY)


def words(ids: np.ndarray) -> str:
    return TOKENIZER.decode(ids.tolist())


def test_a_conversation_of_text() -> None:
    found = record("Hi", "Hello you", "Bye", "Later")
    assert (
        words(found.tokens)
        == "<s>Hi<reserved08706>Hello you<reserved08706>Bye<reserved08706>Later<reserved08706>"
    )
    assert [words(found.tokens[a:b]) for a, b in found.target_spans] == [
        "Hello you<reserved08706>",
        "Later<reserved08706>",
    ]
    assert found.tokens.dtype == np.uint16
    assert found.image_spans.shape == (0, 4)


def test_a_prompt_is_the_beginning_of_its_conversation() -> None:
    whole = record("See <|image|>!", "Mine", "And?", "Later", sizes=[(2, 4)])
    opened = parse({"conversations": turns("See <|image|>!", "Mine", "And?", None), "image": ["0.png"]}, "0")
    prompt = lay_out(opened, [np.random.default_rng(0).integers(0, 8192, (2, 4))], [b"0"], TEXT, VOCABULARY)
    assert prompt.tokens.tolist() == whole.tokens[: whole.target_spans[1][0]].tolist()
    assert prompt.target_spans.tolist() == whole.target_spans[:1].tolist()
    question = parse({"conversations": turns("Hi")}, "0")
    assert lay_out(question, [], [], TEXT, VOCABULARY).target_spans.shape == (0, 2)


def test_an_image_is_trained_on_in_an_answer_only() -> None:
    found = record("See <|image|>!", "Mine: <|image|>", sizes=[(2, 4), (4, 2)])
    (a, b, *first), (c, d, *second) = found.image_spans.tolist()
    assert (first, second) == ([2, 4], [4, 2])
    assert found.tokens[[a, b - 1]].tolist() == [VOCABULARY.image_start, VOCABULARY.image_end]
    assert (found.labels()[a:b] == -100).all()
    assert (found.labels()[c:d] == found.tokens[c:d]).all()
    assert VOCABULARY.image_codes(found.tokens[c:d]).shape == (4, 2)
    assert len(found.target_spans) == 1


def test_wide_vocabularies_take_wide_tokens() -> None:
    wide = Vocabulary.from_tokens(TOKENIZER.get_vocab() | {"last": 70_000}, 8192)
    assert (
        assemble(
            parse({"conversations": turns("a", "b")}, "0"), [], [], TextEncoder(TOKENIZER, wide), wide
        ).tokens.dtype
        == np.uint32
    )


@pytest.mark.parametrize("texts", [("Only a question",), ("A question", None)])
def test_a_record_without_targets_is_refused(texts: tuple[str | None, ...]) -> None:
    with pytest.raises(ItemError, match="nothing to train on: "):
        record(*texts)


def test_sides_of_odd_length_are_refused() -> None:
    with pytest.raises(ValueError, match="an even number from 2"):
        record("<|image|>", "a", sizes=[(3, 2)])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=4), st.booleans()), max_size=3),
        min_size=2,
        max_size=5,
    )
)
def test_any_conversation_can_be_read_from_its_record(conversation: list[list[tuple[str, bool]]]) -> None:
    """The record gives back the texts and the order of the images; exactly the answers are trained on."""
    texts = [
        "".join(text.replace("<|image|>", "") + ("<|image|>" if image else "") for text, image in turn)
        for turn in conversation
    ]
    count = sum(text.count("<|image|>") for text in texts)
    found = record(*texts, sizes=[(2, 2 * (n + 1)) for n in range(count)])
    assert [width for _, _, _, width in found.image_spans.tolist()] == [2 * (n + 1) for n in range(count)]
    body, position, blocks = found.tokens[1:], 1, {int(span[0]): int(span[1]) for span in found.image_spans}
    read: list[list[int | None]] = [[]]
    trained: list[list[bool]] = [[]]
    while position <= len(body):
        end = blocks.get(position, position + 1)
        token = found.tokens[position]
        trained[-1].extend((found.labels()[position:end] >= 0).tolist())
        if token == VOCABULARY.end_of_turn:
            read.append([])
            trained.append([])
        else:
            read[-1].append(None if position in blocks else int(token))
        position = end

    def text_of(pieces: list[int | None]) -> str:
        result = ""
        run: list[int] = []
        for piece in [*pieces, None]:
            if piece is None:
                result, run = result + TOKENIZER.decode(run) + "<|image|>", []
            else:
                run.append(piece)
        return result.removesuffix("<|image|>")

    assert [text_of(pieces) for pieces in read[:-1]] == texts
    assert [set(flags) for flags in trained[:-1]] == [{number % 2 == 1} for number in range(len(texts))]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (32, 32)])
def test_the_tokens_of_a_block_are_counted(height: int, width: int) -> None:
    assert VOCABULARY.image.count(height, width) == len(
        VOCABULARY.image_block(np.zeros((height, width), int))
    )


def test_too_many_tokens_are_refused() -> None:
    check_length(10, 10)
    check_length(10, None)
    with pytest.raises(ItemError, match=r"^too long: 11 tokens, max_tokens is 10$"):
        check_length(11, 10)
