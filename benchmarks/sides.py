"""The two programs that `benchmarks.tokenizing` compares, each in a process of its own.

`ours` is our worker, `baseline` the reference's loop.
"""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.codec.text import load_tokenizer
from unitoken.dataset import images
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.pipeline.worker import keep_freed_memory, run_chunks
from unitoken.tokenize.prepare import prepare


@dataclass(frozen=True)
class Setting:
    """What both programs tokenize, and with which settings."""

    name: str
    config: TokenizeConfig
    source: Path  # items.json; each item has a picture and a question
    device: str
    items: int  # of a round of our worker
    baseline_items: int  # of a round of the reference's loop


def ours(connection: Connection, setting: Setting) -> None:
    """Answer requests until None.

    `("worker", rank, ranks)` gets a worker's figures, `("encoder",)` the rate of the image tokenizer alone.
    """
    if setting.device == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()  # as the worker does, so that the encoder alone has it too
    vision = load_vision(setting.config.vision, setting.device)
    for task in iter(connection.recv, None):
        if task[0] == "encoder":
            connection.send(_encoder_rate(setting, vision))
        else:
            connection.send(_worker_figures(setting, *task[1:]))


def _worker_figures(setting: Setting, rank: int, ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        job = prepare(setting.config, [str(setting.source)], out)
        start = time.perf_counter()
        times = run_chunks(job, job.chunks()[rank::ranks], lambda *_: None, setting.device)
        seconds = time.perf_counter() - start
    shares = {stage: getattr(times, stage) / times.total for stage in ("read", "pictures", "encode", "write")}
    return {
        "images_per_s": times.images / seconds,
        "gpu_wait_share": times.gpu_wait_share,
        "stage_shares": shares,
    }


def _encoder_rate(setting: Setting, vision: Any) -> float:
    """Measure the images per second of the image tokenizer alone, with two batches in flight as a worker."""
    size = setting.config.target_size
    batch = list(
        np.random.default_rng(0).integers(0, 256, (setting.config.vision.batch_size, size, size, 3), np.uint8)
    )
    vision.encode(batch)
    count = max(2, setting.items // len(batch) // 2)
    start = time.perf_counter()
    in_flight = vision.begin(batch)
    for _ in range(count - 1):
        following = vision.begin(batch)
        in_flight.codes()
        in_flight = following
    in_flight.codes()
    return count * len(batch) / (time.perf_counter() - start)


def baseline(connection: Connection, setting: Setting) -> None:
    """Answer (torch's threads, items) with the images per second of the reference's loop, until None."""
    vision = load_vision(setting.config.vision, setting.device)
    tokenizer = load_tokenizer(setting.config.tokenizer)
    vocabulary = Vocabulary.from_tokens(tokenizer.get_vocab(), vision.codebook_size)
    source = json.loads(setting.source.read_text())
    for threads, count in iter(connection.recv, None):
        torch.set_num_threads(threads)
        items = source[:count]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            for number, item in enumerate(items):
                _reference_step(item, number, setting, vision, tokenizer, vocabulary, Path(folder))
            connection.send(len(items) / (time.perf_counter() - start))


def _reference_step(
    item: dict[str, Any],
    number: int,
    setting: Setting,
    vision: Any,
    tokenizer: Any,
    vocabulary: Vocabulary,
    folder: Path,
) -> None:
    """Do with one item what UniToken's `pretokenize` does.

    The image is opened, cropped and encoded alone; tokens and labels are lists and go into a pickle; then a
    line in the record and the number of the item are written.
    """
    image = Image.open(io.BytesIO((setting.source.parent / item["image"][0]).read_bytes()))
    image.load()
    crop = images.choose_crop(image.size, [(setting.config.target_size,) * 2])
    block = vocabulary.image_block(vision.encode(images.tokenizer_pixels(image, crop)[None])[0]).tolist()
    tokens, labels = [vocabulary.bos], [-100]
    for turn in item["conversations"]:
        for part, text in enumerate(turn["value"].split("<|image|>")):
            ids = (block if part else []) + tokenizer(text, truncation=False, add_special_tokens=False)[
                "input_ids"
            ]
            tokens += ids
            labels += ids if turn["from"] == "gpt" else [-100] * len(ids)
        tokens.append(vocabulary.end_of_turn)
        labels.append(vocabulary.end_of_turn)
    with open(folder / f"{number}.pkl", "wb") as file:
        pickle.dump({"token": tokens, "label": labels, "id": number}, file)
    with open(folder / "0-of-1-record.jsonl", "a") as record:
        record.write(json.dumps({"file": f"{number}.pkl", "len": len(tokens), "id": number}) + "\n")
    with open(folder / "0-of-1-progress.txt", "w") as progress:
        progress.write(str(number))
