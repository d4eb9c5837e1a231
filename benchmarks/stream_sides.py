"""The same text samples in six formats, with the six readers that `benchmarks.streaming` compares.

Each reader shuffles, and gives arrays in memory. Each is tuned as its documentation advises for small
samples: large shards, large buffers, one member per sample in tars.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import mmap
import pickle
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import INDEX, MANIFEST, REJECTS, SIDECAR, VOCABULARY, Manifest, VisionTokenizer
from unitoken.dataset.record import IGNORED, Record, columns
from unitoken.dataset.sidecar import samples_schema
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.reading.loader import PackedLoader, build_loader
from unitoken.streaming_data.settings import DataConfig

LENGTH, BATCH = 4096, 8
Array = npt.NDArray[Any]
Sample = tuple[Array, Array]  # tokens (T,), spans (S, 2)


@functools.cache  # it takes a while to make, and is no part of reading
def vocabulary() -> Vocabulary:
    """Make a vocabulary of 50,000 text tokens and 8 image codes."""
    return Vocabulary.from_tokens({f"t{n}": n for n in range(50_000)}, codebook_size=8)


def samples(count: int) -> Iterator[Sample]:
    """Draw samples: their lengths are log-normal with a mean of 1,300 tokens, the last half is trained on."""
    rng = np.random.default_rng(0)
    for length in np.clip(rng.lognormal(6.9, 0.75, count), 16, LENGTH).astype(int):
        yield rng.integers(0, 50_000, length).astype(np.uint16), np.array([[length // 2, length]], np.uint32)


def write_manifest(folder: Path, count: int) -> None:
    """Make a dataset of a folder that has an index and a sidecar."""
    vocabulary().save(folder / VOCABULARY)
    (folder / REJECTS).write_bytes(b"")
    vision = VisionTokenizer(
        kind="chameleon", weights="0" * 16, codebook_size=8, downsampling=16, precision="fp32"
    )
    manifest = Manifest(
        vocabulary=vocabulary().fingerprint,
        vision=vision,
        target_size=32,
        crop="center",
        compat=None,
        items=count,
        samples=count,
        rejected=0,
        tokens=0,
        target_tokens=0,
        images=0,
        chunks=1,
        chunk_size=count,
        source="0" * 16,
        files={name: sha256_of_file(folder / name) for name in (INDEX, SIDECAR, REJECTS, VOCABULARY)},
    )
    (folder / MANIFEST).write_bytes(manifest.dump())


# --- writing --------------------------------------------------------------------------------------


def write_all(folder: Path, count: int) -> None:
    """Write the samples in every format but LitData's, which needs a process of its own."""
    _write_mds(folder / "mds", count)
    _write_tars(folder / "tars", count)
    _write_pickles(folder / "pickles", count)
    _write_flat(folder / "flat", count)


def _write_mds(folder: Path, count: int) -> None:
    from streaming import MDSWriter

    no_images, rows = np.zeros((0, 4), np.uint32), []
    with MDSWriter(
        out=str(folder / "chunk"), columns=columns(60_000), hashes=["sha1"], size_limit=1 << 26
    ) as writer:
        for number, (tokens, spans) in enumerate(samples(count)):
            writer.write(Record(f"{number:08}", tokens, spans, no_images, ()).to_mds())
            rows.append((len(tokens), int(spans[0, 1] - spans[0, 0])))
    index = json.loads((folder / "chunk" / INDEX).read_bytes())
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"chunk/{shard['raw_data']['basename']}"
    (folder / INDEX).write_text(json.dumps(index))
    lengths, targets = np.array(rows).T
    write_sidecar(folder / SIDECAR, lengths, targets)
    write_manifest(folder, count)


