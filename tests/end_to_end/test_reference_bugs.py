"""Bugs of the reference that this system does not have, where no other test shows it.

The numbers are those of the list of bugs that this project started from. `compat: unitoken` brings 16, 17, 22
and 29 back, and of 5 how the tower sees a picture.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.reference import IMAGE_END, NEWLINE_ID, SEPARATOR, VIEWS, read_model, read_records, record_of
from support.stages import stage, write_data
from unitoken.codec.conversations import parse
from unitoken.dataset.record import IGNORED, Record
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading.batch import split_batch, target_places, unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.model import loss as loss_module
from unitoken.train.model.unitoken import build_model
from unitoken.train.optim import build_optimizer, freeze, learning_rate, set_learning_rate

FEATURES = 729


@pytest.fixture(scope="module")
def records(golden: Path) -> dict[str, Any]:
    return read_records(golden)


def collate(
    *pack: Record, continuous: str = "questions", compat: bool = False, anyres: bool = False
) -> dict[str, Tensor]:
    """Collate one pack, just long enough for the records."""
    views = VIEWS["anyres" if anyres else "base"]
    room = 3700 if anyres else FEATURES + 1
    length = sum(len(record.tokens) + len(record.images) * room for record in pack)
    return unpack(Collate(length, views, continuous, SEPARATOR, NEWLINE_ID, compat)([pack]))


def test_bug_1_any_number_of_images_in_questions_and_answers(golden: Path, records: dict[str, Any]) -> None:
    """Two images in a sample raised an error during training. test_packed.py has images in answers."""
    model = read_model(golden)
    for name, images in (("dev-16-img_implicit_two", 2), ("dev-17-img_three_one_turn", 3)):
        record = record_of(golden, records[name])
        assert len(record.images) == images
        batch = collate(record, continuous="all")
        assert (batch["input_ids"] == SEPARATOR).sum() == images
        assert batch["feature_rows"].shape == (images * FEATURES,)
        with torch.no_grad():
            clean = model.embed(batch)
            for number in range(images):
                pixels = batch["pixel_values"].clone()
                pixels[number] = 255 - pixels[number]
                differs = (model.embed({**batch, "pixel_values": pixels}) != clean).any(-1)[0]
                own = batch["feature_columns"][batch["feature_views"] == number]
                assert differs.nonzero().flatten().tolist() == own.tolist(), f"image {number} of {images}"
    loss = model(batch).total
    loss.backward()
    assert loss.isfinite()
    gradient = model.vit.post_layernorm.weight.grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize("variant", ["base", "anyres"])
def test_bug_3_an_image_given_as_a_string_is_that_image(
    variant: str, golden: Path, records: dict[str, Any]
) -> None:
    """Training opened the file named by the path's first letter, failed, and used a black picture."""
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    item = {"image": "images/d07_wide.jpg", "conversations": turns}
    assert parse(item, "name").images == ("images/d07_wide.jpg",)
    record = record_of(golden, records["dev-15-img_implicit_string"])
    assert isinstance(records["dev-15-img_implicit_string"]["record"]["image"], str)
    batch = collate(record, anyres=variant == "anyres")
    assert batch["pixel_values"].float().std() > 30
    assert (batch["labels"] != IGNORED).any()


def test_bug_4_a_conversation_without_the_key_image_is_a_sample() -> None:
    item = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    conversation = parse(item, "name")
    assert conversation.images == ()
    assert [turn.trained for turn in conversation.turns] == [False, True]


def test_bug_16_no_separator_is_a_target(golden: Path, records: dict[str, Any]) -> None:
    """Separators are never generated, also those in questions; a model that is trained on them would."""
    asked, drawn = (
        record_of(golden, records[name]) for name in ("dev-11-img_human", "dev-14-img_gpt_with_text")
    )
    batch = collate(asked, drawn, continuous="all")
    assert (batch["input_ids"] == SEPARATOR).sum() == 2
    assert (batch["labels"] == SEPARATOR).sum() == 0
    assert (collate(asked, drawn, continuous="all", compat=True)["labels"] == SEPARATOR).sum() == 2


