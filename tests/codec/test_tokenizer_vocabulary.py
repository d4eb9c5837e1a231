"""Layouts: chat templates give the ids and marks of transformers, `emu3` those of Emu3Processor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.chat_tokenizers import CHATML, LLAMA3, MISTRAL, QWEN3, chat_tokenizer
from support.paths import GOLDEN
from unitoken.codec.chat_template import RENDERING, render
from unitoken.codec.conversations import Conversation, ItemError, parse
from unitoken.codec.sequence import assemble, lay_out
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.codec.tokenizer_vocabulary import tokenizer_vocabulary
from unitoken.common.errors import ConfigError
from unitoken.dataset.record import IGNORED, Record
from unitoken.dataset.vocabulary import Vocabulary, check_same_vocabulary

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL}
LOADED = {name: chat_tokenizer(template) for name, template in TEMPLATES.items()}
VOCABULARIES = {
    name: tokenizer_vocabulary(tokenizer, 64, "chat_template") for name, tokenizer in LOADED.items()
}
TEXTS = ["Hello", " what's  up?\n", "\n\nüber\t", "32*32", "a\n", "<|im_end|>", "", " <think> "]
OWN = """
tokens: [<|user|>, <|bot|>, <|end|>]
conversation:
  human: {opening: "<|user|>"}
  assistant: {opening: "<|bot|>", closing: "<|end|>"}
image:
  block: <image>{width} by {height}<pixels>{rows}</image>
  row_end: ""
  code_name: <code {code}>
  size_name: null
  latents_per_size: 1
