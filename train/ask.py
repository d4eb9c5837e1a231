"""`python -m unitoken.train generate`: a checkpoint's replies to prompts, as files.

out/0000.png, 0000-1.png, ...   what it drew for prompt 0, in order
out/0000.txt                    what it said, with `<|image|>` where a picture stands
out/results.jsonl               a line a reply: number, prompt, images, text, pictures; written last
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unitoken.codec.conversations import Conversation
from unitoken.codec.weights import find_weights
from unitoken.streaming_data.config import ConfigError, load_config
from unitoken.streaming_data.files import write_aside
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.train.about import STAGE, read_about, sizes_of
from unitoken.train.config import StageConfig
from unitoken.train.folders import find_origin
from unitoken.train.questions import check_images, latents, parse_size, prompt_text

if TYPE_CHECKING:  # torch
    from unitoken.train.dialogue import Said
    from unitoken.train.sampling import Sampling

RESULTS = "results.jsonl"
SIZE = (512, 512)


class Request(NamedTuple):
    """What is asked for, checked as far as it can be without loading anything."""

    config: StageConfig
    checkpoint: Path
    conversations: list[Conversation]  # a reply each
    pixels: tuple[int, int]  # height, width of what is drawn, and of the prompts' pictures for the image tokenizer
    out: Path
    drawing: bool
    max_tokens: int
    batch: int


def settings(checkpoint: Path, config: Path | None, overrides: Sequence[str]) -> StageConfig:
    """A stage's settings, from `config` or from beside the checkpoint. Raises ConfigError."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not checkpoint.exists():
        raise ConfigError(f"{checkpoint}: no such checkpoint, and no folder of a run or of an exported model")
    if config is None and not (folder / STAGE).is_file():
        raise ConfigError(f"{folder}: it has no {STAGE}: name the stage's YAML file with --config")
    return load_config(StageConfig, config or folder / STAGE, overrides)


def check(request: Request, size: str | None) -> Request:
    """With its size. Raises ConfigError."""
    codec, config = request.config.codec, request.config
    if codec is None:
        raise ConfigError("codec: generating takes the data's tokenizers: set codec.tokenizer and codec.vision.weights")
    check_images(request.conversations)
    default = config.samples.size if config.samples else SIZE
    pixels = parse_size(size) if size else default
    latents(pixels, find_weights(codec.vision).downsampling)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        write_aside(request.out / RESULTS, b"")  # what is there now is no longer the result
    except OSError as error:
        raise ConfigError(f"{request.out}: cannot write there: {error.strerror or error}") from None
    return request._replace(pixels=pixels)


def reply(request: Request, sampling: Sampling) -> None:
    """Load the model, generate, write, print."""
    import torch

    from unitoken.train.dialogue import Dialogue
    from unitoken.train.generate import Reading, generate, load_model

    config, device = request.config, "cuda" if torch.cuda.is_available() else "cpu"
    assert config.codec is not None, "checked"
    dialogue = Dialogue(config.codec, device)
    _check_room(dialogue.vocabulary, request)
    prompts = dialogue.prompts(request.conversations, request.pixels)
    model = load_model(config, request.checkpoint).to(device)
    if config.precision == "bf16" and device == "cuda":
        model = model.to(torch.bfloat16)
    replies = generate(
        model,
        dialogue.vocabulary,
        prompts,
        sampling,
        sizes=[dialogue.latents(request.pixels)],
        drawing=request.drawing,
        max_tokens=request.max_tokens,
        reading=Reading.of(config, model),
        batch=request.batch,
    )
    write(request, dialogue.said(replies))


def check_vocabulary(vocabulary: Vocabulary, trained: Vocabulary, where: str) -> None:
    """The tokenizers must be those that the model was trained with. Raises ConfigError."""
    if vocabulary.fingerprint != trained.fingerprint:
        raise ConfigError(
            f"codec: its vocabulary has fingerprint {vocabulary.fingerprint} ({vocabulary.size} ids), {where} has "
            f"{trained.fingerprint} ({trained.size} ids)"
        )


def _check_room(vocabulary: Vocabulary, request: Request) -> None:
    origin = find_origin(str(request.checkpoint))
    decoder, _ = sizes_of(origin, request.config.model)
    if vocabulary.size > decoder.vocab_size:
        raise ConfigError(f"codec: its vocabulary has {vocabulary.size} ids, model.decoder has room for {decoder.vocab_size}")
    trained = read_about(origin).vocabulary
    if trained is not None:
        check_vocabulary(vocabulary, trained, str(request.checkpoint))


def write(request: Request, said: Sequence[Said]) -> None:
    lines = []
    for number, (conversation, one) in enumerate(zip(request.conversations, said, strict=True)):
        name = f"{number:04d}"
        pictures = [f"{name}.png" if not n else f"{name}-{n}.png" for n in range(len(one.pictures))]
        for file, picture in zip(pictures, one.pictures, strict=True):
            write_aside(request.out / file, png(picture))
        if not request.drawing:
            write_aside(request.out / f"{name}.txt", (one.text + "\n").encode())
        asked, images = prompt_text(conversation), [i if isinstance(i, str) else "" for i in conversation.images]
        lines.append({"number": number, "prompt": asked, "images": images, "text": one.text, "pictures": pictures})
        print(f"{name}  {asked.strip()}  ->  {' '.join(pictures) if request.drawing else one.text}")
    write_aside(request.out / RESULTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def png(picture: object) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()
