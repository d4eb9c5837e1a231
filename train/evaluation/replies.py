"""A task's replies to prompts, in units of `batch` replies to prompts of similar length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from unitoken.codec.image_tokenizer.files import check_decoder, find_image_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.config import TaskConfig
from unitoken.train.evaluation.items import TaskItem, hash_items
from unitoken.train.evaluation.model import EvaluatedModel
from unitoken.train.evaluation.task_folder import Line, UnitWork
from unitoken.train.generation.check_samples import guidance_or_default, latent_size
from unitoken.train.generation.command import png
from unitoken.train.generation.dialogue import Reply
from unitoken.train.generation.engine import generate
from unitoken.train.generation.loaded_model import check_lengths
from unitoken.train.generation.sampling import Sampling

DEFAULT_GUIDANCE = 4.0  # as in `unitoken generate`, if the model was trained with null prompts


def task_sampling(task: TaskConfig, seed: int, guidance_trained: bool) -> Sampling:
    """Return how a task's replies are sampled."""
    if not task.draw:
        return Sampling(temperature=task.temperature or 0.0, top_k_text=task.top_k, seed=seed)
    return Sampling(
        temperature=1.0 if task.temperature is None else task.temperature,
        top_k_image=task.top_k,
        guidance=guidance_or_default(task.guidance, DEFAULT_GUIDANCE, guidance_trained),
        seed=seed,
    )


def prepare_replies(
    name: str, task: TaskConfig, items: Sequence[TaskItem], model: EvaluatedModel, seed: int
) -> UnitWork:
    """Check a task's prompts against a model, and cut the work into units.

    Args:
        name: the task's.
        task: its settings.
        items: its prompts.
        model: answers or draws.
        seed: of the suite.

    Raises:
        ConfigError: the image tokenizer has no decoder, a size does not suit the image tokenizer, or a
            prompt is too long.
    """
    config = model.config
    assert config.codec is not None, "open_suite"
    sizes: list[tuple[int, int]] = []
    if task.draw:
        sizes = [task.size] if task.size is not None else model.sizes
        tokenizer = find_image_tokenizer(config.codec.vision)
        check_decoder(tokenizer, config.codec.vision.weights, f"tasks.{name}: codec.vision.weights")
        for size in sizes:
            latent_size(size, tokenizer.downsampling, f"tasks.{name}.size")
    sampling = task_sampling(task, seed, config.data.null_prompt_fraction > 0)
    prompts, limit = [item.prompt for item in items], config.data.packed_length
    lengths = check_lengths(model.dialogue, model.collate, prompts, model.crops, sizes, limit)
    numbers = sorted(
        range(len(items) * task.replies), key=lambda number: (lengths[number // task.replies], number)
    )
    units = [numbers[first : first + task.batch] for first in range(0, len(numbers), task.batch)]
    request = {
        "prompts_sha256": hash_items(list(items)),
        "sampling": dataclasses.asdict(sampling),
        "sizes": sizes,
        "crops": model.crops,
        **task.model_dump(mode="json", include={"draw", "replies", "max_tokens", "batch"}),
        "model": model.identity,
    }
    do = functools.partial(_reply, name, task, items, model, sampling, sizes, lengths, units)
    return UnitWork(request, len(units), do)


def _reply(
    name: str,
    task: TaskConfig,
    items: Sequence[TaskItem],
    model: EvaluatedModel,
    sampling: Sampling,
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    units: Sequence[Sequence[int]],
    unit: int,
) -> tuple[list[Line], dict[str, bytes]]:
    """Generate the replies of a unit."""
    dialogue, numbers = model.dialogue, units[unit]
    places = [number // task.replies for number in numbers]
    limit = model.config.data.packed_length
    limits = [min(task.max_tokens, limit - lengths[place]) for place in places]
    try:
        generated = generate(
            model.network,
            dialogue.vocabulary,
            dialogue.encode([items[place].prompt for place in places], model.crops),
            sampling,
            sizes=[dialogue.latents(size) for size in sizes],
            drawing=task.draw,
            max_tokens=limits,
            numbers=numbers,
            collate=model.collate,
            batch=task.batch,
            broadcast=model.broadcast,
        )
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"tasks.{name}: batch {task.batch}: the GPU has no memory for so many replies: give less"
        ) from None
    ended = [task.draw or len(ids) < most for ids, most in zip(generated, limits, strict=True)]
    replies = dialogue.decode(generated)
    results = [_result(*reply, task.draw) for reply in zip(numbers, replies, ended, strict=True)]
    return [line for line, _ in results], {file: data for _, files in results for file, data in files.items()}


def _result(number: int, reply: Reply, ended: bool, draw: bool) -> tuple[Line, dict[str, bytes]]:
    """Return a reply's line and its drawing, by the name of its file."""
    line: dict[str, Any] = {"number": number}
    if draw:
        line["picture"] = f"{number:04d}.png"
        return line, {line["picture"]: png(reply.pictures[0])}
    return {**line, "text": reply.text, "ended": ended}, {}