def write_sidecar(path: Path, lengths: Array, targets: Array) -> None:
    """Write the sidecar of samples without images, a million rows at a time.

    Args:
        path: the file to write.
        lengths: (samples,) tokens of each.
        targets: (samples,) tokens of each that are trained on.
    """
    schema, step = samples_schema(), 1 << 20
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(lengths), step):
            rows = len(lengths[begin : begin + step])
            no_items = pyarrow.array([], pyarrow.uint32())
            empty_lists = pyarrow.ListArray.from_arrays(np.zeros(rows + 1, np.int32), no_items)
            zeros = pyarrow.array(np.zeros(rows, np.uint16))
            values = {
                "id": pyarrow.array(np.arange(begin, begin + rows)).cast(pyarrow.string()),
                "tokens": pyarrow.array(lengths[begin : begin + step]),
                "target_tokens": pyarrow.array(targets[begin : begin + step]),
            }
            arrays = []
            for name, kind in zip(schema.names, schema.types, strict=True):
                default = empty_lists if pyarrow.types.is_list(kind) else zeros
                arrays.append(values.get(name, default).cast(kind))
            writer.write_table(pyarrow.table(arrays, schema=schema))


def _pack(tokens: Array, spans: Array) -> bytes:
    return np.uint32(len(spans)).tobytes() + spans.tobytes() + tokens.tobytes()


def _unpack(data: bytes) -> Sample:
    count = int.from_bytes(data[:4], "little")
    spans = np.frombuffer(data, "<u4", 2 * count, offset=4).reshape(-1, 2)
    return np.frombuffer(data, "<u2", offset=4 + 8 * count), spans


