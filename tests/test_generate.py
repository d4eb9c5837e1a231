"""Drawing keeps to an image's grammar, answering reads images as training does."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import make_record, small_vocabulary

from unitoken.streaming_data.collate import Collate
from unitoken.streaming_data.views import Views
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.train.config import DecoderConfig, ModelConfig, VisionConfig
from unitoken.train.generate import answer, generate_images, prompt_of
from unitoken.train.model import UniToken, build_model, load_weights

VISION = VisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return small_vocabulary()


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary) -> UniToken:
    decoder = DecoderConfig(
        vocab_size=vocabulary.size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = build_model(decoder, VISION, ModelConfig(decoder=decoder, vision=VISION))
    load_weights(model, {}, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # so that the likeliest token differs from place to place
    return model.eval()


def prompts(vocabulary: Vocabulary, *lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.concatenate([[vocabulary.bos], rng.integers(0, 50, n), [vocabulary.end_of_turn]]) for n in lengths]


def test_every_drawn_image_is_whole_whatever_the_model_thinks(model: UniToken, vocabulary: Vocabulary) -> None:
    codes = generate_images(model, vocabulary, prompts(vocabulary, 3, 5, 3), 4, 2, seed=1)
    assert codes.shape == (3, 4, 2)
    assert codes.min() >= 0
    assert codes.max() < 8
    assert len(np.unique(codes)) > 2


def test_a_drawing_depends_on_its_prompt_and_the_seed_not_on_its_neighbours(model: UniToken, vocabulary: Vocabulary) -> None:
    several = prompts(vocabulary, 3, 5, 3, 4)
    together = generate_images(model, vocabulary, several, 2, 2, seed=3)
    assert np.array_equal(together[:2], generate_images(model, vocabulary, several[:2], 2, 2, seed=3))
    assert np.array_equal(together, generate_images(model, vocabulary, several, 2, 2, seed=3))
    assert not np.array_equal(together, generate_images(model, vocabulary, several, 2, 2, seed=4))


def test_the_likeliest_drawing_is_what_reading_everything_anew_gives(model: UniToken, vocabulary: Vocabulary) -> None:
    """The cache, the forced tokens and the choice among image codes, against the plain way."""
    prompt = prompts(vocabulary, 4)[0]
    (codes,) = generate_images(model, vocabulary, [prompt], 2, 2, temperature=0)
    assert np.array_equal(codes, generate_images(model, vocabulary, [prompt], 2, 2, temperature=0.7, top_k=1)[0])
    ids = list(prompt)
    for allowed in vocabulary.image_grammar(2, 2):
        row = torch.tensor(ids)[None]
        with torch.no_grad():
            hidden = model.model(model.model.embed_tokens(row), torch.arange(len(ids))[None], None)
        ids.append(max(allowed, key=lambda token: model.lm_head(hidden[0, -1])[token].item()))
    assert np.array_equal(codes, vocabulary.image_codes(np.array(ids[len(prompt) :])))


def test_answers_are_the_likeliest_tokens_up_to_the_end_of_the_turn(model: UniToken, vocabulary: Vocabulary) -> None:
    """Prompts of several lengths, with 0 to 2 images, against reading each anew token by token as training lays it out."""
    records = [make_record(f"r{n}", vocabulary, 6 + n % 2, question_images=n % 3) for n in range(5)]
    asked = [prompt_of(record) for record in records]
    found = answer(model, vocabulary, asked, max_tokens=5)
    for record, tokens in zip(asked, found, strict=True):
        expected: list[int] = []
        features = len(record.images) * 5
        for _ in range(5):
            longer = type(record)(
                "x",
                np.concatenate([record.tokens, expected]).astype(np.uint16),
                record.target_spans,
                record.image_spans,
                record.images,
            )
            batch = Collate(
                len(longer.tokens) + features, Views(8, 4), "questions", vocabulary.separator, vocabulary.newline, False
            )([[longer]])
            with torch.no_grad():
                embeddings = model.embed(batch)
                token = int(model.lm_head(model.model(embeddings, batch["position_ids"], None))[0, -1].argmax())
            if token == vocabulary.end_of_turn:
                break
            expected.append(token)
        assert tokens == expected
    assert len({tuple(tokens) for tokens in found}) > 1


def test_an_answer_ends_with_the_turn(model: UniToken, vocabulary: Vocabulary) -> None:
    asked = [prompt_of(make_record("r", vocabulary, 6))]
    first = answer(model, vocabulary, asked, max_tokens=1)[0][0]
    ends_there = dataclasses.replace(vocabulary, end_of_turn=first)
    assert answer(model, ends_there, asked, max_tokens=9) == [[]]


def test_a_prompt_ends_where_training_begins(vocabulary: Vocabulary) -> None:
    record = make_record("r", vocabulary, 7, question_images=2, answer_images=1)
    prompt = prompt_of(record)
    assert len(prompt.tokens) == record.target_spans[0][0]
    assert len(prompt.images) == len(prompt.image_spans) == 2
    assert (prompt.labels() == -100).all()


@pytest.mark.filterwarnings("ignore")
def test_a_stages_last_checkpoint_is_loaded_on_one_process(tmp_path: Path) -> None:
    from stages import stage, write_data

    from unitoken.train.check import check
    from unitoken.train.generate import load_model
    from unitoken.train.stage import run

    write_data(tmp_path / "data")
    config = stage(tmp_path, "max_duration=2ba")
    checked = check(config, 1)
    run(config, checked)
    model = load_model(config)
    assert not model.training
    assert generate_images(model, checked.vocabulary, prompts(checked.vocabulary, 3), 2, 2).shape == (1, 2, 2)
