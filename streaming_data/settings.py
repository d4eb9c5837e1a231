"""The settings under `data:` of a stage: which datasets are mixed, and how they are streamed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from unitoken.common.config import Bytes, Config, Count, Name, Seed, number_or_text
from unitoken.dataset.kinds import Kind

Length = Annotated[int, Field(gt=0, le=2**24)]  # positions in a pack
Unit = Literal["samples", "tokens", "target_tokens"]
Continuous = Literal["questions", "all", "none"]
OverLong = Literal["reject", "truncate_text"]
BatchingMethod = Literal["stratified", "random", "per_stream"]
Split = Literal["train", "held_out"]


class StreamConfig(Config):
    """One dataset of the mixture. Without proportion, repeat or choose every sample is seen once an epoch."""

    local: Name | None = None
    """The dataset folder; with `remote`, the folder that caches it."""
    remote: Name | None = None
    """The dataset's source: a folder, s3://, gs://, azure://, hf:// ..."""
    endpoint: Name | None = None
    """The S3 server of this stream; default S3_ENDPOINT_URL, or Amazon's."""
    proportion: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Share of the epoch in `unit`, relative to the other streams' proportions."""
    repeat: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """How many times an epoch goes through the whole dataset; 0.5 takes a random half."""
    choose: Annotated[int, Field(ge=0, le=10**15)] | None = None
    """How much an epoch takes of the dataset, counted in `unit`."""
    max_tokens: Length | None = None
    """Samples longer than this, features included, are over-long; default packed_length."""
    kinds: Annotated[tuple[Kind, ...] | None, Field(min_length=1)] = None
    """Use samples of these kinds only; default all. text: no images; understanding: images, none generated;
    generation: at least one generated image."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples, chosen by a hash of their ids, that is not trained on."""

    @pydantic.model_validator(mode="after")
    def _check_place_and_weight(self) -> StreamConfig:
        if not self.local and not self.remote:
            raise ValueError("a stream needs `local` or `remote`")
        if len(self.weight) > 1:
            raise ValueError(f"give one of proportion, repeat and choose, not {' and '.join(self.weight)}")
        if self.endpoint and not (self.remote or "").startswith("s3://"):
            raise ValueError(f"`endpoint` is for a `remote` that begins with s3://, found {self.remote!r}")
        return self

    @property
    def weight(self) -> dict[str, float]:
        """The stream's proportion, repeat or choose, by its name; empty without any."""
        return self.model_dump(include={"proportion", "repeat", "choose"}, exclude_none=True)


class DataConfig(Config):
    """Which datasets are streamed, and in which order.

    Places (`local`, `remote`, `endpoint`, `cache`) and the settings of loading (`workers`, `prefetch`,
    `timeout`, `cache_limit`) may change when a run resumes. All others are part of its data plan (`Recipe`).
    """

    streams: dict[str, StreamConfig] = Field(min_length=1)
    """The datasets of the mixture, by names of your choice."""
    packed_length: Length
    """Positions in a pack, image features included."""
    global_batch: Annotated[Count, number_or_text("^[1-9][0-9]* *tok$")]
    """Packs in a step, over all ranks; or positions: 524288tok is 128 packs of 4,096."""
    seed: Seed = 0
    """Decides the order of the samples and which are chosen."""
    unit: Unit = "samples"
    """What proportion and choose count."""
    epoch_samples: Annotated[int, Field(gt=0, lt=2**32)] | None = None
    """Size of an epoch, for streams with proportions or without weights."""
    epoch_tokens: Annotated[int, Field(gt=0, le=10**15)] | None = None
    """Size of an epoch in tokens, features included; default: as much as all streams have together."""
    split: Split = "train"
    """held_out: the samples that training leaves out, for evaluation."""
    continuous: Continuous = "questions"
    """Which images have continuous features besides their tokens; questions: all that are not generated."""
    anyres: bool = False
    """Show the vision tower an image's tiles at full resolution besides the whole image."""
    canonical_nodes: Count = 1
    """Rows of shards that are read side by side: up to this many nodes share no shard."""
    shuffle: bool = True
    """Take the samples in random order; false: in the order of the datasets."""
    window: Annotated[int, Field(gt=0, lt=2**31)] = 131072
    """Number of samples that are packed together."""
    batching_method: BatchingMethod = "stratified"
    """stratified: every global batch holds the epoch's mixture. random: packs in random order. per_stream:
    each batch is from one stream, in proportion. Without `shuffle` packs come in the order of the samples."""
    over_long: OverLong = "reject"
    """Leave out samples that are longer than a pack; or cut them at their end, never inside an image."""
    null_prompt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts for an image that are trained on without their text."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Loader processes of each rank; 0 loads in the training process."""
    prefetch: Annotated[int, Field(gt=0, le=1024)] = 2
    """Batches that each worker prepares ahead."""
    timeout: Count = 600
    """Seconds without a batch from a worker after which training fails."""
    cache_limit: Bytes | None = None
    """The most that downloaded shards may take in each cache folder, e.g. 500gb."""
    cache: Name | None = None
    """Folder for plans and remote datasets; default $XDG_CACHE_HOME/unitoken or ~/.cache/unitoken."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _convert_tokens_to_packs(cls, settings: Any) -> Any:
        """Convert `global_batch: 524288tok` to a number of packs."""
        batch = settings.get("global_batch") if isinstance(settings, dict) else None
        match = re.fullmatch(r"([1-9]\d*) *tok", batch) if isinstance(batch, str) else None
        length = settings.get("packed_length") if match else None
        if match is None or not isinstance(length, int) or length <= 0:
            return settings  # packed_length has its own validator
        packs, rest = divmod(int(match[1]), length)
        if not packs or rest:
            raise ValueError(
                f"global_batch: {batch} is not a whole number of packs of packed_length: {length}"
            )
        return {**settings, "global_batch": packs}

    @pydantic.model_validator(mode="after")
    def _check_weights(self) -> DataConfig:
        weights = {name: next(iter(stream.weight), "no weight") for name, stream in self.streams.items()}
        proportional = [name for name, weight in weights.items() if weight == "proportion"]
        absolute = [f"'{name}' ({weight})" for name, weight in weights.items() if weight != "proportion"]
        if proportional and absolute:
            raise ValueError(
                "proportion must be set for all streams or for none: "
                f"'{proportional[0]}' has it, {', '.join(absolute)} not"
            )
        if proportional and not any(stream.proportion for stream in self.streams.values()):
            raise ValueError("the proportions of all streams are 0")
        if self.epoch_samples and self.epoch_tokens:
            raise ValueError("give one of epoch_samples and epoch_tokens")
        size = "epoch_samples" if self.epoch_samples else "epoch_tokens" if self.epoch_tokens else None
        if size and not proportional and any(weight != "no weight" for weight in weights.values()):
            raise ValueError(f"{size} does not go with repeat or choose: {', '.join(absolute)}")
        return self

    @pydantic.model_validator(mode="after")
    def _check_split(self) -> DataConfig:
        without = [name for name, stream in self.streams.items() if not stream.held_out]
        if self.split == "held_out" and without:
            raise ValueError(
                f"split: held_out needs `held_out` above 0 in every stream: '{without[0]}' has none"
            )
        return self

    @property
    def cache_folder(self) -> Path:
        """The folder that `cache` names, or its default."""
        return Path(self.cache) if self.cache else default_cache_folder()


def default_cache_folder() -> Path:
    """Return the folder for plans, remote datasets and runs in buckets where `data.cache` names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unitoken"
