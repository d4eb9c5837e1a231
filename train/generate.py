"""Drawing and answering with a trained model, on one process.

model = load_model(config)                       # of a stage: its last checkpoint
codes = generate_images(model, vocabulary, prompts, height=32, width=32)
texts = answer(model, vocabulary, [prompt_of(record) for record in held_out])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unitoken.streaming_data.collate import Collate, featured, insert_features
from unitoken.streaming_data.record import Record
from unitoken.streaming_data.views import Views
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.train import checkpoints
from unitoken.train.config import StageConfig
from unitoken.train.decoder import KVCache
from unitoken.train.folders import find_checkpoint, model_configs
from unitoken.train.model import UniToken, build_model, load_weights, shapes_of
from unitoken.train.weights import check_shapes

BATCH = 64  # prompts of one length that are generated together


def load_model(config: StageConfig, checkpoint: str | Path | None = None) -> UniToken:
    """The model of a stage with the weights of `checkpoint`, or of the stage's own last one. Raises ConfigError."""
    source = checkpoints.source_of(find_checkpoint(str(checkpoint or config.save.folder)))
    model = build_model(*model_configs(config.model), config.model)
    check_shapes(source.shapes, shapes_of(model), source.where)
    load_weights(model, {part: source for part, _ in model.named_children()}, seed=0)
    return model.eval()


def prompt_of(record: Record) -> Record:
    """A record up to the first token that is trained on: what a model is asked."""
    end = int(record.target_spans[0][0])
    images = int((record.image_spans[:, 1] <= end).sum())
    no_targets = np.zeros((0, 2), np.uint32)
    return Record(record.id, record.tokens[:end], no_targets, record.image_spans[:images], record.images[:images])


@torch.no_grad()
def generate_images(
    model: UniToken,
    vocabulary: Vocabulary,
    prompts: Sequence[npt.NDArray[Any]],
    height: int,
    width: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> npt.NDArray[np.int64]:
    """Draw an image of `height` x `width` latents after each prompt (ids, up to where the image begins): codes (N, height, width).

    Only what an image may hold at a place is drawn from, so every result is a whole image. A prompt's random numbers
    depend on (seed, its number), not on the prompts beside it. `temperature` 0 takes the likeliest code.
    """
    grammar = list(vocabulary.image_grammar(height, width))
    device = model.lm_head.weight.device
    blocks = np.zeros((len(prompts), len(grammar)), np.int64)
    for group in _of_equal_length([len(prompt) for prompt in prompts]):
        generators = [_generator(seed, number) for number in group]
        fixed = next(place for place, allowed in enumerate(grammar) if len(allowed) > 1)  # start of image and its size
        head = np.array([allowed[0] for allowed in grammar[:fixed]])
        ids = np.stack([np.concatenate([prompts[number], head]) for number in group]).astype(np.int64)
        past = KVCache(len(model.model.layers), ids.shape[1] + len(grammar) - fixed)
        blocks[group, :fixed] = head
        hidden = _read(model, model.model.embed_tokens(torch.from_numpy(ids).to(device)), past)
        for place in range(fixed, len(grammar)):
            allowed = torch.tensor(grammar[place], device=device)
            if len(allowed) == 1:
                chosen = allowed.expand(len(group))
            else:
                chosen = allowed[_sample(_logits(model, hidden)[:, allowed], temperature, top_k, generators)]
            blocks[group, place] = chosen.cpu().numpy()
            if place + 1 < len(grammar):
                hidden = _read(model, model.model.embed_tokens(chosen[:, None]), past)
    return np.stack([vocabulary.image_codes(block) for block in blocks])


@torch.no_grad()
def answer(
    model: UniToken,
    vocabulary: Vocabulary,
    prompts: Sequence[Record],
    max_tokens: int = 64,
    *,
    continuous: str = "questions",
    compat: bool = False,
) -> list[list[int]]:
    """The likeliest continuation of each prompt up to the end of the turn, which is left out. Images only in the prompts.

    Prompts are records without targets (`prompt_of`); their images bring features exactly as in training.
    """
    views = Views(model.vision.image_size, model.vision.patch_size) if model.vision else None
    which = "none" if views is None else "all" if compat and continuous != "none" else continuous
    lengths = []
    for prompt in prompts:
        images = featured(prompt.labels(), prompt.image_spans, which)
        counts = dict.fromkeys(images, views.features) if views else {}
        lengths.append(len(insert_features(prompt, counts, vocabulary.separator).ids))
    device = model.lm_head.weight.device
    answers: list[list[int]] = [[] for _ in prompts]
    for group in _of_equal_length(lengths):
        length = lengths[group[0]]
        collate = Collate(length, views, continuous, vocabulary.separator, vocabulary.newline, compat)
        batch = {name: value.to(device) for name, value in collate([[prompts[number]] for number in group]).items()}
        past = KVCache(len(model.model.layers), length + max_tokens)
        embeddings = model.embed(batch)
        running = torch.ones(len(group), dtype=torch.bool, device=device)
        for _ in range(max_tokens):
            chosen = _logits(model, _read(model, embeddings, past)).argmax(-1)
            running &= chosen != vocabulary.end_of_turn
            if not running.any():
                break
            for number, token, goes_on in zip(group, chosen.tolist(), running.tolist(), strict=True):
                if goes_on:
                    answers[number].append(token)
            embeddings = model.model.embed_tokens(chosen[:, None])
    return answers


def _generator(seed: int, number: int) -> torch.Generator:
    """Mixed into 32 bits, because torch's generator on the CPU looks at no more of its seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _of_equal_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of prompts in groups of one length, so that none needs padding."""
    for length in sorted(set(lengths)):
        numbers = [number for number, other in enumerate(lengths) if other == length]
        yield from (numbers[first : first + BATCH] for first in range(0, len(numbers), BATCH))


def _read(model: UniToken, embeddings: Tensor, past: KVCache) -> Tensor:
    """Embeddings (B, T, hidden) behind what `past` holds -> the last hidden states (B, hidden)."""
    rows, length, _ = embeddings.shape
    positions = torch.arange(past.seen, past.seen + length, device=embeddings.device).expand(rows, -1)
    hidden: Tensor = model.model(embeddings, positions, None, past)
    return hidden[:, -1]


def _logits(model: UniToken, hidden: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(hidden).float()
    return logits


def _sample(logits: Tensor, temperature: float, top_k: int | None, generators: Sequence[torch.Generator]) -> Tensor:
    """Indices (B,) into logits (B, K). Gumbel noise from the CPU: the same draw on every device."""
    if temperature <= 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    uniform = torch.stack([torch.rand(logits.shape[-1], generator=generator) for generator in generators])
    noise = -torch.log(-torch.log(uniform.clamp_min(1e-20)))
    return (logits / temperature + noise.to(logits.device)).argmax(-1)
