"""Replies follow the grammar, and equal those without cache, batch or padding."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.small_datasets import BLOCK, make_record, small_vocabulary
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.reading.batch import Batch, unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig
from unitoken.train.generation.engine import PromptCollate, generate, null_prompt, split_reply
from unitoken.train.generation.sampling import Sampling
from unitoken.train.model.unitoken import UniToken, build_model

VISION = VisionTowerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
LIKELIEST = Sampling(temperature=0.0)


QWEN2 = {"qk_norm": "none", "attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}


def build(vocabulary: Vocabulary, vision: VisionTowerConfig | None, **switches: Any) -> UniToken:
    sizes = {
        "vocab_size": vocabulary.size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    decoder = DecoderConfig.model_validate({**sizes, **switches})
    model = build_model(decoder, vision, ModelConfig(decoder=decoder, vision=vision))
    load_weights(model, {}, seed=1)
    with torch.no_grad():
        model.output_weight.mul_(50)  # so that the likeliest token differs from place to place
    return model.eval()


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return small_vocabulary()


@pytest.fixture(scope="module")
def model(vocabulary: Vocabulary) -> UniToken:
    return build(vocabulary, VISION)


def prompt_of(record: Record) -> Record:
    """A record up to the first token that is trained on."""
    end = int(record.target_spans[0][0])
    images = int((record.image_spans[:, 1] <= end).sum())
    no_targets = np.zeros((0, 2), np.uint32)
    return Record(
        record.id, record.tokens[:end], no_targets, record.image_spans[:images], record.images[:images]
    )


def prompts(vocabulary: Vocabulary, *lengths: int) -> list[Record]:
    """Prompts of several lengths, each a complete turn; every third has one image, every third two."""
    records = [
        prompt_of(make_record(f"p{n}", vocabulary, length, question_images=n % 3))
        for n, length in enumerate(lengths)
    ]
    end = [vocabulary.end_of_turn]
    return [
        dataclasses.replace(record, tokens=np.concatenate([record.tokens, end]).astype(np.uint16))
        for record in records
    ]


def codes_of(vocabulary: Vocabulary, reply: Sequence[int]) -> np.ndarray:
    (codes,) = split_reply(vocabulary, reply)
    return np.asarray(codes)


def logits_of(
    model: UniToken, vocabulary: Vocabulary, prompt: Record, reply: Sequence[int], views: Views | None
) -> torch.Tensor:
    """Logits of the next token after a prompt and a reply, read without a cache as training lays them out."""
    longer = dataclasses.replace(prompt, tokens=np.concatenate([prompt.tokens, reply]).astype(np.uint16))
    collate = Collate(
        400, views, "questions" if views else "none", vocabulary.separator, vocabulary.newline, False
    )
    batch = unpack(collate([[longer]]))
    length = int((batch["document_ids"] >= 0).sum())
    with torch.no_grad():
        embeddings = model.embed(batch)[:, :length]
        hidden = model.model(embeddings, batch["position_ids"][:, :length], None)
        return torch.nn.functional.linear(hidden, model.output_weight)[0, -1]


def plainly(
    model: UniToken,
    vocabulary: Vocabulary,
    prompt: Record,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    drawing: bool = False,
    guidance: float = 1.0,
    max_tokens: int = 64,
) -> list[int]:
    """The greedy reply in the plainest way: two complete forward passes per token."""
    views = Views(model.vision.image_size, model.vision.patch_size) if model.vision else None
    reply: list[int] = []
    image_tokens: list[int] = []  # of the reply, by the branch without the prompt's text
    forced: Sequence[Sequence[int]] = [[vocabulary.image_start]] if drawing else []
    text = [token for token in range(vocabulary.size) if token not in vocabulary.special_ids] + [
        vocabulary.end_of_turn
    ]
    while forced or (not drawing and len(reply) < max_tokens):
        inside = bool(forced)
        allowed = list(forced[0]) if forced else text + ([vocabulary.image_start] if sizes else [])
        logits = logits_of(model, vocabulary, prompt, reply, views)
        if inside:
            null = logits_of(model, vocabulary, null_prompt(prompt), image_tokens, views)
            logits = null + guidance * (logits - null)
        forced = forced[1:]
        token = max(allowed, key=lambda token: logits[token].item())
        if token == vocabulary.end_of_turn:
            break
        reply.append(token)
        if token == vocabulary.image_start:
            (size,) = sizes
            forced = [*vocabulary.image_grammar(*size)][1:]
        if inside or token == vocabulary.image_start:
            image_tokens.append(token)
    return reply


def test_every_generated_image_is_complete(model: UniToken, vocabulary: Vocabulary) -> None:
    replies = generate(
        model, vocabulary, prompts(vocabulary, 3, 5, 3), Sampling(seed=1), sizes=[(4, 2)], drawing=True
    )
    codes = np.stack([codes_of(vocabulary, reply) for reply in replies])
    assert codes.shape == (3, 4, 2)
    assert codes.min() >= 0
    assert codes.max() < 8
    assert len(np.unique(codes)) > 2


@pytest.mark.parametrize("drawing", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_reply_depends_on_prompt_and_seed_not_on_other_prompts(
    model: UniToken, vocabulary: Vocabulary, drawing: bool, guidance: float
) -> None:
    several = prompts(vocabulary, 3, 9, 3, 14, 6, 5, 5)
    vocabulary = dataclasses.replace(
        vocabulary, image_start=7
    )  # a text token, so that a tiny model says it now and then

    def replies(some: Sequence[Record], seed: int, batch: int) -> list[list[int]]:
        sampling = Sampling(guidance=guidance, seed=seed, temperature=3.0)
        return generate(
            model,
            vocabulary,
            some,
            sampling,
            sizes=[(2, 2), (2, 4)],
            drawing=drawing,
            batch=batch,
            max_tokens=40,
        )

    together = replies(several, 3, 64)
    assert together == replies(several, 3, 1) == replies(several, 3, 3)
    assert together[:2] == replies(several[:2], 3, 64)
    assert together != replies(several, 4, 64)
    shapes = {
        codes.shape
        for reply in together
        for codes in split_reply(vocabulary, reply)
        if isinstance(codes, np.ndarray)
    }
    assert shapes
    assert shapes <= {(2, 2), (2, 4)}


@pytest.mark.parametrize("guidance", [1.0, 0.0, 4.0])
def test_greedy_images_equal_those_without_cache_or_batch(
    model: UniToken, vocabulary: Vocabulary, guidance: float
) -> None:
    """The cache, the padding, the forced tokens, and guidance by its formula from two forward passes."""
    several = prompts(vocabulary, 4, 9, 7)
    sampling = Sampling(temperature=0.0, guidance=guidance)
    found = generate(model, vocabulary, several, sampling, sizes=[(2, 2)], drawing=True)
    expected = [
        plainly(model, vocabulary, p, sizes=[(2, 2)], drawing=True, guidance=guidance) for p in several
    ]
    assert found == expected
    likeliest = Sampling(temperature=0.7, top_k_image=1, guidance=guidance)
    assert found == generate(model, vocabulary, several, likeliest, sizes=[(2, 2)], drawing=True)


def test_a_qwen2_with_tied_embeddings_draws_as_without_cache(vocabulary: Vocabulary) -> None:
    model, several = build(vocabulary, VISION, **QWEN2), prompts(vocabulary, 4, 9, 7)
    found = generate(model, vocabulary, several, LIKELIEST, sizes=[(2, 2)], drawing=True)
    assert found == [plainly(model, vocabulary, p, sizes=[(2, 2)], drawing=True) for p in several]


def test_guidance_changes_images(model: UniToken, vocabulary: Vocabulary) -> None:
    several = prompts(vocabulary, *range(4, 12))
    found = [
        generate(
            model, vocabulary, several, Sampling(temperature=0.0, guidance=g), sizes=[(2, 2)], drawing=True
        )
        for g in (0.0, 1.0, 6.0)
    ]
    assert found[0] != found[1] != found[2]
    texts = [prompt for prompt in several if not len(prompt.images)]
    nothing = generate(
        model, vocabulary, texts, Sampling(temperature=0.0, guidance=0.0), sizes=[(2, 2)], drawing=True
    )
    assert nothing == [nothing[0]] * len(texts), "without the prompt's text all are one"


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_greedy_mixed_replies_equal_those_without_cache_or_batch(
    model: UniToken, vocabulary: Vocabulary, guidance: float
) -> None:
    """Text until the model begins an image; its block; text again; the end of the turn. With guidance."""
    several = prompts(vocabulary, 4, 9, 7, 6)
    words = generate(model, vocabulary, several, LIKELIEST, max_tokens=8)
    begins, ends = words[0][2], None
    drawn = dataclasses.replace(vocabulary, image_start=begins)
    sampling = Sampling(temperature=0.0, guidance=guidance)
    open_ended = generate(model, drawn, several, sampling, sizes=[(2, 2)], max_tokens=30)
    parts = split_reply(drawn, open_ended[0])
    assert isinstance(parts[0], list)
    assert isinstance(parts[1], np.ndarray)
    after = next(part for part in parts[2:] if isinstance(part, list))
    said_before = {token for part in parts[:2] if isinstance(part, list) for token in part}
    ends = next(token for token in after if token not in said_before)
    vocabulary = dataclasses.replace(drawn, end_of_turn=ends)
    found = generate(model, vocabulary, several, sampling, sizes=[(2, 2)], max_tokens=30)
    assert found == [
        plainly(model, vocabulary, p, sizes=[(2, 2)], guidance=guidance, max_tokens=30) for p in several
    ]
    assert len(found[0]) < len(open_ended[0])
    assert any(isinstance(part, np.ndarray) for part in split_reply(vocabulary, found[0]))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each pass through the model."""
    rows: list[int] = []
    real = UniToken.predict

    def watched(self: UniToken, batch: Batch, *rest: Any, **settings: Any) -> torch.Tensor:
        rows.append(len(batch["input_ids"]))
        return real(self, batch, *rest, **settings)

    monkeypatch.setattr(UniToken, "predict", watched)
    return rows


