"""A run with the demo's tokenizers that replies in a moment, for the tests of `chat`."""

from __future__ import annotations

import threading
from pathlib import Path

from PIL import Image

from support.drawn import demo_vocabulary, drawing_stage, write_run
from unitoken.train.chat.speaker import ReplySoFar, Speaker
from unitoken.train.chat.talk import ChatSettings, Talk
from unitoken.train.checkpoint.metadata import ModelSizes, PictureCrops, write_metadata
from unitoken.train.generation.loaded_model import FoundModel, LoadedModel, find_model
from unitoken.train.generation.settings import settings


def write_talking_run(folder: Path, packed_length: int = 200) -> Path:
    """Write the folder of a run with new weights, whose data has pictures of 32 x 16 pixels."""
    config = drawing_stage(folder, f"data.packed_length={packed_length}")
    run = write_run(folder, config)
    sizes = ModelSizes.model_validate(config.model.model_dump(include={"decoder", "vision"}))
    write_metadata(run, config, sizes, demo_vocabulary(), PictureCrops(crops=[(32, 16)]))
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "red.png")
    return run


def found(run: Path) -> FoundModel:
    return find_model(settings(run, None, []), run, None, draws=False)


def speaker_of(run: Path) -> Speaker:
    return Speaker(LoadedModel(found(run)))


def last_reply(speaker: Speaker, talk: Talk, text: str, chosen: ChatSettings, *pictures: bytes) -> ReplySoFar:
    """Ask, and return the whole reply."""
    conversation = talk.ask(text, pictures)
    *_, last = speaker.reply(talk, conversation, chosen, threading.Event())
    return last
