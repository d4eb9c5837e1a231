"""The settings under `data:` of a stage: which datasets are mixed, and how they are streamed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from unitoken.common.config import Bytes, Config, Count, Name, Seed, number_or_text

if TYPE_CHECKING:
    pass


Length = Annotated[int, Field(gt=0, le=2**24)]  # positions in a pack


Unit = Literal["samples", "tokens", "target_tokens"]


Kind = Literal[
    "understanding", "generation", "text"
]  # all images are asked about; one at least is generated; no image


Continuous = Literal["questions", "all", "none"]


OverLong = Literal["reject", "truncate_text"]


BatchingMethod = Literal["stratified", "random", "per_stream"]


class StreamConfig(Config):
    """One dataset of the mixture. Without proportion, repeat or choose every sample is seen once an epoch."""

    local: Name | None = None
    """The dataset folder; with `remote`, the folder that caches it."""
    remote: Name | None = None
    """A folder, s3://, gs://, azure://, hf:// ..."""
    endpoint: Name | None = None
    """The S3 server of this stream; default S3_ENDPOINT_URL, or Amazon's."""
    proportion: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Share of the epoch in `unit`, relative to the other streams'."""
    repeat: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Times all it has."""
    choose: Annotated[int, Field(ge=0, le=10**15)] | None = None
    """So many of `unit`."""
    max_tokens: Length | None = None
    """A longer sample, features included, is over-long; default packed_length."""
    kinds: Annotated[tuple[Kind, ...] | None, Field(min_length=1)] = None
    """Only samples of these kinds; default all."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples, by hash of their ids, that is not trained on."""

    @pydantic.model_validator(mode="after")
    def _one_weight(self) -> StreamConfig:
        if not self.local and not self.remote:
            raise ValueError("a stream needs `local` or `remote`")
        if len(self.weight) > 1:
            raise ValueError(f"give one of proportion, repeat and choose, not {' and '.join(self.weight)}")
        if self.endpoint and not (self.remote or "").startswith("s3://"):
            raise ValueError(f"`endpoint` is for a `remote` that begins with s3://, found {self.remote!r}")
        return self

    @property
    def weight(self) -> dict[str, float]:
        """The one weight given, by its name; empty where none is."""
        return self.model_dump(include={"proportion", "repeat", "choose"}, exclude_none=True)


class DataConfig(Config):
    """What is streamed, and in which order. All but the last five settings decide the order of the samples."""

    streams: dict[str, StreamConfig] = Field(min_length=1)
    packed_length: Length
    """Tokens a pack, image features included."""
    global_batch: Annotated[Count, number_or_text("^[1-9][0-9]* *tok$")]
    """Packs a step, over all ranks; or positions: 524288tok is 128 packs of 4,096."""
    seed: Seed = 0
    unit: Unit = "samples"
    """What proportion and choose count."""
    epoch_samples: Annotated[int, Field(gt=0, lt=2**32)] | None = None
    """An epoch's size, where the streams have proportions or no weights at all."""
    epoch_tokens: Annotated[int, Field(gt=0, le=10**15)] | None = None
    """The same in tokens, features included; default: what all streams have together."""
    split: Literal["train", "held_out"] = "train"
    """Held_out: what training leaves out, to evaluate on."""
    continuous: Continuous = "questions"
    """Which images bring their continuous features."""
    anyres: bool = False
    """Besides the whole picture its tiles at full resolution."""
    canonical_nodes: Count = 1
    """Rows of shards that are read side by side: the most nodes that share no shard."""
    shuffle: bool = True
    window: Annotated[int, Field(gt=0, lt=2**31)] = 131072
    """Samples that are packed together."""
    batching_method: BatchingMethod = "stratified"
    """Stratified: every global batch holds the epoch's mixture. random: packs in random order. per_stream:
    each batch is of one stream, in proportion. Without `shuffle` packs come in the order of the samples."""
    over_long: OverLong = "reject"
    """Leave out what is longer than a pack; or cut it at its end, never inside an image."""
    null_prompt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the drawings are trained on without their prompt's text."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes a rank; 0 loads in the training process."""
    prefetch: Annotated[int, Field(gt=0, le=1024)] = 2
    """Batches that each worker prepares ahead."""
    timeout: Count = 600
    """Seconds without a batch from a worker until that is an error."""
    cache_limit: Bytes | None = None
    """That downloaded shards may take in each cache folder: 500gb."""
    cache: Name | None = None
    """Plans and caches of remote datasets; default $XDG_CACHE_HOME/unitoken or ~/.cache/unitoken."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _tokens_a_batch(cls, settings: Any) -> Any:
        """`global_batch: 524288tok` -> packs."""
        batch = settings.get("global_batch") if isinstance(settings, dict) else None
        match = re.fullmatch(r"([1-9]\d*) *tok", batch) if isinstance(batch, str) else None
        length = settings.get("packed_length") if match else None
        if match is None or not isinstance(length, int) or length <= 0:
            return settings  # what is wrong with packed_length is said of itself
        packs, rest = divmod(int(match[1]), length)
        if not packs or rest:
            raise ValueError(f"global_batch: {batch} are no whole number of packs of packed_length: {length}")
        return {**settings, "global_batch": packs}

    @pydantic.model_validator(mode="after")
    def _weights_fit(self) -> DataConfig:
        kinds = {name: next(iter(stream.weight), "no weight") for name, stream in self.streams.items()}
        proportional = [name for name, kind in kinds.items() if kind == "proportion"]
        absolute = [f"'{name}' ({kind})" for name, kind in kinds.items() if kind != "proportion"]
        if proportional and absolute:
            raise ValueError(
                f"proportion is for all streams or for none: '{proportional[0]}' has it, {', '.join(absolute)} not"
            )
        if proportional and not any(stream.proportion for stream in self.streams.values()):
            raise ValueError("the proportions of all streams are 0")
        if self.epoch_samples and self.epoch_tokens:
            raise ValueError("give one of epoch_samples and epoch_tokens")
        size = "epoch_samples" if self.epoch_samples else "epoch_tokens" if self.epoch_tokens else None
        if size and not proportional and any(kind != "no weight" for kind in kinds.values()):
            raise ValueError(f"{size} does not go with repeat or choose: {', '.join(absolute)}")
        everything = [name for name, stream in self.streams.items() if not stream.held_out]
        if self.split == "held_out" and everything:
            raise ValueError(
                f"split: held_out needs `held_out` above 0 in every stream: '{everything[0]}' has none"
            )
        return self

    @property
    def cache_folder(self) -> Path:
        if self.cache:
            return Path(self.cache)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unitoken"