@pytest.mark.parametrize("anyres", [False, True], ids=["base", "anyres"])
def test_bug_17_a_drawn_image_ends_alike_in_training_and_drawing(
    anyres: bool, golden: Path, records: dict[str, Any]
) -> None:
    """The last row is followed by the end of the image; a drawn picture's features are not computed."""
    record = record_of(golden, records["dev-13-img_gpt_generation"])
    batch = collate(record, anyres=anyres)
    assert len(batch["pixel_values"]) == len(batch["feature_rows"]) == 0
    used = batch["document_ids"][0] >= 0
    assert batch["input_ids"][0, used].tolist() == record.tokens.tolist()
    end = int((batch["labels"][0] == IMAGE_END).nonzero())
    assert batch["labels"][0, end - 1] == batch["input_ids"][0, end - 1] == NEWLINE_ID
    reference = collate(record, anyres=anyres, continuous="all", compat=True)
    used = reference["document_ids"][0] >= 0
    assert int(used.sum()) == len(record.tokens) + 1 + VIEWS["anyres" if anyres else "base"].count(240, 160)
    assert reference["labels"][0, end] == SEPARATOR


def test_bug_19_logits_exist_for_one_chunk_of_trained_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference computed float32 logits for every position and copied them twice: 8 GB a batch."""
    rows: list[int] = []
    real = loss_module.F.linear

    def linear(states: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(states))
        return real(states, weight)

    monkeypatch.setattr(loss_module.F, "linear", linear)
    hidden, weight = torch.randn(4, 100, 8, requires_grad=True), torch.randn(50, 8)
    labels = torch.randint(0, 50, (4, 100))
    labels[:, :50] = IGNORED
    row, column = target_places(labels).values()
    states, targets = hidden[row, column - 1], labels[row, column]
    loss_module.token_loss(states, targets, weight, 1e-5, chunk_rows=64).total.backward()
    assert max(rows) == 64
    assert sum(rows) == 4 * 50, "each supervised row once, forward"


def test_bug_20_tower_and_embedding_run_once_per_microbatch(golden: Path, records: dict[str, Any]) -> None:
    """With AnyRes the reference ran the tower once per sample, gathering its weights each time under FSDP.

    It ran the embedding four times.
    """
    model = read_model(golden)
    calls: list[tuple[str, int]] = []
    model.vit.register_forward_hook(lambda _, inputs, __: calls.append(("vit", len(inputs[0]))))
    model.adapter.register_forward_hook(lambda _, inputs, __: calls.append(("adapter", len(inputs[0]))))
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(("embed_tokens", 0)))
    pack = [
        record_of(golden, records[name]) for name in ("dev-16-img_implicit_two", "dev-12-img_human_middle")
    ]
    model.embed(collate(*pack, anyres=True))
    assert sorted(calls) == [("adapter", 9), ("embed_tokens", 0), ("vit", 9)]  # three images of three views


@pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
def test_bug_22_in_compat_alone_a_step_is_the_mean_of_means(tmp_path: Path) -> None:
    """The whole step is the reference's: trained separators, features of drawn images, decay everywhere."""
    from support.stages import metrics
    from unitoken.train.stage import run_stage

    write_data(tmp_path / "data")
    settings = ["model.dropout=0", "max_duration=4ba", "microbatch=1", "save.interval=100ba"]
    config = stage(tmp_path, "compat=unitoken", *settings, "optimizer.weight_decay=0.9")
    assert config.data.continuous == "all", "`compat` alone implies it"
    checked = check_stage(config, 1)
    run_stage(config, checked)
    lines = metrics(tmp_path / "run")

    loader = build_loader(
        config.data, views=Views(8, 4), vocabulary=checked.vocabulary, batch_packs=4, compat=True
    )
    model = build_model(checked.sizes.decoder, checked.sizes.vision, config.model)
    freeze(model, config.trainable)
    load_weights(model, {}, config.seed)
    optimizer = build_optimizer(model.train(), config.optimizer, compat=True)
    steps = loader.dataset.plan.report.packs // 4  # an epoch
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.9}
    for step, (batch, line) in enumerate(zip(loader, lines, strict=False)):
        assert (unpack(batch)["labels"] == checked.vocabulary.separator).any()
        set_learning_rate(optimizer, learning_rate(step / steps, config.optimizer, 0.1, 4 / steps))
        losses = [model(unpack(part)).total / 4 for part in split_batch(batch, 1)]
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        assert (sum(losses).item(), norm.item()) == pytest.approx((line["loss"], line["grad_norm"]), rel=2e-5)
        optimizer.step()
        optimizer.zero_grad()
    assert len(lines) == 4