"""


def conversation_of(texts: list[str], system: str | None = None) -> Conversation:
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, {"from": "system", "value": system})
    return parse({"conversations": turns}, "0")


def messages_of(texts: list[str], system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def record_of(name: str, texts: list[str], system: str | None = None) -> Record:
    text = TextEncoder(LOADED[name], VOCABULARIES[name])
    return lay_out(conversation_of(texts, system), [], [], text, VOCABULARIES[name])


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_chat_template_gives_the_ids_of_transformers(name: str, data: st.DataObject) -> None:
    tokenizer = LOADED[name]
    safe = [text for text in TEXTS if "<" not in text]  # transformers parses special tokens in a text
    texts = data.draw(
        st.lists(st.sampled_from(safe), min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0)
    )
    has_system = VOCABULARIES[name].conversation.system is not None
    system = data.draw(st.sampled_from([None, "Be kind."])) if has_system else None
    record = record_of(name, texts, system)
    rendered = render(tokenizer, messages_of(texts, system))
    assert record.tokens.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if name in ("llama3", "qwen3"):
        marked = tokenizer.apply_chat_template(
            messages_of(texts, system), return_dict=True, return_assistant_tokens_mask=True, **RENDERING
        )
        assert (record.labels() != IGNORED).tolist() == [bool(mark) for mark in marked["assistant_masks"]]


def test_the_answer_and_its_end_are_trained_on() -> None:
    tokenizer, record = LOADED["chatml"], record_of("chatml", ["Hello", "a cat"])
    trained = record.tokens[record.labels() != IGNORED]
    assert tokenizer.decode(trained.tolist()) == "a cat<|im_end|>"
    assert VOCABULARIES["chatml"].end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_ends_as_the_template_begins_an_answer(name: str) -> None:
    tokenizer, record = LOADED[name], record_of(name, ["Hello"])
    prompt = render(tokenizer, messages_of(["Hello"]), add_generation_prompt=True)
    assert record.tokens.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_text_can_not_forge_a_special_token_of_a_template() -> None:
    tokenizer, record = LOADED["chatml"], record_of("chatml", ["a<|im_end|>\n<|im_start|>", "b"])
    special = [token for token in record.tokens.tolist() if token in VOCABULARIES["chatml"].special_ids]
    assert len(special) == len(record_of("chatml", ["a", "b"]).tokens[:0]) + 6
    assert "a<|im_end|>\n<|im_start|>" in tokenizer.decode(record.tokens.tolist())


def test_a_system_turn_needs_a_layout_that_has_it() -> None:
    with pytest.raises(ItemError, match=r"^system turn: the layout 'chat_template' has none"):
        record_of("mistral", ["Hello", "b"], system="Be kind.")
    item = {"conversations": [{"from": role, "value": role} for role in ("system", "human", "gpt")]}
    assert parse(item, "0", prepend_system=True).turns[0].segments == ("system\n\nhuman",)
    assert not parse(item, "0").system.trained  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "the tokenizer has no chat template"),
        (
            "{{ messages[0]['content'] }}",
            "at one question and its answer: a turn's text is there 0 times",
        ),
        ("{{ raise_exception('no') }}", "split at turns of user, assistant: no"),
        (CHATML.replace("+ '<|im_end|>' + '\\n'", ""), "nothing ends the answer"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "is there 0 times"),
        (
            CHATML.replace("message['role'] + '\\n'", "loop.index | string"),
            "its turns are not laid out alike",
        ),
        (CHATML.replace("message['content']", "(message['content'] | replace('\\t', '!'))"), "'\\\\n !'"),
    ],
)
def test_a_template_that_can_not_be_split_is_an_error(template: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^layout: chat_template: .*{problem}") as error:
        tokenizer_vocabulary(chat_tokenizer(template), 8, "chat_template")
    assert "\n" not in str(error.value)


def test_a_template_with_the_date_gives_the_same_ids_each_day() -> None:
    template = CHATML.replace("named SmolLM, trained by", "of ' + strftime_now('%d %B %Y') + '")
    vocabulary = tokenizer_vocabulary(chat_tokenizer(template), 8, "chat_template")
    assert "26 July 2024" in str(vocabulary.conversation.human.opening)


def test_a_tokenizer_that_marks_the_first_word_is_read() -> None:
    tokenizer = load_tokenizer(str(GOLDEN / "assets" / "tokenizer_llama_style"))
    tokenizer.chat_template = MISTRAL
    vocabulary = tokenizer_vocabulary(tokenizer, 8, "chat_template")  # compares with the template's ids
    assert not vocabulary.conversation.text_starts_anew
    record = lay_out(conversation_of(["Hello", "b"]), [], [], TextEncoder(tokenizer, vocabulary), vocabulary)
    rendered = render(tokenizer, messages_of(["Hello", "b"]))
    assert record.tokens.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_a_vocabulary_with_a_layout_is_read_back() -> None:
    for vocabulary in VOCABULARIES.values():
        again = Vocabulary.parse(vocabulary.dump(), "vocabulary.json")
        assert again == vocabulary
        assert again.fingerprint == vocabulary.fingerprint
    assert len({vocabulary.fingerprint for vocabulary in VOCABULARIES.values()}) == len(VOCABULARIES)


def test_other_layouts_are_other_vocabularies() -> None:
    chameleon = Vocabulary.from_tokens(LOADED["chatml"].get_vocab(), 64)
    with pytest.raises(ConfigError, match="b is in the layout 'chat_template', a in 'chameleon'"):
        check_same_vocabulary(VOCABULARIES["chatml"], "b", chameleon, "a")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_grown_tokenizer_gives_the_same_vocabulary(name: str) -> None:
    vocabulary, grown = VOCABULARIES[name], chat_tokenizer(TEMPLATES[name])
    grown.add_tokens(vocabulary.new_names(), special_tokens=True)
    assert [grown.convert_tokens_to_ids(name) for name in vocabulary.new_names()] == [*vocabulary.new_ids]
    assert tokenizer_vocabulary(grown, 64, "chat_template") == vocabulary
    assert vocabulary.from_tokenizer(grown.get_vocab(), 64) == vocabulary
    assert vocabulary.from_tokenizer({**grown.get_vocab(), "other": 3}, 64) != vocabulary
    plain = Vocabulary.from_tokens(LOADED[name].get_vocab(), 64)
    grown = chat_tokenizer(TEMPLATES[name])
    grown.add_tokens(plain.new_names(), special_tokens=True)
    assert Vocabulary.from_tokens(grown.get_vocab(), 64) == plain


def emu3_tokenizer() -> Any:
    names = [
        "<|image start|>",
        "<|image end|>",
        "<|image token|>",
        "<|extra_200|>",
        "<|extra_201|>",
        "<image>",
    ]
    tokenizer = chat_tokenizer(CHATML, bos="<|extra_203|>", eos="<|extra_204|>")
    tokenizer.add_tokens(
        [*names, *(f"<|visual token {code:06}|>" for code in range(64))], special_tokens=True
    )
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.boi_token, tokenizer.eoi_token = names[:2]
    tokenizer.image_wrapper_token, tokenizer.eof_token = "<|image token|>", "<|extra_201|>"
    return tokenizer


def test_emu3_gives_the_ids_of_its_processor() -> None:
    from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
    from transformers.models.emu3.processing_emu3 import Emu3Processor

    tokenizer = emu3_tokenizer()
    vocabulary = tokenizer_vocabulary(tokenizer, 64, "emu3")
    processor = Emu3Processor(
        Emu3ImageProcessor(min_pixels=64, max_pixels=1 << 20), _as_gpt2(tokenizer), chat_template=""
    )
    text, random = TextEncoder(tokenizer, vocabulary), np.random.default_rng(0)
    for number in range(10):
        height, width = (int(side) * 2 for side in random.integers(2, 6, 2))
        codes = random.integers(0, 64, (height, width))
        question = ("<|image|>What is it?", "Draw 4*4 cats.")[number % 2] + "?" * number
        answer = ("a cat", "<|image|>")[number % 2]
        item = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        conversation = parse({**item, "image": ["0.png"]}, "0")
        record = assemble(conversation, [codes], [b"0"], text, vocabulary)
        start = " " if answer == "a cat" else ""
        rendered = f"You are a helpful assistant. USER: {question} ASSISTANT:{start}{answer}<|extra_204|>"
        picture = np.zeros((8 * height, 8 * width, 3), np.uint8)
        expected = np.array(
            processor(text=rendered.replace("<|image|>", "<image>"), images=picture)["input_ids"][0]
        )
        image = expected == tokenizer.image_token_id
        expected[image] = np.c_[
            np.array(vocabulary.image_ids)[codes],
            np.full(height, tokenizer.convert_tokens_to_ids("<|extra_200|>")),
        ].reshape(-1)
        assert record.tokens.tolist() == expected.tolist()
        assert (vocabulary.image_codes(record.tokens[slice(*record.image_spans[0, :2])]) == codes).all()
    assert not len(vocabulary.new_ids) - 1  # the separator of continuous features


def _as_gpt2(tokenizer: Any) -> Any:
    from transformers import GPT2TokenizerFast

    class Emu3Tokenizer(GPT2TokenizerFast):  # type: ignore[misc]
        """The processor asks for a GPT-2 tokenizer; that of Emu3 has the names of image tokens besides."""

    tokenizer.__class__ = Emu3Tokenizer
    return tokenizer


def test_a_layout_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    tokenizer = LOADED["chatml"]
    vocabulary = tokenizer_vocabulary(tokenizer, 64, str(path))
    assert vocabulary.layout_name.startswith("own ")
    codes = np.arange(12).reshape(2, 6)
    block = vocabulary.image_block(codes)
    names = {token: name for name, token in vocabulary.layout.names} if vocabulary.layout else {}
    shown = "".join(names.get(token) or tokenizer.decode([token]) for token in block.tolist()[:-13])
    assert shown + names[block[-1]] == "<image>6 by 2<pixels></image>"
    assert (vocabulary.image_codes(block) == codes).all()
    grammar = list(vocabulary.image_grammar(2, 6))
    assert len(grammar) == len(block) == vocabulary.image.count(2, 6)
    assert all(token in allowed for token, allowed in zip(block.tolist(), grammar, strict=True))
    assert vocabulary.new_names()[:3] == ["<|user|>", "<|bot|>", "<|end|>"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("{rows}", "", r"image.block`: expected \{rows\} once in it, found 0"),
        ("<pixels>", "", "expected a special token between the sizes and"),
        ('closing: "<|end|>"', 'closing: "bye"', "no special token ends the assistant's last turn"),
        ("</image>", "<image>", "a token has two meanings"),
        ("<code {code}>", "<code>", r"image.code_name`: expected \{code\}"),
        ("<image>{width}", "a{width}", "image.block: expected a special token at its begin"),
        ("conversation:", "conversations:", "conversation"),
    ],
)
def test_a_wrong_layout_file_is_one_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError, match=problem) as error:
        tokenizer_vocabulary(LOADED["chatml"], 64, str(path))
    assert "\n" not in str(error.value)


def test_an_unknown_layout_is_an_error_that_lists_them() -> None:
    with pytest.raises(
        ConfigError, match=r"expected chameleon, chat_template, emu3, or a file .*, found 'qwen'"
    ):
        tokenizer_vocabulary(LOADED["chatml"], 64, "qwen")
