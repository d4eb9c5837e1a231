"""The recipe of a plan: all settings and datasets that decide it. Checkpoints keep it, and compare it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unitoken.common.config import Config, describe_differences
from unitoken.common.hashing import fingerprint
from unitoken.dataset.kinds import Kind
from unitoken.streaming_data.settings import BatchingMethod, Continuous, DataConfig, OverLong, Unit
from unitoken.streaming_data.sources import StreamSource

if TYPE_CHECKING:
    from unitoken.dataset.vision_views import Views

# Version of the algorithm. Another algorithm makes other plans, so it is part of the hash. Version 2 had no
# batching_method: its packs were in random order. Runs that began with version 2 continue with it.
VERSION = 3


class StreamRecipe(Config):
    """What a stream contributes to the recipe."""

    dataset: str  # fingerprint of the samples
    samples: int
    weight: dict[str, float]  # proportion, repeat or choose
    max_tokens: int | None = None
    kinds: tuple[Kind, ...] | None = None
    held_out: float = 0.0


class Recipe(Config):
    """Every setting that decides the plan, or what is trained on with it. Kept in checkpoints."""

    version: int = VERSION
    seed: int
    packed_length: int
    global_batch: int
    canonical_nodes: int
    window: int
    shuffle: bool
    batching_method: BatchingMethod = "stratified"
    unit: Unit = "samples"
    epoch_samples: int | None = None
    epoch_tokens: int | None = None
    over_long: OverLong = "reject"
    null_prompt_fraction: float = 0.0  # does not change the plan, but what is trained on
    split: str = "train"
    continuous: Continuous  # which images have features
    views: dict[str, Any] | None  # how many features these have; None if no image has any
    streams: dict[str, StreamRecipe]

    @classmethod
    def of(cls, config: DataConfig, sources: Sequence[StreamSource], views: Views | None) -> Recipe:
        """Return the recipe of a mixture; `views` is None for a model without a vision tower."""
        streams = {
            source.name: StreamRecipe(
                dataset=source.fingerprint,
                samples=source.manifest.samples,
                weight=source.config.weight,
                **source.config.model_dump(include={"max_tokens", "kinds", "held_out"}),
            )
            for source in sources
        }
        shared = config.model_dump(include=set(cls.model_fields) - {"streams", "continuous"})
        has_features = config.continuous != "none" and views is not None
        return cls(
            streams=streams,
            continuous=config.continuous if has_features else "none",
            views=dataclasses.asdict(views) if has_features and views is not None else None,
            **shared,
        )

    @property
    def size(self) -> tuple[str, int] | None:
        """The epoch's size as ("tokens" or "samples", how many); None if the streams' weights decide it."""
        if self.epoch_tokens:
            return "tokens", self.epoch_tokens
        return ("samples", self.epoch_samples) if self.epoch_samples else None

    @property
    def hash(self) -> str:
        """The fingerprint of all fields that the recipe's version knows."""
        unknown = {"batching_method"} if self.version == 2 else set()
        return fingerprint(json.dumps(self.model_dump(exclude=unknown)).encode())

    def of_version_2(self) -> Recipe:
        """Return the recipe with which version 2 of the algorithm would make its plan."""
        return self.model_copy(update={"version": 2, "batching_method": "random"})

    def differences(self, other: dict[str, Any]) -> str:
        """Return what is different in `other`, a recipe from a checkpoint: `seed: 0, now 1; ...`."""
        return describe_differences(other, self.model_dump(mode="json")) or "the order of the streams"