def test_text_replies_read_no_null_prompts(
    model: UniToken, vocabulary: Vocabulary, passes: list[int]
) -> None:
    """They once doubled compute and cache. From the first image on, the null rows read images only."""
    several = prompts(vocabulary, 4, 9, 7, 6)
    guided = dataclasses.replace(LIKELIEST, guidance=3.0)
    words = generate(model, vocabulary, several, LIKELIEST, max_tokens=8)
    assert words == generate(model, vocabulary, several, guided, sizes=[(2, 2)], max_tokens=8)
    assert passes[: len(passes) // 2] == passes[len(passes) // 2 :]
    passes.clear()
    drawn = dataclasses.replace(vocabulary, image_start=words[0][2])
    (reply,) = generate(model, drawn, several[:1], guided, sizes=[(2, 2)], max_tokens=3)
    words_before = reply.index(drawn.image_start)
    assert len(reply) == words_before + BLOCK
    # The prompt, the words, the null prompt; the image's beginning, and its codes but for the last.
    assert passes == [1] * (words_before + 2) + [2] * 4


@pytest.mark.parametrize("batch", [1, 3])
def test_a_guided_drawing_takes_one_pass_a_code(
    model: UniToken, vocabulary: Vocabulary, passes: list[int], batch: int
) -> None:
    """Both rows in one, with all that the size decides: the header, the ends of rows, the end."""
    sampling = Sampling(guidance=3.0)
    several = prompts(vocabulary, 4, 9, 7)[:batch]
    generate(model, vocabulary, several, sampling, sizes=[(4, 2)], drawing=True)
    assert passes == [2 * batch] * (4 * 2)


def test_a_drawing_waits_for_the_device_once(
    model: UniToken, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its size; the other reads are of the prompts, before they go to the device."""
    reads: list[str] = []

    def watch(name: str) -> None:
        real = getattr(torch.Tensor, name)

        def read(*arguments: Any) -> Any:
            reads.append(name)
            return real(*arguments)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        watch(name)
    counts = []
    for size in ((2, 2), (8, 8)):
        reads.clear()
        several = prompts(vocabulary, 4, 9, 7)
        generate(model, vocabulary, several, Sampling(guidance=3.0), sizes=[size], drawing=True)
        counts.append(reads.count("tolist"))
        assert len(reads) < 20
    assert counts[0] == counts[1]


def test_a_finished_row_makes_room_for_the_next_prompt(
    model: UniToken, vocabulary: Vocabulary, passes: list[int]
) -> None:
    """One long reply and four short ones in two rows: the short ones go through the second, one by one."""
    several = [prompt for prompt in prompts(vocabulary, *range(4, 16)) if not len(prompt.images)]
    alone = generate(model, vocabulary, several, LIKELIEST, max_tokens=12, batch=1)
    long = next(place for place, reply in enumerate(alone) if len(reply) == 12)
    limits = [12 if place == long else 2 for place in range(len(several))]
    passes.clear()
    found = generate(model, vocabulary, several, LIKELIEST, max_tokens=limits, batch=2)
    assert found == [reply[:limit] for reply, limit in zip(alone, limits, strict=True)]
    opened = len(several) - 1  # the first two in one pass
    assert len(passes) <= opened + 12
    assert len(several) == 4


def test_the_tower_sees_an_image_once_for_several_replies(model: UniToken, vocabulary: Vocabulary) -> None:
    several = prompts(vocabulary, 6, 7, 8)
    collate = PromptCollate(Views(8, 4))
    repeated = [several[1]] * 3 + [several[2]]
    batch = collate(repeated, [collate.length(prompt) for prompt in repeated], vocabulary)
    assert len(batch["pixel_values"]) == len({*several[1].images, *several[2].images}) == 3
    assert batch["feature_views"].reshape(5, 4)[:, 0].tolist() == [0, 0, 0, 1, 2]


def test_each_prompt_may_have_its_own_number_and_limit(model: UniToken, vocabulary: Vocabulary) -> None:
    """So that a part of many prompts gets the same replies as among all."""
    several = prompts(vocabulary, 4, 9, 7, 6)
    limits = [3, 9, 5, 2]
    found = generate(model, vocabulary, several, Sampling(seed=1), max_tokens=limits)
    assert all(len(reply) <= limit for reply, limit in zip(found, limits, strict=True))
    some = generate(model, vocabulary, several[1:3], Sampling(seed=1), max_tokens=limits[1:3], numbers=[1, 2])
    assert some == found[1:3]


def test_an_image_that_has_begun_is_finished(model: UniToken, vocabulary: Vocabulary) -> None:
    (prompt,) = prompts(vocabulary, 4)
    (words,) = generate(model, vocabulary, [prompt], LIKELIEST, max_tokens=1)
    begins = dataclasses.replace(vocabulary, image_start=words[0])
    (reply,) = generate(model, begins, [prompt], LIKELIEST, sizes=[(4, 4)], max_tokens=1)
    assert codes_of(begins, reply).shape == (4, 4)


@pytest.mark.parametrize("vision", [VISION, None])
def test_greedy_answers_end_with_the_turn_or_the_limit(
    vocabulary: Vocabulary, vision: VisionTowerConfig | None
) -> None:
    """Prompts of several lengths with 0 to 2 images; without a tower these are image tokens only."""
    model = build(vocabulary, vision)
    several = prompts(vocabulary, 6, 7, 6, 9, 6)
    found = generate(model, vocabulary, several, LIKELIEST, max_tokens=5)
    assert found == [plainly(model, vocabulary, prompt, max_tokens=5) for prompt in several]
    assert len({tuple(tokens) for tokens in found}) > 1


def test_an_answer_ends_with_the_turn(model: UniToken, vocabulary: Vocabulary) -> None:
    several = prompts(vocabulary, 6)
    first = generate(model, vocabulary, several, LIKELIEST, max_tokens=1)[0][0]
    ends_there = dataclasses.replace(vocabulary, end_of_turn=first)
    assert generate(model, ends_there, several, LIKELIEST, max_tokens=9) == [[]]


def test_a_text_reply_has_no_image_token(model: UniToken, vocabulary: Vocabulary) -> None:
    replies = generate(
        model, vocabulary, prompts(vocabulary, *range(3, 20)), Sampling(temperature=20.0), max_tokens=30
    )
    assert not {token for reply in replies for token in reply} & vocabulary.special_ids


def test_images_of_prompts_may_have_tiles(model: UniToken, vocabulary: Vocabulary) -> None:
    """AnyRes: more features, with the newline's embedding after each row of them."""
    views = Views(8, 4, anyres=True)
    several = prompts(vocabulary, 6, 7, 6)
    found = generate(model, vocabulary, several, LIKELIEST, max_tokens=1, collate=PromptCollate(views))
    text = [token for token in range(vocabulary.size) if token not in vocabulary.special_ids] + [
        vocabulary.end_of_turn
    ]
    for prompt, reply in zip(several, found, strict=True):
        logits = logits_of(model, vocabulary, prompt, [], views)
        assert (reply or [vocabulary.end_of_turn]) == [max(text, key=lambda token: logits[token].item())]
    assert PromptCollate(views).length(several[1]) > PromptCollate(Views(8, 4)).length(several[1])


def test_an_image_in_an_earlier_answer_brings_no_features(vocabulary: Vocabulary) -> None:
    """In a conversation of several turns, as in training, where generated images have no features either."""
    record = make_record("r", vocabulary, 4, question_images=1, answer_images=1)
    longer = dataclasses.replace(
        record, tokens=np.concatenate([record.tokens, [3, vocabulary.end_of_turn]]).astype(np.uint16)
    )
    assert PromptCollate(Views(8, 4)).length(longer) == len(longer.tokens) + 1 + 4
    assert PromptCollate(Views(8, 4), "all", compat=True).length(longer) == len(longer.tokens) + 2 * (1 + 4)


def test_a_model_in_bfloat16_generates_images_and_text(vocabulary: Vocabulary) -> None:
    model = build(vocabulary, VISION).to(torch.bfloat16)
    several = prompts(vocabulary, 3, 5, 3)
    assert (
        len(generate(model, vocabulary, several, Sampling(guidance=2.0), sizes=[(2, 2)], drawing=True)) == 3
    )
    assert generate(model, vocabulary, several, LIKELIEST, max_tokens=3)


def test_a_prompt_ends_where_training_begins(vocabulary: Vocabulary) -> None:
    record = make_record("r", vocabulary, 7, question_images=2, answer_images=1)
    prompt = prompt_of(record)
    assert len(prompt.tokens) == record.target_spans[0][0]
    assert len(prompt.images) == len(prompt.image_spans) == 2
    assert (prompt.labels() == -100).all()


@pytest.mark.filterwarnings("ignore")
def test_the_last_checkpoint_of_a_stage_is_loaded(tmp_path: Path) -> None:
    from support.stages import stage, write_data
    from unitoken.train.check import check_stage
    from unitoken.train.generation.engine import load_model
    from unitoken.train.stage import run_stage

    write_data(tmp_path / "data")
    config = stage(tmp_path, "max_duration=2ba")
    checked = check_stage(config, 1)
    run_stage(config, checked)
    model = load_model(config.model, config.save.folder)
    assert not model.training
    replies = generate(
        model, checked.vocabulary, prompts(checked.vocabulary, 3), sizes=[(2, 2)], drawing=True
    )
    assert codes_of(checked.vocabulary, replies[0]).shape == (2, 2)


@pytest.mark.parametrize("speculative", [False, True])
def test_growing_replies_are_shown_and_may_be_stopped(
    model: UniToken, vocabulary: Vocabulary, speculative: bool
) -> None:
    several = prompts(vocabulary, 4, 9)
    sampling = Sampling(guidance=2.0, speculative=speculative)
    seen: dict[int, list[list[int]]] = {0: [], 1: []}

    def watch(place: int, ids: Callable[[], list[int]]) -> None:
        seen[place].append(ids())

    found = generate(model, vocabulary, several, sampling, sizes=[(4, 2)], drawing=True, watch=watch)
    for place, growing in seen.items():
        assert len(growing) > 1
        assert growing[-1] == found[place]
        assert all(found[place][: len(ids)] == ids for ids in growing)

    def stop(place: int, ids: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(model, vocabulary, several, sampling, sizes=[(4, 2)], drawing=True, watch=stop)
