"""`unitoken plan-memory`: which settings of a stage fit a GPU, the fastest first."""

from __future__ import annotations

import re

from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.storage.store import StoreError
from unitoken.streaming_data.check import check_sources, vocabulary_of
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.sources import open_sources
from unitoken.streaming_data.tables import format_table
from unitoken.train.accounting.fitting import Fit, Fitting, PackWork, describe_fit, enough_text, pack_work
from unitoken.train.accounting.memory import GB
from unitoken.train.check import check_settings, with_room
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.config import DecoderConfig, StageConfig, VisionTowerConfig
from unitoken.train.model.lora import add_adapters
from unitoken.train.model.unitoken import build_model
from unitoken.train.optim import count_trained, freeze


def parse_gpu(text: str) -> float:
    """Return the bytes of `80gb`: 10^9 each, so a hundredth or two less than GPUs of that name have.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *gb", text.strip().lower())
    if match is None or not float(match[1]):
        raise ConfigError(f"--gpu {text}: expected the GPU's memory, as 80gb")
    return float(match[1]) * GB


def plan_memory(config: StageConfig, gpu_bytes: float, gpus: int) -> str:
    """Return a table of the settings that fit, and lines about it.

    Args:
        config: the stage; its `activation_checkpointing` and `microbatch` are compared with the others.
        gpu_bytes: memory of a GPU.
        gpus: how many of them.

    Raises:
        ConfigError: a setting is wrong, or nothing fits.
    """
    check_settings(config, gpus)
    notes = []
    try:
        decoder, vision, work = _read_data(config)
    except (ConfigError, StoreError) as error:
        if config.model.is_sized_by_data:
            raise
        decoder, vision = model_configs(config.model)
        work = _without_data(config, vision)
        notes = [f"without data ({error}): full packs, each with {work.most_views} views for the tower"]
    network = build_model(decoder, vision, config.model)
    add_adapters(network.model.layers, config.model.lora)
    trained = freeze(network, config.trainable)
    fitting = Fitting(config, decoder, vision, trained, count_trained(network), gpus, work)
    fits = fitting.that_fit(gpu_bytes)
    if not fits:
        raise ConfigError(_nothing_fits(fitting, gpu_bytes))
    written = "auto" not in (config.activation_checkpointing, config.microbatch)
    if written:
        own = fitting.fit(config.recompute, config.microbatch_packs)
        fate = "fits" if own.memory.total <= gpu_bytes else "does not fit"
        notes.insert(0, f"the stage's own, {describe_fit(own)}, {fate}: {own.memory.total / GB:.1f} GB")
    return "\n".join([*_table(fits), f"first row: {fits[0].memory.summary()}", *notes])


def _read_data(config: StageConfig) -> tuple[DecoderConfig, VisionTowerConfig | None, PackWork]:
    """Return the model's sizes with the rows of `model.grow`, and what the packs hold."""
    sources = open_sources(config.data)
    decoder, vision = model_configs(config.model, vocabulary_of(sources).size)
    views = Views(vision.image_size, vision.patch_size, config.data.anyres) if vision else None
    vocabulary = check_sources(sources, config.data, views)
    recipe = Recipe.of(config.data, sources, views)
    plan = load_or_build(
        config.data.cache_folder / "plans",
        recipe,
        0,
        lambda: [read_lengths(source, recipe, views) for source in sources],
    )
    return with_room(config, decoder, vocabulary), vision, pack_work(plan, config.data)


def _without_data(config: StageConfig, vision: VisionTowerConfig | None) -> PackWork:
    """Return what a pack holds at the most: one document, and as many features as there is room for."""
    length, views = config.data.packed_length, 0
    if vision is not None and config.data.continuous != "none":
        views = length // (vision.features + 1)  # each image has a separator
    return PackWork(tokens=length, squares=float(length**2), targets=length, views=views, most_views=views)


def _table(fits: list[Fit]) -> list[str]:
    rows = [["activation_checkpointing", "microbatch", "GB a GPU", "speed"]]
    for fit in fits:
        speed = fits[0].cost / fit.cost
        rows.append([
            str(fit.recompute), str(fit.microbatch), f"{fit.memory.total / GB:.1f}", f"{speed:.0%}"
        ])  # fmt: skip
    return format_table(rows, left=1)


def _nothing_fits(fitting: Fitting, gpu_bytes: float) -> str:
    """Return a message with the least that the stage takes, and how many GPUs are enough."""
    least, gpus = fitting.fit("full", 1), fitting.ranks
    message = (
        f"nothing fits {gpus} GPU(s) of {gpu_bytes / GB:.0f} GB: {describe_fit(least)} needs "
        f"{least.memory.summary()}"
    )
    return f"{message}{enough_text(fitting, gpu_bytes)}"
