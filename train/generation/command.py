"""`python -m unitoken.train generate`: a checkpoint's replies to prompts, as files (replies.py)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unitoken.codec.conversations import Conversation, short_name
from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE, exclusive_lock
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.metadata import read_metadata, read_sizes
from unitoken.train.generation.check_samples import drawn_sizes, latents, parse_size, unguided, unusual
from unitoken.train.generation.prompts import files_of, prompt_text
from unitoken.train.generation.reply_folder import Line, Replies, check_reply_folder
from unitoken.train.generation.settings import Request, check_trained_vocabulary

if TYPE_CHECKING:  # torch
    from unitoken.train.generation.dialogue import Dialogue, Said
    from unitoken.train.generation.engine import Reading
    from unitoken.train.generation.sampling import Sampling


class CheckedRequest(NamedTuple):
    """As far as it can be checked without loading anything."""

    origin: Path
    sizes: list[tuple[int, int]]  # height, width in pixels that a drawing may have
    crops: list[
        tuple[int, int]
    ]  # width, height that pictures of prompts may be cut to for the image tokenizer


def check_request(
    request: Request, size: str | None, guidance: float, prompts: Path | None
) -> CheckedRequest:
    """Says what is odd. Raises ConfigError."""
    codec, config = request.config.codec, request.config
    if codec is None:
        raise ConfigError(
            "codec: generating takes the data's tokenizers: set codec.tokenizer and codec.vision.weights"
        )
    inputs = files_of(request.conversations) + ([prompts] if prompts else [])
    origin = find_origin(str(request.checkpoint))
    pictures = read_metadata(origin).pictures
    sizes = [parse_size(size)] if size else drawn_sizes(config, pictures)
    for pixels in sizes:
        latents(pixels, find_image_tokenizer(codec.vision).downsampling)
    check_reply_folder(request.out, inputs)
    for odd in (unusual(sizes[0], pictures) if len(sizes) == 1 else None, unguided(guidance, config)):
        if odd:
            print(f"warning: {odd}", file=sys.stderr, flush=True)
    crops = (
        pictures.crops if pictures is not None else []
    )  # a run of before it said so: as large as what is drawn
    return CheckedRequest(origin, sizes, crops or [(width, height) for height, width in sizes])


def reply(request: Request, checked: CheckedRequest, sampling: Sampling) -> None:
    """Load the model, and batch by batch generate, write, print. One at a time in a folder."""
    lock = request.out / f"{ASIDE}lock"
    with exclusive_lock(
        lock, f"{request.out}: another `generate` is at work in it: name another folder, or wait"
    ):
        _reply(request, checked, sampling)
    lock.unlink(missing_ok=True)


def _reply(request: Request, checked: CheckedRequest, sampling: Sampling) -> None:
    import torch

    from unitoken.train.generation.dialogue import Dialogue
    from unitoken.train.generation.engine import Reading, generate, load_model

    config, device = request.config, "cuda" if torch.cuda.is_available() else "cpu"
    assert config.codec is not None, "checked"
    dialogue = Dialogue(config.codec, device)
    _check_room(dialogue.vocabulary, request, checked.origin)
    reading = Reading.of(config, read_sizes(checked.origin, config.model)[1])
    lengths = _lengths(request, checked, dialogue, reading)
    half = config.precision == "bf16" and device == "cuda"
    # Tensor by tensor: the whole in float32 may be too much for the device.
    model = load_model(config, request.checkpoint).to(device, torch.bfloat16 if half else None)
    ask = functools.partial(
        generate,
        model,
        dialogue.vocabulary,
        sampling=sampling,
        sizes=[dialogue.latents(size) for size in checked.sizes],
        drawing=request.drawing,
        reading=reading,
        batch=request.batch,
    )
    replies = Replies(request.out, _identity(request, checked, sampling))
    done = replies.begin()
    if done:
        say(f"{request.out}: goes on behind {len(done)} of {len(lengths)} replies")
    for numbers in _batches(lengths, done, request.batch):
        conversations = [request.conversations[number] for number in numbers]
        limits = [min(request.max_tokens, config.data.packed_length - lengths[number]) for number in numbers]
        try:
            found = ask(dialogue.prompts(conversations, checked.crops), max_tokens=limits, numbers=numbers)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--batch {request.batch}: the GPU has no memory for so many replies at a time: give less"
            ) from None
        ended = [request.drawing or len(ids) < limit for ids, limit in zip(found, limits, strict=True)]
        lines = list(map(_line, numbers, conversations, dialogue.said(found), ended))
        replies.add([(line, _files(line, said, request.drawing)) for line, said in lines])
        done.update(numbers)
        _tell([line for line, _ in lines], request.drawing, len(done), len(lengths))


def _tell(lines: Sequence[Line], drawing: bool, done: int, total: int) -> None:
    for line in lines:
        answer = " ".join(line["pictures"]) if drawing else line["text"]
        say(f"{line['number']:04d}  {line['prompt'].strip()}  ->  {answer}")
    if len(lines) < total:
        say(f"{done} of {total} replies")


def say(line: str) -> None:
    """Whatever the locale; and when nobody reads any more, the files are still wanted."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_room(vocabulary: Vocabulary, request: Request, origin: Path) -> None:
    decoder, _ = read_sizes(origin, request.config.model)
    if vocabulary.size > decoder.vocab_size:
        raise ConfigError(
            f"codec: its vocabulary has {vocabulary.size} ids, model.decoder has room for {decoder.vocab_size}"
        )
    trained = read_metadata(origin).vocabulary
    if trained is not None:
        check_trained_vocabulary(vocabulary, trained, str(request.checkpoint))


