"""All that decides the order of an epoch, and the hash of it: what a plan is made from, and a checkpoint compared by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from unitoken.common.config import Config, changed_names, flatten
from unitoken.common.hashing import fingerprint
from unitoken.streaming_data.settings import BatchingMethod, Continuous, DataConfig, Kind, OverLong, Unit
from unitoken.streaming_data.sources import StreamSource

# Of the algorithm: another one makes other plans, so it is part of the hash. Version 2 knew no batching_method: its packs
# stood in random order. A run that was begun with it goes on with it.
VERSION = 3


class StreamRecipe(Config):
    dataset: str  # fingerprint of the samples
    samples: int
    weight: dict[str, float]  # proportion, repeat or choose
    max_tokens: int | None = None
    kinds: tuple[Kind, ...] | None = None
    held_out: float = 0.0


class Recipe(Config):
    """Every setting that decides the plan, and the hash of them all. Kept in checkpoints."""

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
    null_prompt_fraction: float = 0.0  # decides nothing here, but what is trained on
    split: str = "train"
    continuous: Continuous  # which images bring features
    views: dict[str, Any] | None  # and how many; None where none does
    streams: dict[str, StreamRecipe]

    @classmethod
    def of(cls, config: DataConfig, sources: Sequence[StreamSource], views: Any) -> Recipe:
        """What of the settings decides the plan. `views` is None where no image brings features."""
        streams = {
            s.name: StreamRecipe(
                dataset=s.fingerprint,
                samples=s.manifest.samples,
                weight=s.config.weight,
                **s.config.model_dump(include={"max_tokens", "kinds", "held_out"}),
            )
            for s in sources
        }
        shared = config.model_dump(include=set(cls.model_fields) - {"streams", "continuous"})
        views = None if config.continuous == "none" or views is None else dataclasses.asdict(views)
        return cls(streams=streams, continuous=config.continuous if views else "none", views=views, **shared)

    @property
    def size(self) -> tuple[str, int] | None:
        if self.epoch_tokens:
            return "tokens", self.epoch_tokens
        return ("samples", self.epoch_samples) if self.epoch_samples else None

    @property
    def hash(self) -> str:
        later = {"batching_method"} if self.version == 2 else set()
        return fingerprint(json.dumps(self.model_dump(exclude=later)).encode())

    def of_version_2(self) -> Recipe:
        return self.model_copy(update={"version": 2, "batching_method": "random"})

    def differences(self, other: dict[str, Any]) -> str:
        """What is different in `other`, a recipe as a checkpoint keeps it: `seed: 0, now 1; ...`."""
        now, then = flatten(self.model_dump(mode="json")), flatten(other)
        found = [
            f"{key}: {then.get(key, 'nothing')}, now {now.get(key, 'nothing')}"
            for key in changed_names(then, now)
        ]
        return "; ".join(found) or "the order of the streams"
