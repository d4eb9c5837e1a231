"""The losses by kind add up to the loss of the step."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F

from support.stages import DECODER, VISION, stage, write_data
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading.batch import Batch, PackedBatch, split_batch, unpack
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.train.accounting.step_sums import LOSS_BUCKETS, StepResult, StepSums
from unitoken.train.check import check_stage
from unitoken.train.config import DecoderConfig, VisionTowerConfig
from unitoken.train.model.unitoken import UniToken

pytestmark = pytest.mark.filterwarnings("ignore")  # streaming's own


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[PackedBatch]:
    folder = tmp_path_factory.mktemp("sums")
    write_data(folder / "data")
    config = stage(folder)
    loader = build_loader(
        config.data,
        views=Views(8, 4),
        vocabulary=check_stage(config, 1).vocabulary,
        batch_packs=4,
        compat=False,
    )
    return list(loader)


@pytest.fixture(scope="module")
def model() -> UniToken:
    torch.manual_seed(0)
    return UniToken(DecoderConfig.model_validate(DECODER), VisionTowerConfig.model_validate(VISION))


def mean(result: StepResult, names: Iterable[str]) -> float:
    """Return the mean of the losses of these names, weighted by their tokens."""
    found, total = result.losses(), 0.0
    for name in names:
        total += found.get(name, 0.0) * sum(result.by_kind[bucket][1] for bucket in LOSS_BUCKETS[name])
    return total / result.targets


def test_losses_by_kind_average_to_the_loss_of_the_step(batches: list[PackedBatch], model: UniToken) -> None:
    for batch in batches:
        sums = StepSums()
        for part in map(unpack, split_batch(batch, 1)):
            sums.add(model(part)._asdict(), part)
        result, whole = sums.take(), model(unpack(batch))
        assert result.loss == pytest.approx(whole.total.item(), abs=1e-6)
        assert result.z == pytest.approx(whole.z.item(), rel=1e-6)
        assert mean(result, ("loss_text", "loss_image")) == pytest.approx(result.ce, abs=1e-6)
        assert mean(result, ("loss_text_only", "loss_understanding", "loss_generation")) == pytest.approx(
            result.ce, abs=1e-6
        )


def test_each_loss_is_the_cross_entropy_of_its_tokens(batches: list[PackedBatch], model: UniToken) -> None:
    kinds_seen = set()
    for batch in map(unpack, batches):
        sums = StepSums()
        sums.add(model(batch)._asdict(), batch)
        found = sums.take().losses()
        hidden = model.model(model.embed(batch), batch["position_ids"], same_document(batch))
        logits = model.lm_head(hidden)[:, :-1]
        ce = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:].clamp(min=0), reduction="none")
        supervised, kinds = batch["labels"][:, 1:] >= 0, batch["kinds"][:, 1:]
        for name, buckets in LOSS_BUCKETS.items():
            mine = supervised & torch.isin(kinds, torch.tensor(buckets, dtype=torch.int8))
            assert (name in found) == bool(mine.any())
            if name in found:
                kinds_seen.add(name)
                assert found[name] == pytest.approx(ce[mine].mean().item(), abs=1e-5)
    assert kinds_seen == set(LOSS_BUCKETS)


def same_document(batch: Batch) -> torch.Tensor:
    ids = batch["document_ids"]
    return (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(64, 64, dtype=torch.bool).tril()


def test_a_step_counts_tokens_squares_and_views(batches: list[PackedBatch], model: UniToken) -> None:
    sums, squares = StepSums(), 0
    for part in map(unpack, split_batch(batches[0], 3)):
        sums.add(model(part)._asdict(), part)
        for ids in part["document_ids"]:
            squares += sum(int((ids == document).sum()) ** 2 for document in range(int(ids.max()) + 1))
    result = sums.take(torch.tensor(2.5))
    assert (result.squares, result.norm) == (squares, 2.5)
    assert result.views == len(batches[0]["pixel_values"])
    whole = unpack(batches[0])
    assert result.tokens == int((whole["document_ids"] >= 0).sum())
    assert result.targets == int((whole["labels"][:, 1:] >= 0).sum())


def test_with_by_packs_all_packs_weigh_the_same(batches: list[PackedBatch], model: UniToken) -> None:
    parts, sums = [unpack(part) for part in split_batch(batches[0], 1)], StepSums(by_packs=True)
    for part in parts:
        sums.add(model(part)._asdict(), part)
    assert sums.take().loss == pytest.approx(sum(model(part).total.item() for part in parts) / 4, abs=1e-6)


def test_a_non_finite_number_is_seen_wherever_it_is(batches: list[PackedBatch], model: UniToken) -> None:
    first, second = map(unpack, split_batch(batches[0], 2))
    for bad in (float("nan"), float("inf")):
        sums = StepSums()
        sums.add({**model(first)._asdict(), "total": torch.tensor(bad)}, first)
        sums.add(model(second)._asdict(), second)
        assert not sums.take().finite
    sums.add(model(second)._asdict(), second)
    assert not sums.take(torch.tensor(float("inf"))).finite
    sums.add(model(second)._asdict(), second)
    assert sums.take(torch.tensor(1.0)).finite
