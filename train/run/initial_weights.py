"""Which weights a new run starts from, found without loading any."""

from __future__ import annotations

from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.growth import Growth
from unitoken.train.checkpoint.loading import find_weights
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.tensors import TensorSource
from unitoken.train.config import StageConfig
from unitoken.train.model.unitoken import UniToken
from unitoken.train.run.bucket import local_origin
from unitoken.train.run.run_folder import open_weights


def growth_of(config: StageConfig, vocabulary: Vocabulary, new_rows: range | None) -> Growth | None:
    """Return the rows that `model.grow` adds; None without it."""
    if config.model.grow is None or new_rows is None:
        return None
    return Growth(config.model.grow, new_rows, vocabulary, config.codec, config.seed)


def find_initial_weights(
    network: UniToken, config: StageConfig, growth: Growth | None
) -> dict[str, TensorSource]:
    """Find the weights of each part of a new run's model: `init_from`, else the pretrained folders.

    Args:
        network: the model on the `meta` device.
        config: the stage; the check has fetched what its URLs and hub ids name.
        growth: what `growth_of` returned.

    Raises:
        ConfigError: weights are missing, or do not fit the model.
    """
    trained = None
    if config.init_from is not None:
        origin = find_origin(local_origin(config.init_from, config.data.cache_folder))
        trained = open_weights(origin)
        trained = trained if growth is None else growth.grow(trained, origin)
    return find_weights(network, config.model, trained, growth)
