"""DataConfig -> a DataLoader over packs.

loader = build_loader(config, views=Views(384, 14), vocabulary=vocabulary, batch_packs=2, compat=False)
print(loader.dataset.plan.report.table())
for batch in loader: ...  # one epoch; the next `for` is the next epoch
"""

from __future__ import annotations

from collections.abc import Iterator
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
from unitoken.streaming_data.reading.collate import Batch, Collate
from unitoken.streaming_data.reading.dataset import PackedDataset
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import open_sources

MOST_SAID = (
    4096  # bytes of a rank's error that the others hear: its end, as a worker's begins with a traceback
)


class PackedLoader(DataLoader[Any]):
    """Tells the dataset when an epoch begins, and counts what was handed out; workers can do neither.

    Where torch.distributed runs, the ranks agree before each batch: what one of them can not read is an error in all, and
    none waits for ever in the next collective for one that is gone. That is one number a batch over an own gloo group: 0.2 ms
    between two ranks of one machine.
    """

    dataset: PackedDataset
    _group: Any = None
    _failed: torch.Tensor
    _said: torch.Tensor  # what each rank could not read, UTF-8 and zeros

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        dataset = self.dataset
        together = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        if together and self._group is None:
            # In this order. A thread of the group's may hold tensors a moment longer than the collective lasts, and frees
            # them under the GIL if it is the last; the group's destructor waits for that thread, with the GIL. So the
            # tensors live longer than the group: those of `all_gather_object` hung 3 of 150 pairs of ranks at their end.
            self._group = distributed.new_group(backend="gloo")
            self._failed = torch.zeros(1, dtype=torch.int32)
            self._said = torch.zeros(distributed.get_world_size(), MOST_SAID, dtype=torch.uint8)
        if self.num_workers:  # without workers the dataset sees it itself
            dataset.start_epoch()
        with signals_blocked():  # a loader process that is ended while it starts would be a failure here, wherever this rank is then
            batches = super().__iter__()
        while True:
            batch, failure = None, None
            try:
                batch = next(batches)
            except StopIteration:
                return  # of all ranks at once: they have equally many batches
            except Exception as error:  # whatever it is, the others must hear of it
                failure = error
            if together:
                self._agree(failure)
            elif failure is not None:
                raise failure
            dataset.packs_handed_out += dataset.recipe.global_batch
            yield batch  # type: ignore[misc]

    def _agree(self, failure: Exception | None) -> None:
        self._failed[0] = 0 if failure is None else 1 if is_transient(failure) else 2
        distributed.all_reduce(self._failed, distributed.ReduceOp.MAX, group=self._group)
        if self._failed.item():
            words = b"" if failure is None else str(failure).encode(errors="replace")[-MOST_SAID:] or b"?"
            self._said.zero_()
            self._said[distributed.get_rank(), : len(words)] = torch.tensor(list(words), dtype=torch.uint8)
            distributed.all_reduce(self._said, group=self._group)  # each rank's row is zero in all others
            said = [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in self._said]
            heard = "; ".join(f"rank {rank}: {words}" for rank, words in enumerate(said) if words)
            kind = ShardError if self._failed.item() == 2 else TransientShardError
            raise kind(f"a batch can not be read on {heard}") from failure


def build_loader(
    config: DataConfig, *, views: Views | None, vocabulary: Vocabulary, batch_packs: int, compat: bool
) -> PackedLoader:
    """This rank's loader. `batch_packs` is this rank's share of the global batch. Raises ConfigError for what does not fit.

    Args:
        views: how the vision tower sees an image; None only where no image brings features (`continuous: none`).
        vocabulary: the model's; the datasets must be tokenized in it.
    """
    if config.continuous != "none" and views is None:
        raise ConfigError(
            f"continuous: {config.continuous} needs a vision tower; without one set continuous: none"
        )
    sources = open_sources(config)
    check_streams_vocabulary(sources, vocabulary, "the model")
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
            views=views,
            continuous=dataset.recipe.continuous,
            separator=vocabulary.separator,
            newline=vocabulary.newline,
            compat=compat,
            streams=len(sources),
            vocabulary_size=vocabulary.size,
            limits=None
            if config.over_long == "reject"
            else tuple(limit_of(s.config, config.packed_length) for s in sources),
        ),
        pin_memory=torch.cuda.is_available(),
        # Workers get their seeds from it. Without one each epoch's start would draw from the global generator, which the
        # trainer restores when it resumes.
        generator=torch.Generator().manual_seed(config.seed),
        worker_init_fn=_begin_worker if config.workers else None,
        **workers,
    )


def _begin_worker(_: int) -> None:
    leave_signals_to_parent()