def _lengths(request: Request, checked: CheckedRequest, dialogue: Dialogue, reading: Reading) -> list[int]:
    """Positions of each prompt; with a reply they must be no more than the model ever read. Raises ConfigError."""
    drawn = [dialogue.latents(size) for size in checked.sizes] if request.drawing else []
    room = max((len(list(dialogue.vocabulary.image_grammar(*size))) for size in drawn), default=1)
    limit = request.config.data.packed_length
    lengths = {}
    for conversation in dict.fromkeys(request.conversations):
        length = reading.length(dialogue.outline(conversation, checked.crops))
        if length + room > limit:
            raise ConfigError(
                f"{conversation.id}: the prompt takes {length} tokens, features included, and the reply {room} at least; "
                f"longer than data.packed_length, {limit}, is nothing that the model ever read"
            )
        lengths[conversation] = length
    return [lengths[conversation] for conversation in request.conversations]


def _batches(lengths: Sequence[int], done: Collection[int], batch: int) -> Iterator[list[int]]:
    """The numbers of what is not done, those of about one length together."""
    missing = sorted(
        (number for number in range(len(lengths)) if number not in done), key=lengths.__getitem__
    )
    for first in range(0, len(missing), batch):
        yield missing[first : first + batch]


def _identity(request: Request, checked: CheckedRequest, sampling: Sampling) -> Line:
    """What the replies depend on; files by their names, sizes and times, since weights are large and prompts many."""
    config, origin = request.config, checked.origin
    weights = [origin] if origin.is_file() else sorted(origin.glob("*.safetensors"))
    prompts = hashlib.sha256()
    for conversation in request.conversations:
        prompts.update(repr([turn.segments for turn in conversation.turns]).encode())
        for image in conversation.images:
            prompts.update(image if isinstance(image, bytes) else image.encode())
    files = files_of(request.conversations)
    asked = {
        "checkpoint": [_stamp(path) for path in weights],
        "prompts": prompts.hexdigest(),
        "images": hashlib.sha256(repr([_stamp(path) for path in files]).encode()).hexdigest(),
        "sampling": dataclasses.asdict(sampling),
        "sizes": checked.sizes,
        "crops": checked.crops,
        "drawing": request.drawing,
        "max_tokens": request.max_tokens,
        "codec": config.codec.model_dump() if config.codec else None,
        "data": config.data.model_dump(include={"packed_length", "continuous", "anyres"}),
        "model": [config.model.model_dump(), config.compat, config.precision],
    }
    plain: Line = json.loads(json.dumps(asked))
    return plain


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _line(number: int, conversation: Conversation, said: Said, ended: bool) -> tuple[Line, Said]:
    """`ended`: by the model itself, and not by --max-tokens."""
    name = f"{number:04d}"
    pictures = [f"{name}.png" if not n else f"{name}-{n}.png" for n in range(len(said.pictures))]
    images = [short_name(image) for image in conversation.images]
    asked = prompt_text(conversation)
    line = {
        "number": number,
        "prompt": asked,
        "images": images,
        "text": said.text,
        "pictures": pictures,
        "ended": ended,
    }
    return line, said


def _files(line: Line, said: Said, drawing: bool) -> dict[str, bytes]:
    files = {name: png(picture) for name, picture in zip(line["pictures"], said.pictures, strict=True)}
    return files if drawing else files | {f"{line['number']:04d}.txt": f"{said.text}\n".encode()}


def png(picture: object) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()