def _write_tars(folder: Path, count: int) -> None:
    folder.mkdir()
    numbered = enumerate(samples(count))
    for first in range(0, count, 500):
        with tarfile.open(folder / f"{first:08}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in itertools.islice(numbered, 500):
                member, data = tarfile.TarInfo(f"{number:08}.bin"), _pack(*sample)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _write_pickles(folder: Path, count: int) -> None:
    """Write a pickle for each sample, with lists of Python's integers, as UniToken's `pre_tokenize` does."""
    folder.mkdir()
    for number, (tokens, spans) in enumerate(samples(count)):
        labels = np.full(len(tokens), IGNORED)
        labels[spans[0, 0] : spans[0, 1]] = tokens[spans[0, 0] : spans[0, 1]]
        with open(folder / f"{number}.pkl", "wb") as file:
            pickle.dump({"token": tokens.tolist(), "label": labels.tolist(), "id": number}, file)


def _write_flat(folder: Path, count: int) -> None:
    folder.mkdir()
    offsets, all_spans = [0], []
    with open(folder / "tokens.bin", "wb") as file:
        for tokens, spans in samples(count):
            file.write(tokens.tobytes())
            offsets.append(offsets[-1] + len(tokens))
            all_spans.append(spans[0])
    np.save(folder / "offsets.npy", np.array(offsets))
    np.save(folder / "spans.npy", np.array(all_spans))


def litdata_samples(numbers: range) -> Iterator[dict[str, Array]]:
    """Give the samples as LitData's `optimize` expects them."""
    for tokens, spans in samples(numbers.stop):
        yield {"tokens": tokens, "spans": spans}


def write_litdata(folder: Path, count: int) -> None:
    """Write the samples in LitData's format.

    Call it in a process of its own, as LitData changes how all later processes are started.
    """
    import litdata

    litdata.optimize(
        litdata_samples, [range(count)], str(folder), chunk_bytes="64MB", num_workers=1, verbose=False
    )


# --- reading --------------------------------------------------------------------------------------


def our_loader(folder: Path, workers: int = 0, **settings: Any) -> PackedLoader:
    """Build our loader; `settings` replace those under `data:` of a stage."""
    defaults: dict[str, Any] = {
        "streams": {"text": {"local": str(folder / "mds")}},
        "packed_length": LENGTH,
        "global_batch": BATCH,
        "continuous": "none",
        "workers": workers,
        "cache": str(folder / "cache"),
    }
    config = DataConfig.model_validate({**defaults, **settings})
    return build_loader(
        config, views=None, vocabulary=vocabulary(), batch_packs=config.global_batch, compat=False
    )


def _ours(folder: Path) -> Iterable[Sample]:
    for pack in our_loader(folder).dataset:
        for record in pack:
            yield record.tokens, record.target_spans


def _stock_dataset(folder: Path) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(
        local=str(folder / "mds"), shuffle=True, batch_size=BATCH, num_canonical_nodes=1, predownload=8192
    )


def _stock(folder: Path) -> Iterable[Sample]:
    for sample in _stock_dataset(folder):
        yield sample["tokens"], sample["target_spans"]


def _webdataset_dataset(folder: Path) -> Any:
    import webdataset

    tars = sorted(map(str, (folder / "tars").glob("*.tar")))
    return webdataset.WebDataset(tars, shardshuffle=100, seed=0).shuffle(1000).map(_of_tar)


def _of_tar(sample: dict[str, Any]) -> Sample:
    return _unpack(sample["bin"])


def _litdata_dataset(folder: Path) -> Any:
    import litdata

    return litdata.StreamingDataset(str(folder / "litdata"), shuffle=True)


def _litdata(folder: Path) -> Iterable[Sample]:
    for sample in _litdata_dataset(folder):
        yield sample["tokens"], sample["spans"]


class Pickles(Dataset[Sample]):
    """The reference's dataset: a pickle for each sample."""

    def __init__(self, folder: Path) -> None:
        count = len(list((folder / "pickles").iterdir()))
        self.paths = [folder / "pickles" / f"{n}.pkl" for n in range(count)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Sample:
        with open(self.paths[number], "rb") as file:
            item = pickle.load(file)  # noqa: S301 - the reference reads so, and the files were made here
        labels = np.array(item["label"])
        return np.array(item["token"]), np.array([[len(labels) - (labels != IGNORED).sum(), len(labels)]])


class Flat(Dataset[Sample]):
    """A raw memory map, the fastest that is possible."""

    def __init__(self, folder: Path) -> None:
        with open(folder / "flat" / "tokens.bin", "rb") as file:
            self.tokens = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint16)
        self.offsets: list[int] = np.load(folder / "flat" / "offsets.npy").tolist()
        self.spans: Array = np.load(folder / "flat" / "spans.npy")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Sample:
        return self.tokens[self.offsets[number] : self.offsets[number + 1]], self.spans[number : number + 1]


def _in_random_order(dataset: Pickles | Flat) -> Iterator[Sample]:
    for number in np.random.default_rng(0).permutation(len(dataset)).tolist():
        yield dataset[number]


ONE_PROCESS: dict[str, Callable[[Path], Iterable[Sample]]] = {
    "ours": _ours,
    "stock": _stock,
    "webdataset": _webdataset_dataset,
    "litdata": _litdata,
    "pickles": lambda folder: _in_random_order(Pickles(folder)),
    "memmap": lambda folder: _in_random_order(Flat(folder)),
}


def _pair(sample: Any) -> Sample:
    """The tokens and spans of a sample, which some readers give as a dict."""
    if isinstance(sample, dict):
        return sample["tokens"], sample["spans"] if "spans" in sample else sample["target_spans"]
    tokens, spans = sample
    return tokens, spans


def padded(batch: list[Any]) -> dict[str, torch.Tensor]:
    """Collate samples that are not packed: ids and labels, padded to the longest, and the lengths."""
    pairs = [_pair(sample) for sample in batch]
    shape = len(pairs), max(len(tokens) for tokens, _ in pairs)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for row, (tokens, spans) in enumerate(pairs):
        ids[row, : len(tokens)] = tokens
        for start, end in np.asarray(spans).tolist():
            labels[row, start:end] = tokens[start:end]
    lengths = torch.tensor([len(tokens) for tokens, _ in pairs])
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "lengths": lengths}


def two_workers(side: str, folder: Path) -> Iterable[tuple[int, int]]:
    """Count the samples and tokens of each batch that a DataLoader with two workers delivers."""
    if side == "ours":
        for batch in our_loader(folder, workers=2):
            documents = batch["documents"]
            yield len(documents), int((documents[:, 2] - documents[:, 1]).sum())
        return
    datasets: dict[str, Callable[[Path], Any]] = {
        "stock": _stock_dataset,
        "webdataset": _webdataset_dataset,
        "litdata": _litdata_dataset,
        "pickles": Pickles,
        "memmap": Flat,
    }
    dataset = datasets[side](folder)
    loader: type[DataLoader[Any]] = DataLoader
    if side == "litdata":
        import litdata

        loader = litdata.StreamingDataLoader
    shuffle = None if isinstance(dataset, IterableDataset) else True
    for batch in loader(dataset, batch_size=3 * BATCH, num_workers=2, collate_fn=padded, shuffle=shuffle):
        yield len(batch["lengths"]), int(batch["lengths"].sum())
