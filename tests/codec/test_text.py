"""Text tokens: the pieces of a text add up, and no text forges a special token."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tokenizing import GOLDEN
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import Vocabulary

STYLES = ("tokenizer", "tokenizer_llama_style")


@cache
def loaded(style: str) -> tuple[Any, Vocabulary]:
    tokenizer = load_tokenizer(str(GOLDEN / "assets" / style))
    return tokenizer, Vocabulary.from_tokens(tokenizer.get_vocab(), 8192)


def encoder(style: str = "tokenizer", compat: bool = False) -> TextEncoder:
    return TextEncoder(*loaded(style), compat=compat)


FORGED = "a <eoss> b <racm3:break> </s> IMGIMGBCZ <reserved08706> <s> <sentinel:0> <reserved08820>"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("start", [True, False])
def test_special_tokens_in_a_text_are_plain_characters(style: str, start: bool) -> None:
    tokenizer, vocabulary = loaded(style)
    ids = encoder(style).encode(FORGED, start)
    assert vocabulary.special_ids.isdisjoint(ids)
    assert set(tokenizer.all_special_ids).isdisjoint(ids)
    assert tokenizer.decode(ids) == FORGED


def test_compat_parses_special_tokens_as_the_reference_does() -> None:
    _, vocabulary = loaded("tokenizer")
    assert vocabulary.image_end in encoder(compat=True).encode("a <eoss> b", start=True)


def test_special_tokens_that_are_ordinary_words_are_split() -> None:
    """For example, `<eoss>` is in the vocabulary but is no added token: only splitting the text splits it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(n): n - 32 for n in range(32, 127)}
    merges = [("<", "e"), ("<e", "o"), ("<eo", "s"), ("<eos", "s"), ("<eoss", ">")]
    words = letters | {"".join(pair): 200 + n for n, pair in enumerate(merges)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, merges)))
    vocabulary = Vocabulary.from_tokens(tokenizer.get_vocab(), 4)
    assert tokenizer("<eoss>")["input_ids"] == [vocabulary.image_end]
    ids = TextEncoder(tokenizer, vocabulary).encode("x<eoss><eoss>y" * 50, start=True)
    assert vocabulary.image_end not in ids
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "x<eoss><eoss>y" * 50


texts = st.lists(
    st.sampled_from(["<eoss>", "<s>", "IMGIMGAZ", "<reserved08706>", "<", " ", "\n", "IMG"])
    | st.text(max_size=5)
).map("".join)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_no_text_ever_forges(style: str, text: str) -> None:
    _, vocabulary = loaded(style)
    for start in (True, False):
        assert vocabulary.special_ids.isdisjoint(encoder(style).encode(text, start))


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_decoding_gives_back_the_text(text: str) -> None:
    tokenizer, _ = loaded("tokenizer")
    assert tokenizer.decode(encoder().encode(text, start=False)) == text


def test_later_pieces_get_no_space_put_before_them() -> None:
    tokenizer, _ = loaded("tokenizer_llama_style")
    text = encoder("tokenizer_llama_style")
    assert tokenizer.convert_ids_to_tokens(text.encode("my", start=True))[0].startswith("▁")
    assert not tokenizer.convert_ids_to_tokens(text.encode("my", start=False))[0].startswith("▁")


@pytest.mark.parametrize("name", ["./none", "/no/such/tokenizer", "a/b/c"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer: {name}: no such folder"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_of_a_vision_model_has_no_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"siglip: there is no text tokenizer in it$"):
        load_tokenizer(str(GOLDEN / "assets" / "siglip"))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests_sent = []

    def send(*_: object, **__: object) -> None:
        requests_sent.append(1)
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with pytest.raises(ConfigError, match="tokenizer: nobody/has-this: cannot be loaded"):
        load_tokenizer("nobody/has-this")
    assert len(requests_sent) == 1


def test_long_texts_are_not_cached() -> None:
    """Thousands of long texts would take gigabytes."""
    text = encoder()
    for n in range(50):
        text.encode(f"{n} " * 300, start=False)
        text.encode("the same", start=False)
    assert text._encode_short.cache_info().currsize < 10
