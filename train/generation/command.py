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
from typing import TYPE_CHECKING, NamedTuple

from unitoken.codec.conversations import Conversation, short_name
from unitoken.codec.image_tokenizer.files import check_decoder, find_image_tokenizer
from unitoken.common.cli import report, warn
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE, exclusive_lock
from unitoken.dataset.vision_views import Pixels, Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.metadata import PictureCrops, read_metadata, read_sizes
from unitoken.train.config import DecoderConfig, VisionTowerConfig
from unitoken.train.generation.check_samples import (
    image_sizes,
    latent_size,
    parse_size,
    untrained_guidance,
    unusual_size,
)
from unitoken.train.generation.prompts import image_files, prompt_text
from unitoken.train.generation.reply_folder import JsonObject, ReplyFolder, check_reply_folder
from unitoken.train.generation.settings import Request, check_trained_vocabulary

if TYPE_CHECKING:  # these import torch
    from unitoken.train.generation.dialogue import Dialogue, Reply
    from unitoken.train.generation.engine import PromptCollate
    from unitoken.train.generation.sampling import Sampling


class CheckedRequest(NamedTuple):
    """What a request refers to, looked up before the model is loaded.

    Attributes:
        origin: the checkpoint file, or the folder of an exported model.
        decoder: sizes of the decoder.
        vision: sizes of the vision tower; None without one.
        trained_vocabulary: the vocabulary that the model was trained in; None if the checkpoint's folder does
            not have it.
        sizes: the (height, width) in pixels that a generated image may have; empty without a decoder, when
            replies are text only.
        crops: the (width, height) in pixels to which images of prompts are cropped for the image tokenizer.
    """

    origin: Path
    decoder: DecoderConfig
    vision: VisionTowerConfig | None
    trained_vocabulary: Vocabulary | None
    sizes: list[tuple[int, int]]
    crops: list[tuple[int, int]]


def check_request(
    request: Request, size: str | None, guidance: float, prompts: Path | None
) -> CheckedRequest:
    """Check a request as far as is possible without loading the model, and warn about likely mistakes.

    Args:
        request: what to generate.
        size: of generated images, as `768x512`; None: `samples.size`, or as the data's images.
        guidance: of generated images.
        prompts: the file that the prompts were read from, if there is one.

    Raises:
        ConfigError: the request can not be fulfilled.
    """
    codec, config = request.config.codec, request.config
    if codec is None:
        raise ConfigError(
            "codec: generating takes the data's tokenizers: set codec.tokenizer and codec.vision.weights"
        )
    inputs = image_files(request.conversations) + ([prompts] if prompts else [])
    origin = find_origin(str(request.checkpoint))
    about = read_metadata(origin)
    samples_size = config.samples.size if config.samples is not None else None
    sizes = image_sizes(parse_size(size) if size else samples_size, about.pictures)
    image_tokenizer = find_image_tokenizer(codec.vision)
    for pixels in sizes:
        latent_size(pixels, image_tokenizer.downsampling)
    if request.drawing or size:
        check_decoder(image_tokenizer, codec.vision.weights, "codec.vision.weights")
    check_reply_folder(request.out, inputs)
    guidance_trained = config.data.null_prompt_fraction > 0
    _warn_about(sizes, about.pictures, guidance, guidance_trained)
    decoder, vision = read_sizes(origin, config.model)
    # Runs of older versions have no pictures.json: images of prompts are then as large as those that are
    # generated.
    crops = about.pictures.crops if about.pictures is not None else []
    crops = crops or [(width, height) for height, width in sizes]
    if not image_tokenizer.has_decoder:
        sizes = []
    return CheckedRequest(origin, decoder, vision, about.vocabulary, sizes, crops)


def _warn_about(
    sizes: Sequence[tuple[int, int]], pictures: PictureCrops | None, guidance: float, guidance_trained: bool
) -> None:
    warnings = [
        unusual_size(sizes[0], pictures) if len(sizes) == 1 else None,
        untrained_guidance(guidance, guidance_trained),
    ]
    for warning in warnings:
        if warning is not None:
            warn(warning)


def reply(request: Request, checked: CheckedRequest, sampling: Sampling) -> None:
    """Load the model, then generate, write and print the replies, batch by batch.

    Raises:
        ConfigError: another `generate` writes to the same folder, tokenizers and model do not fit, a prompt
            is too long, or the GPU has too little memory.
    """
    lock = request.out / f"{ASIDE}lock"
    with exclusive_lock(
        lock, f"{request.out}: another `generate` is at work in it: name another folder, or wait"
    ):
        _reply(request, checked, sampling)
    lock.unlink(missing_ok=True)


