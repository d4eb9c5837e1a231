"""DataConfig -> a DataLoader over packs.

loader = build_loader(config, views=Views(384, 14), vocabulary=vocabulary, batch_packs=2, compat=False)
print(loader.dataset.plan.report.table())
for batch in loader: ...  # one epoch; the next `for` is the next epoch
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from unitoken.streaming_data.collate import Batch, Collate
from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.dataset import PackedDataset
from unitoken.streaming_data.mixture import DataConfig, check_vocabulary, open_sources
from unitoken.streaming_data.views import Views
from unitoken.streaming_data.vocabulary import Vocabulary


class PackedLoader(DataLoader[Any]):
    """Tells the dataset when an epoch begins, and counts what was handed out; workers can do neither."""

    dataset: PackedDataset

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        dataset = self.dataset
        if self.num_workers:  # without workers the dataset sees it itself
            dataset.start_epoch()
        for batch in super().__iter__():
            dataset.packs_handed_out += dataset.recipe.global_batch
            yield batch


def build_loader(
    config: DataConfig, *, views: Views | None, vocabulary: Vocabulary, batch_packs: int, compat: bool
) -> PackedLoader:
    """This rank's loader. `batch_packs` is this rank's share of the global batch. Raises ConfigError for what does not fit.

    Args:
        views: how the vision tower sees an image; None only where no image brings features (`continuous: none`).
        vocabulary: the model's; the datasets must be tokenized in it.
    """
    if config.continuous != "none" and views is None:
        raise ConfigError(f"continuous: {config.continuous} needs a vision tower; without one set continuous: none")
    sources = open_sources(config)
    check_vocabulary(sources, vocabulary, "the model")
    dataset = PackedDataset(config, sources, views=views, batch_packs=batch_packs, compat=compat)
    workers: dict[str, Any] = {}
    if config.workers:
        workers = {"prefetch_factor": config.prefetch, "persistent_workers": True, "timeout": config.timeout}
    return PackedLoader(
        dataset,
        batch_size=batch_packs,
        num_workers=config.workers,
        collate_fn=Collate(
            length=config.packed_length,
            features=views.features if views else 0,
            image_size=views.image_size if views else 1,
            continuous=dataset.recipe.continuous,
            separator=vocabulary.separator,
            compat=compat,
        ),
        pin_memory=torch.cuda.is_available(),
        # Workers get their seeds from it. Without one each epoch's start would draw from the global generator, which the
        # trainer restores when it resumes.
        generator=torch.Generator().manual_seed(config.seed),
        **workers,
    )
