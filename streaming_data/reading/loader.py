"""DataConfig -> a DataLoader over packs.

loader = build_loader(config, views=Views(384, 14), vocabulary=vocabulary, batch_packs=2, compat=False)
print(loader.dataset.plan.report.table())
for batch in loader: ...  # one epoch; the next `for` is the next epoch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader

from unitoken.common.errors import ConfigError, is_transient
from unitoken.common.interruption import leave_signals_to_parent, signals_blocked
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.shard_cache import ShardError, TransientShardError
from unitoken.streaming_data.check import check_streams_vocabulary
from unitoken.streaming_data.plan.feature_cost import limit_of
from unitoken.streaming_data.reading.batch import PackedBatch
from unitoken.streaming_data.reading.collate import Collate
from unitoken.streaming_data.reading.dataset import PackedDataset
from unitoken.streaming_data.reading.joined_batch import JoinedBatch, JoinedCollate
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, open_sources

MESSAGE_BYTES = 4096  # of a rank's error, sent to the others: its end, as a worker's begins with a traceback


class PackedLoader(DataLoader[Any]):
    """Tells the dataset when an epoch begins, and counts the packs handed out, which workers cannot do.

    With torch.distributed, the ranks agree before each batch: if one of them cannot read its batch, all of
    them raise, and no rank waits for ever in the next collective for one that is gone. That is one number a
    batch over a gloo group of its own: 0.2 ms between two ranks of one machine.
    """

    dataset: PackedDataset
    _group: Any = None
    _failed: torch.Tensor  # (1,) 1: an error that may pass, 2: another one
    _messages: torch.Tensor  # (ranks, MESSAGE_BYTES) each rank's error, UTF-8 and zeros

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]
        """Yield this rank's batches of the epoch.

        Raises:
            ShardError: any rank cannot read its batch.
        """
        dataset = self.dataset
        distributed_run = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        if distributed_run and self._group is None:
            self._create_group()
        if self.num_workers:  # without workers the dataset calls it
            dataset.start_epoch()
        # A signal that ends a loader process while it starts would raise an error here, at any line.
        with signals_blocked():
            batches = super().__iter__()
        while True:
            batch, failure = None, None
            try:
                batch = next(batches)
            except StopIteration:
                return  # of all ranks at once: they have equally many batches
            except Exception as error:  # of any kind: the other ranks have to know
                failure = error
            if distributed_run:
                self._agree(failure)
            elif failure is not None:
                raise failure
            dataset.packs_handed_out += dataset.recipe.global_batch
            yield batch.split() if isinstance(batch, JoinedBatch) else batch  # type: ignore[misc]

    def _create_group(self) -> None:
        """Create the group before its tensors, so that the tensors live longer.

        A thread of the group's may hold tensors a moment longer than the collective lasts, and frees them
        under the GIL if it is the last; the group's destructor waits for that thread, with the GIL. With
        tensors that go first, as those of `all_gather_object`, 3 of 150 pairs of ranks hung at their end.
        """
        self._group = distributed.new_group(backend="gloo")
        self._failed = torch.zeros(1, dtype=torch.int32)
        self._messages = torch.zeros(distributed.get_world_size(), MESSAGE_BYTES, dtype=torch.uint8)

    def _agree(self, failure: Exception | None) -> None:
        """Raise in all ranks if one of them has failed."""
        self._failed[0] = 0 if failure is None else 1 if is_transient(failure) else 2
        distributed.all_reduce(self._failed, distributed.ReduceOp.MAX, group=self._group)
        if not self._failed.item():
            return
        message = b"" if failure is None else str(failure).encode(errors="replace")[-MESSAGE_BYTES:] or b"?"
        self._messages.zero_()
        row = torch.tensor(list(message), dtype=torch.uint8)
        self._messages[distributed.get_rank(), : len(message)] = row
        distributed.all_reduce(self._messages, group=self._group)  # each rank's row is zero in all others
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in self._messages]
        failures = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        kind = ShardError if self._failed.item() == 2 else TransientShardError
        raise kind(f"a batch can not be read on {failures}") from failure


def build_loader(
    config: DataConfig,
    *,
    views: Views | None,
    vocabulary: Vocabulary,
    batch_packs: int,
    compat: bool,
    sources: Sequence[StreamSource] | None = None,
) -> PackedLoader:
    """Build this rank's loader.

    Args:
        config: the `data:` part of a stage.
        views: how the vision tower sees an image; None only with `continuous: none`.
        vocabulary: the model's vocabulary, which the datasets must have been tokenized with.
        batch_packs: this rank's share of the global batch, in packs.
        compat: reproduce the reference, where all images have features and the separator is trained on.
        sources: the datasets of `config` if they are open already; None opens them here.

    Raises:
        ConfigError: the settings, the datasets, the vocabulary and the number of ranks do not fit together.
    """
    if config.continuous != "none" and views is None:
        raise ConfigError(
            f"continuous: {config.continuous} needs a vision tower; without one set continuous: none"
        )
    if compat and config.continuous == "questions":
        config = config.model_copy(update={"continuous": "all"})
    if sources is None:
        sources = open_sources(config)
    check_streams_vocabulary(sources, vocabulary, "the model")
    dataset = PackedDataset(config, sources, views=views, batch_packs=batch_packs)
    collate: Any = _collate(dataset, views, vocabulary, compat)
    workers: dict[str, Any] = {}
    if config.workers:
        collate = JoinedCollate(collate)
        workers = {"prefetch_factor": config.prefetch, "persistent_workers": True, "timeout": config.timeout}
    return PackedLoader(
        dataset,
        batch_size=batch_packs,
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # Workers get their seeds from this generator. Without one, each epoch's start would draw from the
        # global generator, which the trainer restores when it resumes.
        generator=torch.Generator().manual_seed(config.seed),
        worker_init_fn=_begin_worker if config.workers else None,
        **workers,
    )


def _collate(dataset: PackedDataset, views: Views | None, vocabulary: Vocabulary, compat: bool) -> Collate:
    recipe = dataset.recipe
    limits = tuple(limit_of(source.config, recipe.packed_length) for source in dataset.sources)
    return Collate(
        length=recipe.packed_length,
        views=views,
        continuous=recipe.continuous,
        separator=vocabulary.separator,
        newline=vocabulary.newline,
        compat=compat,
        streams=len(dataset.sources),
        vocabulary_size=vocabulary.size,
        limits=None if recipe.over_long == "reject" else limits,
    )


def _begin_worker(_: int) -> None:
    leave_signals_to_parent()