def _reply(request: Request, checked: CheckedRequest, sampling: Sampling) -> None:
    import torch

    from unitoken.train.generation.dialogue import Dialogue
    from unitoken.train.generation.engine import PromptCollate, generate, load_model

    config, device = request.config, "cuda" if torch.cuda.is_available() else "cpu"
    assert config.codec is not None, "check_request"
    dialogue = Dialogue(config.codec, checked.trained_vocabulary, device)
    _check_vocabulary(dialogue.vocabulary, request.checkpoint, checked)
    vision = checked.vision
    views = Views(vision.image_size, vision.patch_size, config.data.anyres) if vision else None
    collate = PromptCollate(views, config.data.continuous, config.compat == "unitoken")
    lengths = _check_lengths(request, checked, dialogue, collate)
    half = config.precision == "bf16" and device == "cuda"
    # Converted tensor by tensor: the whole model in float32 may be too large for the device.
    model = load_model(config.model, request.checkpoint).to(device, torch.bfloat16 if half else None)
    folder = ReplyFolder(request.out, _identity(request, checked, sampling))
    finished = folder.begin()
    if finished:
        _print(f"{request.out}: goes on behind {len(finished)} of {len(lengths)} replies")
    for numbers in _batches(lengths, finished, request.batch):
        conversations = [request.conversations[number] for number in numbers]
        limits = [min(request.max_tokens, config.data.packed_length - lengths[number]) for number in numbers]
        try:
            generated = generate(
                model,
                dialogue.vocabulary,
                dialogue.encode(conversations, checked.crops),
                sampling,
                sizes=[dialogue.latents(size) for size in checked.sizes],
                drawing=request.drawing,
                max_tokens=limits,
                numbers=numbers,
                collate=collate,
                batch=request.batch,
            )
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--batch {request.batch}: the GPU has no memory for so many replies at a time: give less"
            ) from None
        ended = [request.drawing or len(ids) < limit for ids, limit in zip(generated, limits, strict=True)]
        replies = dialogue.decode(generated)
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


def _check_vocabulary(vocabulary: Vocabulary, checkpoint: Path, checked: CheckedRequest) -> None:
    if vocabulary.size > checked.decoder.vocab_size:
        raise ConfigError(
            f"codec: its vocabulary has {vocabulary.size} ids, "
            f"model.decoder has room for {checked.decoder.vocab_size}"
        )
    if checked.trained_vocabulary is not None:
        check_trained_vocabulary(vocabulary, checked.trained_vocabulary, str(checkpoint))


def _check_lengths(
    request: Request, checked: CheckedRequest, dialogue: Dialogue, collate: PromptCollate
) -> list[int]:
    """Return the length of each prompt. Raises ConfigError if one leaves too little room for a reply."""
    sizes = [dialogue.latents(size) for size in checked.sizes] if request.drawing else []
    shortest_reply = max((len(list(dialogue.vocabulary.image_grammar(*size))) for size in sizes), default=1)
    limit = request.config.data.packed_length
    lengths = {}
    for conversation in dict.fromkeys(request.conversations):
        length = collate.length(dialogue.encode_layout(conversation, checked.crops))
        if length + shortest_reply > limit:
            raise ConfigError(
                f"{conversation.id}: the prompt takes {length} tokens, features included, and the reply "
                f"{shortest_reply} at least; together they exceed data.packed_length ({limit}), "
                "the longest sequence seen in training"
            )
        lengths[conversation] = length
    return [lengths[conversation] for conversation in request.conversations]


def _batches(lengths: Sequence[int], finished: Collection[int], batch: int) -> Iterator[list[int]]:
    """Yield the numbers of the unfinished replies, in batches of prompts of similar length."""
    missing = [number for number in range(len(lengths)) if number not in finished]
    missing.sort(key=lengths.__getitem__)
    for first in range(0, len(missing), batch):
        yield missing[first : first + batch]


def _identity(request: Request, checked: CheckedRequest, sampling: Sampling) -> JsonObject:
    """Return everything that the replies depend on.

    Files are identified by name, size and time: weights are large and prompts may be many.
    """
    config, origin = request.config, checked.origin
    weights = [origin] if origin.is_file() else sorted(origin.glob("*.safetensors"))
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
        "sizes": checked.sizes,
        "crops": checked.crops,
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
