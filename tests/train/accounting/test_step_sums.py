"""Losses by kind are the loss itself, sorted."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from support.stages import DECODER, VISION, stage, write_data
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading.collate import Batch, split_batch
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.train.accounting.step_sums import NAMES, Measured, Measures
from unitoken.train.check import check_stage
from unitoken.train.config import DecoderConfig, VisionTowerConfig
from unitoken.train.model.unitoken import UniToken

pytestmark = pytest.mark.filterwarnings("ignore")  # streaming's own


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    folder = tmp_path_factory.mktemp("measures")
    write_data(folder / "data")
    config = stage(folder)
    loader = build_loader(
        config.data, views=Views(8, 4), vocabulary=check_stage(config, 1).vocabulary, batch_packs=4, compat=False
    )  # fmt: skip
    return list(loader)


@pytest.fixture(scope="module")
def model() -> UniToken:
    torch.manual_seed(0)
    return UniToken(DecoderConfig(**DECODER), VisionTowerConfig(**VISION))


def mean(measured: Measured, names: Iterator[str]) -> float:
    """The means by kind, each weighted by its tokens."""
    found, total = measured.losses(), 0.0
    for name in names:
        total += found.get(name, 0.0) * sum(measured.by_kind[bucket][1] for bucket in NAMES[name])
    return total / measured.targets


def test_losses_by_kind_weighted_by_their_tokens_are_the_loss_of_the_step(
    batches: list[Batch], model: UniToken
) -> None:
    for batch in batches:
        measures = Measures()
        for part in split_batch(batch, 1):
            measures.add(model(part)._asdict(), part)
        measured, whole = measures.take(), model(batch)
        assert measured.loss == pytest.approx(whole.total.item(), abs=1e-6)
        assert measured.z == pytest.approx(whole.z.item(), rel=1e-6)
        assert mean(measured, ("loss_text", "loss_image")) == pytest.approx(measured.ce, abs=1e-6)
        assert mean(measured, ("loss_text_only", "loss_understanding", "loss_generation")) == pytest.approx(
            measured.ce, abs=1e-6
        )


def test_each_loss_is_the_cross_entropy_of_just_its_tokens(batches: list[Batch], model: UniToken) -> None:
    kinds_seen = set()
    for batch in batches:
        measures = Measures()
        measures.add(model(batch)._asdict(), batch)
        found = measures.take().losses()
        hidden = model.model(model.embed(batch), batch["position_ids"], same_document(batch))
        logits = model.lm_head(hidden)[:, :-1]
        ce = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:].clamp(min=0), reduction="none")
        supervised, kinds = batch["labels"][:, 1:] >= 0, batch["kinds"][:, 1:]
        for name, buckets in NAMES.items():
            mine = supervised & torch.isin(kinds, torch.tensor(buckets, dtype=torch.int8))
            assert (name in found) == bool(mine.any())
            if name in found:
                kinds_seen.add(name)
                assert found[name] == pytest.approx(ce[mine].mean().item(), abs=1e-5)
    assert kinds_seen == set(NAMES)


def same_document(batch: Batch) -> torch.Tensor:
    ids = batch["document_ids"]
    return (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(64, 64, dtype=torch.bool).tril()


def test_a_step_knows_its_tokens_documents_and_views(batches: list[Batch], model: UniToken) -> None:
    measures, squares = Measures(), 0
    for part in split_batch(batches[0], 3):
        measures.add(model(part)._asdict(), part)
        for ids in part["document_ids"]:
            squares += sum(int((ids == document).sum()) ** 2 for document in range(int(ids.max()) + 1))
    measured = measures.take(torch.tensor(2.5))
    assert (measured.squares, measured.norm) == (squares, 2.5)
    assert measured.views == len(batches[0]["pixel_values"])
    assert measured.tokens == int((batches[0]["document_ids"] >= 0).sum())
    assert measured.targets == int((batches[0]["labels"][:, 1:] >= 0).sum())


def test_packs_weigh_the_same_where_the_reference_is_followed(batches: list[Batch], model: UniToken) -> None:
    parts, measures = split_batch(batches[0], 1), Measures(by_packs=True)
    for part in parts:
        measures.add(model(part)._asdict(), part)
    assert measures.take().loss == pytest.approx(
        sum(model(part).total.item() for part in parts) / 4, abs=1e-6
    )


def test_a_number_that_is_not_finite_is_seen_wherever_it_is(batches: list[Batch], model: UniToken) -> None:
    first, second = split_batch(batches[0], 2)
    for bad in (float("nan"), float("inf")):
        measures = Measures()
        measures.add({**model(first)._asdict(), "total": torch.tensor(bad)}, first)
        measures.add(model(second)._asdict(), second)
        assert not measures.take().finite
    measures.add(model(second)._asdict(), second)
    assert not measures.take(torch.tensor(float("inf"))).finite
    measures.add(model(second)._asdict(), second)
    assert measures.take(torch.tensor(1.0)).finite
