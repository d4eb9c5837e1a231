"""Every damaged input is read or reported in one line: sources, datasets, checkpoints and weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from support.bad_inputs import damaged, wrong_json
from support.small_datasets import make_record, small_vocabulary, write_dataset
from support.tars import tar_of
from support.tokenizing import TOKENIZER, png, tiny_vqgan, turns
from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.conversations import ItemError, parse
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.codec.text import load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.vision_views import Views
from unitoken.storage.shard_cache import ShardError
from unitoken.storage.store import StoreError
from unitoken.streaming_data.check import check_sources
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.reading.shards import Shards
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import open_sources
from unitoken.tokenize.checks.verify import verify
from unitoken.tokenize.sources.adapters import find_adapter
from unitoken.tokenize.sources.reader import cut, find_files, read_piece
from unitoken.train.checkpoint.integrity import find_damage
from unitoken.train.checkpoint.layouts import read_decoder, read_vision
from unitoken.train.checkpoint.tensors import open_decoder_folder
from unitoken.train.run import run_folder

SECONDS = 20.0  # for one input
pytestmark = pytest.mark.filterwarnings("ignore")


def outcomes(cases: Iterator[tuple[str, bytes]], path: Path, use: Callable[[], Any]) -> dict[str, int]:
    """Write each case to `path` and call `use`, which may raise only our own errors, each of one line.

    Returns:
        How many cases were read, and how many were errors.
    """
    counts = {"read": 0, "error": 0}
    wrong: list[str] = []
    for name, content in cases:
        path.write_bytes(content)
        begun = time.monotonic()
        try:
            use()
            counts["read"] += 1
        except (ConfigError, StoreError, ItemError, ShardError) as error:
            counts["error"] += 1
            if "\n" in str(error) or not str(error):
                wrong.append(f"{name}: not one line: {error!r}")
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
        if time.monotonic() - begun > SECONDS:
            wrong.append(f"{name}: took {time.monotonic() - begun:.0f} s")
    assert not wrong, f"{len(wrong)} of {sum(counts.values()) + len(wrong)}:\n" + "\n".join(wrong[:20])
    return counts


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl", "tar", "parquet", "arrow"])
def test_sources(suffix: str, tmp_path: Path) -> None:
    items = [
        {"id": f"i{n}", "conversations": turns("What? <|image|>", "A."), "image": [png((4, 4))]}
        for n in range(6)
    ]
    texts = [{"id": f"i{n}", "conversations": turns("What?", "A.")} for n in range(6)]
    path = tmp_path / f"i.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(texts))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in texts))
    elif suffix == "tar":
        members = [(f"{n}.json", json.dumps(texts[n]).encode()) for n in range(6)]
        tar_of(path, [*members, ("6.png", png()), ("6.txt", b"a")])
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(items), path, row_group_size=2)
    else:
        with pa.ipc.new_stream(path, pa.Table.from_pylist(items).schema) as stream:
            stream.write_table(pa.Table.from_pylist(items), 2)
    content, adapter = path.read_bytes(), find_adapter("standard")

    def use() -> None:
        source = cut(find_files([str(path)]), 2)
        for piece in range(len(source.pieces)):
            for item in read_piece(source, piece):
                if isinstance(item.value, ItemError):
                    continue
                try:
                    parse(adapter(item.value), "0")  # type: ignore[arg-type]
                except ItemError:
                    continue

    counts = outcomes(damaged(content, 0, 70), path, use)
    assert counts["error"] > 5
    if suffix == "json":
        outcomes(wrong_json(content), path, use)


# --- datasets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = small_vocabulary()
    records = [make_record(f"r{n}", vocabulary, 6 + n % 3, question_images=n % 2) for n in range(12)]
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data", records, vocabulary)


FILES = ("index.json", "samples.parquet", "manifest.json", "vocabulary.json", "chunk-000000/shard.00000.mds")


@pytest.mark.parametrize("name", FILES)
def test_datasets_with_right_hashes_and_wrong_numbers(name: str, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    content, manifest = (folder / name).read_bytes(), (folder / "manifest.json").read_bytes()
    index = (folder / "index.json").read_bytes()
    views = Views(8, 4)

    def agree() -> None:
        """Make the recorded hashes those of the files as they are now."""
        if name.endswith(".mds"):
            fields = json.loads(index)
            entry = fields["shards"][0]["raw_data"]
            entry["bytes"] = (folder / name).stat().st_size
            entry["hashes"] = {key: _digest(key, folder / name) for key in entry["hashes"]}
            (folder / "index.json").write_text(json.dumps(fields))
        if name != "manifest.json":
            fields = json.loads(manifest)
            fields["files"] = {file: sha256_of_file(folder / file) for file in fields["files"]}
            (folder / "manifest.json").write_text(json.dumps(fields))

    def train() -> None:
        agree()
        shutil.rmtree(folder / "cache", ignore_errors=True)
        settings = {"packed_length": 64, "global_batch": 1, "continuous": "questions"}
        config = DataConfig.model_validate({"streams": {"a": {"local": str(folder)}}, **settings})
        sources = open_sources(config)
        check_sources(sources, config, views)
        recipe = Recipe.of(config, sources, views)
        read_lengths(sources[0], recipe, views)
        shards = Shards("a", folder, read_index(folder), None, folder / "cache", None)
        for number in range(len(shards.samples)):
            shard = shards.open(number)
            for record in shard.records(np.arange(shards.samples[number]), 0):
                record.labels()

    def look() -> None:
        agree()
        verify(str(folder), 1.0)

    cases = list(damaged(content, 1, 40))
    if name.endswith(".json"):
        cases += list(wrong_json(content, 250))
    for use in (train, look):
        outcomes(iter(cases), folder / name, use)


def _digest(algorithm: str, path: Path) -> str:
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


# --- checkpoints and weights ----------------------------------------------------------------------


def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"state": {"model": {"network.x": torch.arange(300.0)}, "callbacks": {}}}, path)

    def use() -> None:
        if (found := find_damage(path)) is not None:
            raise ConfigError(found)
        run_folder.open_checkpoint(path).load()

    counts = outcomes(damaged(path.read_bytes(), 2, 80), path, use)
    assert counts["error"] > 60


def decoder_folder(folder: Path) -> Path:
    from safetensors.torch import save_file

    from support.stages import DECODER
    from unitoken.train.config import DecoderConfig
    from unitoken.train.model.unitoken import UniToken

    folder.mkdir(parents=True)
    model = UniToken(DecoderConfig.model_validate(DECODER), None)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    vision = {"hidden_size": 16, "image_size": 8, "patch_size": 4}
    config = {"model_type": "chameleon", "vision_config": vision, **DECODER}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_model_folders(name: str, tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path / "model")
    content = (folder / name).read_bytes()

    def use() -> None:
        read_decoder(str(folder))
        if name == "config.json":
            read_vision(str(folder))
        else:
            open_decoder_folder(str(folder)).load()

    cases = list(damaged(content, 3, 60)) + (list(wrong_json(content)) if name.endswith(".json") else [])
    outcomes(iter(cases), folder / name, use)


@pytest.mark.parametrize("name", ["vqgan.yaml", "vqgan.safetensors"])
def test_image_tokenizers(name: str, tmp_path: Path) -> None:
    folder = tiny_vqgan(tmp_path / "vqgan")
    content = (folder / name).read_bytes()

    def use() -> None:
        load_vision(ImageTokenizerConfig(weights=str(folder)))

    outcomes(damaged(content, 4, 40), folder / name, use)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_text_tokenizers(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder)
    content = (folder / name).read_bytes()

    def use() -> None:
        load_tokenizer(str(folder)).get_vocab()

    cases = list(damaged(content, 5, 20)) + list(wrong_json(content, 60))
    outcomes(iter(cases), folder / name, use)
