"""Speculative decoding draws from the model's own distribution, in fewer passes."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from support.decoders import small_config
from support.small_datasets import small_vocabulary
from unitoken.dataset.record import Record
from unitoken.streaming_data.reading.batch import Batch
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import ModelConfig
from unitoken.train.generation.engine import generate
from unitoken.train.generation.sampling import Sampling
from unitoken.train.generation.speculative import verify_guesses
from unitoken.train.model.unitoken import UniToken, build_model

VOCABULARY = small_vocabulary()
CODES = len(VOCABULARY.image_ids)
LIKELIEST = Sampling(temperature=0.0, guidance=3.0)


def small_model(scale: float) -> UniToken:
    """A model whose codes depend the more on those before, the larger its output layer is."""
    config = small_config(vocab_size=VOCABULARY.size, num_key_value_heads=2)
    model = build_model(config, None, ModelConfig(decoder=config, vision=None))
    load_weights(model, {}, seed=1)
    with torch.no_grad():
        model.output_weight.mul_(scale)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> UniToken:
    return small_model(30)


def prompts(count: int) -> list[Record]:
    no_spans = np.zeros((0, 2), np.uint32), np.zeros((0, 4), np.uint32)
    lengths = itertools.cycle((3, 9, 5))
    texts = [np.arange(length) % 40 for length, _ in zip(lengths, range(count), strict=False)]
    return [
        Record("p", np.array([VOCABULARY.bos, *text, VOCABULARY.end_of_turn], np.uint16), *no_spans, ())
        for text in texts
    ]


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_a_verified_code_has_the_distribution_of_now() -> None:
    """Whatever the guess was drawn by: near to it, far from it, or without some of its codes."""
    count, generator = 40_000, torch.Generator().manual_seed(0)
    now = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    for then in ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.5, 0.5], [0.97, 0.01, 0.01, 0.01]):
        drawn_by = torch.tensor(then).double()
        guesses = torch.multinomial(drawn_by, count, replacement=True, generator=generator)[:, None]
        final, codes = verify_guesses(
            now.expand(count, 1, 4),
            drawn_by.expand(count, 1, 4),
            guesses,
            torch.ones(count, dtype=torch.int64),
            torch.rand(count, 2, generator=generator),
        )
        assert final.eq(1).all()
        observed = np.bincount(codes[:, 0], minlength=4)
        assert chi_square(observed, now.numpy() * count) < 16.3  # 99.9 % of chi-square with 3 degrees


def test_the_first_wrong_guess_ends_what_is_final() -> None:
    now = torch.eye(3).double()[[0, 1, 2, 0]].expand(3, 4, 3)
    guesses = torch.tensor([[0, 1, 2, 0], [0, 2, 2, 0], [1, 1, 2, 0]])
    then = torch.nn.functional.one_hot(guesses, 3).double()
    uniform = torch.full((3, 5), 0.5)
    final, codes = verify_guesses(now, then, guesses, torch.tensor([4, 4, 4]), uniform)
    assert final.tolist() == [4, 2, 1]
    assert codes[0].tolist() == [0, 1, 2, 0]
    assert codes[1, :2].tolist() == [0, 1]
    assert codes[2, 0] == 0
    assert verify_guesses(now, then, guesses, torch.tensor([2, 1, 3]), uniform)[0].tolist() == [2, 1, 1]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_likeliest_codes_are_those_drawn_one_by_one(model: UniToken, batch: int) -> None:
    """Also of images of several sizes, in replies of text, and with prompts that wait for a row."""
    for sizes, drawing in (([(4, 2)], True), ([(4, 6), (2, 2)], True), ([(2, 4)], False)):
        vocabulary = VOCABULARY
        if not drawing:
            words = max(generate(model, VOCABULARY, prompts(5), LIKELIEST, max_tokens=3), key=len)
            vocabulary = dataclasses.replace(VOCABULARY, image_start=words[-1])
        found = [
            generate(
                model,
                vocabulary,
                prompts(5),
                sampling,
                sizes=sizes,
                drawing=drawing,
                max_tokens=20,
                batch=batch,
            )
            for sampling in (
                LIKELIEST,
                Sampling(temperature=0.0, guidance=3.0, speculative=True),
            )
        ]
        assert found[0] == found[1]
        assert any(vocabulary.image_start in reply for reply in found[0])


def test_a_speculative_reply_depends_on_no_neighbour(model: UniToken) -> None:
    sampling = Sampling(guidance=2.0, seed=5, speculative=True)
    replies = [
        generate(model, VOCABULARY, prompts(5), sampling, sizes=[(4, 4)], drawing=True, batch=batch)
        for batch in (1, 2, 5)
    ]
    assert replies[0] == replies[1] == replies[2]
    assert len({tuple(reply) for reply in replies[0]}) == 5


def test_speculative_images_have_the_exact_distribution(model: UniToken) -> None:
    """Chi-square of all pairs of neighbouring codes against those of images drawn code by code."""
    count, pairs = 3000, []
    (prompt,) = prompts(1)
    for speculative in (False, True):
        sampling = Sampling(temperature=1.3, top_k_image=6, guidance=1.5, speculative=speculative)
        drawn = generate(
            model, VOCABULARY, [prompt] * count, sampling, sizes=[(2, 4)], drawing=True, batch=count
        )
        codes = np.stack([VOCABULARY.image_codes(np.array(reply)).reshape(-1) for reply in drawn])
        pairs.append(
            [np.bincount(pair, minlength=CODES**2) for pair in (codes[:, :-1] * CODES + codes[:, 1:]).T]
        )
    for plain, fast in zip(*pairs, strict=True):
        both = plain + fast
        seen = both > 10
        statistic = ((plain - fast)[seen] ** 2 / both[seen]).sum()  # of two samples of one size
        degrees = seen.sum() - 1
        assert statistic < degrees + 4.5 * np.sqrt(2 * degrees), (statistic, degrees)


def test_codes_that_depend_little_on_others_take_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, real = [], UniToken.predict

    def watched(self: UniToken, batch: Batch, *rest: Any, **settings: Any) -> torch.Tensor:
        passes.append(len(batch["input_ids"]))
        return real(self, batch, *rest, **settings)

    monkeypatch.setattr(UniToken, "predict", watched)
    sampling = Sampling(guidance=2.0, speculative=True)
    generate(small_model(1), VOCABULARY, prompts(4), sampling, sizes=[(8, 8)], drawing=True, batch=1)
    assert set(passes) == {2}
    assert len(passes) < 0.2 * 4 * 8 * 8
