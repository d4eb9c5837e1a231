"""`unitoken generate`: a checkpoint's replies to prompts, as files (reply_folder.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unitoken.codec.conversations import Conversation, short_name
from unitoken.common.cli import report, warn
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE, exclusive_lock
from unitoken.dataset.vision_views import Pixels
from unitoken.train.generation.check_samples import (
    untrained_guidance,
    unusual_size,
)
from unitoken.train.generation.loaded_model import FoundModel, LoadedModel, find_model
from unitoken.train.generation.prompts import image_files, prompt_text
from unitoken.train.generation.reply_folder import JsonObject, ReplyFolder, check_reply_folder
from unitoken.train.generation.settings import Request

if TYPE_CHECKING:  # these import torch
    from unitoken.train.generation.dialogue import Reply
    from unitoken.train.generation.sampling import Sampling


def check_request(request: Request, size: str | None, guidance: float, prompts: Path | None) -> FoundModel:
    """Check a request as far as is possible without loading the model, and warn about likely mistakes.

    Args:
        request: what to generate.
        size: of generated images, as `768x512`; None: `samples.size`, or as the data's images.
        guidance: of generated images.
        prompts: the file that the prompts were read from, if there is one.

    Raises:
        ConfigError: the request can not be fulfilled.
    """
    inputs = image_files(request.conversations) + ([prompts] if prompts else [])
    found = find_model(request.config, request.checkpoint, size, draws=request.drawing or bool(size))
    check_reply_folder(request.out, inputs)
    _warn_about(found, guidance)
    return found


def _warn_about(found: FoundModel, guidance: float) -> None:
    warnings = [
        unusual_size(found.sizes[0], found.pictures) if len(found.sizes) == 1 else None,
        untrained_guidance(guidance, found.config.data.null_prompt_fraction > 0),
    ]
    for warning in warnings:
        if warning is not None:
            warn(warning)


def reply(request: Request, found: FoundModel, sampling: Sampling) -> None:
    """Load the model, then generate, write and print the replies, batch by batch.

    Raises:
        ConfigError: another `generate` writes to the same folder, tokenizers and model do not fit, a prompt
            is too long, or the GPU has too little memory.
    """
    lock = request.out / f"{ASIDE}lock"
    with exclusive_lock(
        lock, f"{request.out}: another `generate` is at work in it: name another folder, or wait"
    ):
        _reply(request, found, sampling)
    lock.unlink(missing_ok=True)


def _reply(request: Request, found: FoundModel, sampling: Sampling) -> None:
    import torch

    model = LoadedModel(found)
    lengths = model.check_lengths(request.conversations, found.sizes, request.drawing)
    model.load()  # before the folder is touched
    folder = ReplyFolder(request.out, _identity(request, found, sampling))
    finished = folder.begin()
    if finished:
        _print(f"{request.out}: goes on behind {len(finished)} of {len(lengths)} replies")
    for numbers in _batches(lengths, finished, request.batch):
        conversations = [request.conversations[number] for number in numbers]
        room = [request.config.data.packed_length - lengths[number] for number in numbers]
        limits = [min(request.max_tokens, most) for most in room]
        try:
            generated = model.generate(
                conversations,
                sampling,
                sizes=found.sizes,
                drawing=request.drawing,
                max_tokens=limits,
                numbers=numbers,
            )
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--batch {request.batch}: the GPU has no memory for so many replies at a time: give less"
            ) from None
        ended = [request.drawing or len(ids) < limit for ids, limit in zip(generated, limits, strict=True)]
        replies = model.dialogue.decode(generated)
        results = list(map(_result, numbers, conversations, replies, ended))
        files = [
            _files(result, reply, request.drawing) for result, reply in zip(results, replies, strict=True)
        ]
        folder.add(list(zip(results, files, strict=True)))
        finished.update(numbers)
        _print_results(results, request.drawing, len(finished), len(lengths))


def _print_results(results: Sequence[JsonObject], drawing: bool, finished: int, total: int) -> None:
    for result in results:
        answer = " ".join(result["pictures"]) if drawing else result["text"]
        _print(f"{result['number']:04d}  {result['prompt'].strip()}  ->  {answer}")
    if len(results) < total:
        _print(f"{finished} of {total} replies")


def _print(text: str) -> None:
    """Print in UTF-8, whatever the locale; ignore a closed pipe, as the files are still wanted."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        report(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _batches(lengths: Sequence[int], finished: Collection[int], batch: int) -> Iterator[list[int]]:
    """Yield the numbers of the unfinished replies, in batches of prompts of similar length."""
    missing = [number for number in range(len(lengths)) if number not in finished]
    missing.sort(key=lengths.__getitem__)
    for first in range(0, len(missing), batch):
        yield missing[first : first + batch]


def _identity(request: Request, found: FoundModel, sampling: Sampling) -> JsonObject:
    """Return everything that the replies depend on.

    Files are identified by name, size and time: weights are large and prompts may be many.
    """
    config, origin = request.config, found.origin
    weights = [origin] if origin.is_file() else sorted(origin.rglob("*.safetensors"))
    prompts = hashlib.sha256()
    for conversation in request.conversations:
        turns = [conversation.system] if conversation.system else []
        prompts.update(repr([turn.segments for turn in [*turns, *conversation.turns]]).encode())
        for image in conversation.images:
            prompts.update(image if isinstance(image, bytes) else image.encode())
    images = [_file_stamp(path) for path in image_files(request.conversations)]
    identity = {
        "checkpoint": [_file_stamp(path) for path in weights],
        "prompts": prompts.hexdigest(),
        "images": hashlib.sha256(repr(images).encode()).hexdigest(),
        "sampling": dataclasses.asdict(sampling),
        "sizes": found.sizes,
        "crops": found.crops,
        "drawing": request.drawing,
        "max_tokens": request.max_tokens,
        "codec": config.codec.model_dump() if config.codec else None,
        "data": config.data.model_dump(include={"packed_length", "continuous", "anyres"}),
        "model": [config.model.model_dump(), config.compat, config.precision],
    }
    as_json: JsonObject = json.loads(json.dumps(identity))
    return as_json


def _file_stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _result(number: int, conversation: Conversation, reply: Reply, ended: bool) -> JsonObject:
    """Return a reply's line of results.jsonl; `ended`: by the model itself, and not by --max-tokens."""
    name = f"{number:04d}"
    return {
        "number": number,
        "prompt": prompt_text(conversation),
        "images": [short_name(image) for image in conversation.images],
        "text": reply.text,
        "pictures": [f"{name}.png" if n == 0 else f"{name}-{n}.png" for n in range(len(reply.pictures))],
        "ended": ended,
    }


def _files(result: JsonObject, reply: Reply, drawing: bool) -> dict[str, bytes]:
    files = {name: png(picture) for name, picture in zip(result["pictures"], reply.pictures, strict=True)}
    if not drawing:
        files[f"{result['number']:04d}.txt"] = f"{reply.text}\n".encode()
    return files


def png(picture: Pixels) -> bytes:
    """Encode an image (H, W, 3) as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
