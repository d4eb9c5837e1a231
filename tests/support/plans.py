"""Recipes and streams of made-up lengths, and the samples that a plan holds."""

import math
from typing import Any

import numpy as np

from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.recipe import Recipe, StreamRecipe

LENGTH = 64


def make_stream(
    name: str, samples: int, longest: int = LENGTH, seed: int = 0, **weight: float
) -> StreamSamples:
    lengths = np.random.default_rng([seed, samples]).integers(1, longest + 1, samples).astype(np.uint32)
    shards = np.full(math.ceil(samples / 17), 17)
    shards[-1] -= shards.sum() - samples
    thirds = (lengths % 3).astype(np.uint8)
    return StreamSamples(
        name, shards, lengths, lengths // np.uint32(2), thirds.astype(np.uint16), thirds, weight
    )


def make_recipe(streams: list[StreamSamples], **settings: Any) -> Recipe:
    defaults = {"seed": 0, "global_batch": 4, "canonical_nodes": 1, "window": 100, "shuffle": True}
    recipes = {s.name: StreamRecipe(dataset="d", samples=len(s.lengths), weight=s.weight) for s in streams}
    return Recipe(
        packed_length=LENGTH, continuous="none", views=None, streams=recipes, **{**defaults, **settings}
    )


def samples_of(plan: Plan) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(plan.ids, plan.offsets[1:-1].astype(int))]
