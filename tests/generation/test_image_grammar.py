"""transformers' own `generate` draws valid images, in every way of sampling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.small_datasets import small_vocabulary
from unitoken.common.errors import ConfigError
from unitoken.generation import ImageGrammar

VOCABULARY = small_vocabulary()
SIZES = [(2, 4), (4, 2)]
LENGTH = VOCABULARY.image.count(2, 4) + 1  # with the end of the turn
LONGEST = VOCABULARY.image.count(4, 2) + 1
END = VOCABULARY.end_of_turn
PAD = 49


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=192,  # more rows than tokens
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=VOCABULARY.bos,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # so that the likeliest token differs from place to place
    return model


def generate(model: Any, grammar: ImageGrammar, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """The replies to prompts that are padded at the left, without the padding behind them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=[grammar],
        **{"max_new_tokens": LONGEST, "do_sample": False, **settings},
    )
    replies = made[:, longest:].tolist()
    return [reply[: reply.index(END) + 1] if END in reply else reply for reply in replies]


def sizes_of(replies: list[list[int]]) -> list[tuple[int, ...]]:
    """The sizes of replies that are one image and the end of the turn; fails for all others."""
    assert all(reply[-1] == END for reply in replies)
    return [VOCABULARY.image_codes(np.array(reply[:-1])).shape for reply in replies]


PROMPTS = [[VOCABULARY.bos, 3, END], [VOCABULARY.bos, 5, 6, 7, 8, 9, END], [VOCABULARY.bos, 4, 4, END]]
WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "temperature": 3.0},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    {"num_beams": 2, "do_sample": True, "top_k": 0, "temperature": 2.0},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_drawing_is_one_valid_image(way: dict[str, Any], model: Any) -> None:
    torch.manual_seed(0)
    replies = generate(model, ImageGrammar(VOCABULARY, SIZES, drawing=True), PROMPTS, **way)
    assert len(replies) == 3 * way.get("num_return_sequences", 1)
    assert set(sizes_of(replies)) <= set(SIZES)


def test_one_object_serves_many_calls(model: Any) -> None:
    """Also with a prompt as long as the ids of the last step before, or one token longer."""
    grammar = ImageGrammar(VOCABULARY, [(2, 4)], drawing=True)
    alone = [
        generate(model, ImageGrammar(VOCABULARY, [(2, 4)], drawing=True), [prompt])[0] for prompt in PROMPTS
    ]
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        assert generate(model, grammar, [prompt]) == [expected]
    assert generate(model, grammar, [PROMPTS[0]], max_new_tokens=1) == [alone[0][:1]]
    assert generate(model, grammar, [PROMPTS[0]]) == [alone[0]]
    for longer in (LENGTH - 1, LENGTH):
        prompt = [VOCABULARY.bos, *range(1, longer + 2), END]
        generate(model, grammar, [PROMPTS[0]])
        sizes_of(generate(model, grammar, [prompt]))


def test_prompts_that_continue_other_ids_are_a_new_call() -> None:
    """Here one of two prompts begins with the ids of the step before."""
    grammar = ImageGrammar(VOCABULARY, [(2, 4)], drawing=True)
    for rows in ([[1, 2]], [[1, 2, VOCABULARY.image_start], [4, 5, 6]]):
        masked = grammar(torch.tensor(rows), torch.zeros(len(rows), VOCABULARY.size))
        for row in masked:
            assert (row == 0).nonzero()[:, 0].tolist() == [VOCABULARY.image_start]


def test_a_row_does_not_depend_on_the_rows_beside_it(model: Any) -> None:
    together = generate(model, ImageGrammar(VOCABULARY, SIZES, drawing=True), PROMPTS)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        assert generate(model, ImageGrammar(VOCABULARY, SIZES, drawing=True), [prompt]) == [expected]


def test_images_in_replies_of_text_are_valid(model: Any) -> None:
    torch.manual_seed(0)
    grammar = ImageGrammar(VOCABULARY, SIZES)
    found = 0
    for _ in range(6):
        for reply in generate(model, grammar, PROMPTS, do_sample=True, top_k=0, max_new_tokens=80):
            ids = list(reply)
            while VOCABULARY.image_start in ids:
                begin = ids.index(VOCABULARY.image_start)
                if VOCABULARY.image_end not in ids:
                    break  # cut off by max_new_tokens
                end = ids.index(VOCABULARY.image_end) + 1
                assert VOCABULARY.image_codes(np.array(ids[begin:end])).shape in SIZES
                ids[begin:end] = []
                found += 1
            else:
                assert not set(ids) & (VOCABULARY.special_ids - {END})
            assert max(reply) < VOCABULARY.size
    assert found


def test_a_model_that_only_writes_begins_no_image(model: Any) -> None:
    torch.manual_seed(0)
    replies = generate(model, ImageGrammar(VOCABULARY, []), PROMPTS, do_sample=True, top_k=0)
    assert not {token for reply in replies for token in reply} & (VOCABULARY.special_ids - {END})


def test_a_finished_drawing_leaves_the_rest_to_transformers() -> None:
    grammar = ImageGrammar(VOCABULARY, [(2, 2)], drawing=True)
    block = VOCABULARY.image_block(np.array([[1, 2], [3, 4]])).tolist()
    scores, ids = torch.zeros(1, VOCABULARY.size), [VOCABULARY.bos]
    for token in [*block, END, PAD, PAD]:
        allowed = (grammar(torch.tensor([ids]), scores)[0] == 0).nonzero()[:, 0].tolist()
        assert token in allowed
        assert len(allowed) == VOCABULARY.size or token not in (PAD,)
        ids.append(token)


def test_what_can_not_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        ImageGrammar(VOCABULARY, [], drawing=True)
    with pytest.raises(ValueError, match="an image side of 3 latents"):
        ImageGrammar(VOCABULARY, [(3, 2)])
    with pytest.raises(ConfigError, match=r"vocabulary\.json: not a vocabulary file"):
        ImageGrammar.from_folder(tmp_path, [(2, 2)])
    VOCABULARY.save(tmp_path / "vocabulary.json")
    ImageGrammar.from_folder(str(tmp_path), [(2, 2)], drawing=True)
