"""A model generates images and answers while it trains, and training is not affected."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.drawn import CODEC, ROOM, ROOT, drawing_stage, write_data
from support.ranks import finish, start
from support.stages import curve
from support.tokenizing import encoder_alone
from unitoken.common.errors import ConfigError
from unitoken.train.callbacks.intervals import EpochLength
from unitoken.train.callbacks.samples import sheet
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.metadata import PictureCrops, read_metadata
from unitoken.train.config import StageConfig
from unitoken.train.distributed import composer_trainer
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import generate, load_model
from unitoken.train.generation.prompts import build_prompt
from unitoken.train.generation.sampling import Sampling
from unitoken.train.model.unitoken import build_model
from unitoken.train.stage import _build_samples, run_stage

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_data(folder / "data")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.png")
    return folder


def asking(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "interval": "2ba",
        "draw": ["Draw a two.", "Please draw the digit seven.", "Show me."],
        "size": [16, 24],
        "answer": {str(folder / "a.png"): "What is it?"},
        "max_tokens": 5,
        "guidance": 3.0,
        **changes,
    }


def settings(folder: Path, name: str, *overrides: str, **changes: Any) -> StageConfig:
    """A run named `name` of four batches, with dropout."""
    return drawing_stage(
        folder, f"save.folder={folder / name}", "max_duration=4ba", *overrides, name=name, **changes
    )


def test_samples_do_not_change_training(folder: Path) -> None:
    for name, samples in (("without", None), ("with", asking(folder))):
        config = settings(folder, name, samples=samples)
        run_stage(config, check_stage(config, 1))
    assert curve(folder / "with") == curve(folder / "without")
    assert len(curve(folder / "with")) == 4
    assert read_metadata(folder / "with" / "step-00000004").pictures == PictureCrops(
        crops=[(32, 32)]
    )  # as the data's manifest has it
    steps = sorted(path.name for path in (folder / "with" / "samples").iterdir())
    assert steps == ["step-00000002", "step-00000004"]
    for step in steps:
        written = folder / "with" / "samples" / step
        assert sorted(path.name for path in written.iterdir()) == [
            "0.png",
            "1.png",
            "2.png",
            "answers.txt",
            "drawings.txt",
        ]
        assert np.asarray(Image.open(written / "0.png")).shape == (16, 24, 3)
        assert (written / "drawings.txt").read_text().splitlines()[1] == "1.png\tPlease draw the digit seven."
        assert (written / "answers.txt").read_text().startswith(f"{folder / 'a.png'}\tWhat is it?\t")


def test_samples_leave_random_state_modes_and_weights(folder: Path) -> None:
    """Also if a tokenizer is loaded, which draws random weights before it reads its own."""
    shown: list[np.ndarray] = []
    tables: list[Any] = []
    logger: Any = SimpleNamespace(
        log_images=lambda images, **_: shown.append(images),
        log_table=lambda *table, **names: tables.append((*table, names)),
    )
    config = settings(folder, "alone", samples=asking(folder, interval="1ep"))
    network = build_model(*model_configs(config.model), config.model)
    load_weights(network, {}, 0)
    network.train()
    network.vit.eval()
    step = SimpleNamespace(value=2)
    state: Any = SimpleNamespace(
        model=composer_trainer.TrainingModel(network),
        precision="fp32",
        precision_config=None,
        timestamp=SimpleNamespace(batch=step),
    )
    before, modes = torch.get_rng_state(), [module.training for module in network.modules()]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    samples = _build_samples(config, check_stage(config, 1), EpochLength(steps=3, tokens=1.0))
    assert samples is not None
    old = folder / "alone" / "samples" / "step-00000003"
    old.mkdir(parents=True)
    (old / "old.png").write_bytes(b"of a run that went on from an older checkpoint and does the step again")
    samples.fit_start(state, logger)
    samples.batch_end(state, logger)
    with composer_trainer.evaluation_mode(state):
        torch.rand(1)
    assert not shown
    step.value = 3  # the end of the epoch
    samples.batch_end(state, logger)
    assert [picture.shape for picture in shown] == [(32, 48, 3)]
    (columns, ((picture, question, answer),), names) = tables[0]
    assert columns == ["picture", "question", "answer"]
    assert (picture, question) == (str(folder / "a.png"), "What is it?")
    assert names == {"name": "samples/answers", "step": 3}
    line = f"{picture}\t{question}\t{' '.join(answer.splitlines())}\n"
    assert (old / "answers.txt").read_text("utf-8") == line
    assert not (old / "old.png").exists()
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


@pytest.mark.slow
def test_two_ranks_generate_from_their_shards_together(folder: Path) -> None:
    """FSDP2: losses are those of two ranks without samples, and images are those of one process."""
    for name, samples in (("two-without", None), ("two", asking(folder))):
        settings(folder, name, samples=samples)
        overrides = [f"save.folder={folder / name}", "max_duration=4ba", f"model.decoder.vocab_size={ROOM}"]
        assert finish(start(2, [ROOT / "train.py", folder / f"{name}.yaml", *overrides])) == [0, 0]
    assert curve(folder / "two") == curve(folder / "two-without")
    drawn = sorted((folder / "two" / "samples" / "step-00000004").glob("*.png"))
    assert [path.name for path in drawn] == ["0.png", "1.png", "2.png"]

    config = settings(folder, "two", samples=asking(folder))
    assert config.codec is not None
    assert config.samples is not None
    dialogue = Dialogue(config.codec)
    prompts = dialogue.encode([build_prompt(text) for text in config.samples.draw], [(24, 16)])
    alone = generate(
        load_model(config.model, config.save.folder),
        dialogue.vocabulary,
        prompts,
        Sampling(guidance=3.0),
        sizes=[dialogue.latents((16, 24))],
        drawing=True,
    )
    for reply, path in zip(dialogue.decode(alone), drawn, strict=True):
        # The same codes; a rank has one thread, with which the decoder rounds a few values otherwise.
        difference = reply.pictures[0].astype(int) - np.asarray(Image.open(path))
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": None}, "samples: drawing and answering take the data's tokenizers"),
        (
            {"samples": {"size": [16, 20], "draw": ["x"]}},
            "samples.size: 20 x 16 pixels: each side must be a multiple of 8",
        ),
        (
            {"samples": {"size": [16, 16], "answer": {"nowhere.png": "?"}}},
            "samples.answer: nowhere.png: no such picture",
        ),
        ({"samples": {"size": [16, 16], "draw": ["Draw <|image|>"]}}, "1 <|image|> in the text but 0 images"),
        ({"samples": {"size": [16, 16]}}, "nothing to draw and nothing to answer"),
    ],
)
def test_wrong_samples_are_found_before_weights_are_loaded(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    from support.stages import stage

    config = stage(
        folder, "model.decoder.vocab_size=583", **{"codec": CODEC, "samples": asking(folder), **changes}
    )
    with pytest.raises(ConfigError, match="".join(f"[{c}]" if c in "<|>?." else c for c in message)):
        check_stage(config, 1)


def test_an_encoder_alone_can_answer_but_not_draw(folder: Path, tmp_path: Path) -> None:
    alone = encoder_alone(ROOT / "demo/assets/vqgan", tmp_path / "alone")
    weights = f"codec.vision.weights={alone}"
    config = settings(folder, "alone", weights, samples=asking(folder))
    needed = rf"samples\.draw: codec\.vision\.weights: {alone} has transformers' encoder"
    with pytest.raises(ConfigError, match=needed):
        check_stage(config, 1)
    check_stage(settings(folder, "alone", weights, samples=asking(folder, draw=[])), 1)


def test_data_of_other_tokenizers_is_refused(tmp_path: Path) -> None:
    from support import stages

    stages.write_data(tmp_path / "data")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    config = settings(tmp_path, "other", samples=asking(tmp_path))
    with pytest.raises(ConfigError, match=r"weights: .* has 128 image codes, the data's vocabulary has 8"):
        run_stage(config, check_stage(config, 1))


def test_a_sheet_holds_all_images_in_order() -> None:
    pictures = [np.full((2, 3, 3), value, np.uint8) for value in range(1, 6)]
    found = sheet(pictures)
    assert found.shape == (4, 9, 3)
    assert found[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert sheet([np.full((2, 6, 3), 1, np.uint8), np.full((4, 3, 3), 2, np.uint8)]).shape == (4, 12, 3)
