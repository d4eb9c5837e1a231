"""New rows for a vocabulary that a pretrained model's tokenizer lacks."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.small_datasets import small_vocabulary
from support.stages import DECODER, curve, stage, write_data
from support.tokenizing import tiny_transformers
from unitoken.codec.config import CodecConfig, ImageTokenizerConfig
from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.codec.image_tokenizer.network import load_network
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.growth import Growth
from unitoken.train.checkpoint.loading import find_weights, load_weights
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.tensors import TensorSource, open_decoder_folder, parameter_shapes
from unitoken.train.config import VOCABULARY_MATRICES, DecoderConfig, GrowConfig, ModelConfig
from unitoken.train.export.model import export_model
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.run import run_folder
from unitoken.train.stage import run_stage

Init = Literal["mean", "normal", "codebook"]
OLD, SPARE, GROWN = 50, 60, 192  # ids of the tokenizer, rows of the checkpoint, rows after growth
pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
IDS = torch.randint(0, OLD, (2, 11), generator=torch.Generator().manual_seed(0))


def build(rows: int) -> UniToken:
    decoder = DecoderConfig.model_validate({**DECODER, "vocab_size": rows})
    return build_model(decoder, None, ModelConfig(decoder=decoder, dropout=0.0)).eval()


def original() -> UniToken:
    """A pretrained model; its old rows have a mean, and its last one an outlier's size."""
    model = build(SPARE)
    load_weights(model, {}, seed=3)
    with torch.no_grad():
        for name in VOCABULARY_MATRICES:
            model.get_parameter(name).add_(torch.linspace(-1, 1, 32))[-1] = 1e3
    return model


def growth(init: Init = "mean", seed: int = 0, **changes: Any) -> Growth:
    return Growth(GrowConfig(init=init), range(OLD, GROWN), small_vocabulary(), None, seed)


def grow(rows: Growth, folder: Path, model: UniToken | None = None) -> UniToken:
    """Load a model's weights, whose folder `folder` is, into a grown one."""
    tensors = dict((model or original()).state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    source = TensorSource("folder", shapes, lambda names: {name: tensors[name].clone() for name in names})
    grown = build(rows.rows.stop)
    trained = rows.grow(source, folder / "step-00000001.pt")
    load_weights(grown, find_weights(grown, ModelConfig(decoder="x/y"), trained, rows), 0, rows)
    return grown


@torch.no_grad()
def logits(model: UniToken) -> Tensor:
    positions = torch.arange(IDS.shape[1]).expand(2, -1)
    found: Tensor = model.lm_head(model.model(model.model.embed_tokens(IDS), positions, None))
    return found


@pytest.mark.parametrize("init", ["mean", "normal"])
def test_logits_of_the_old_ids_are_the_originals(init: Init, tmp_path: Path) -> None:
    before, after = original(), grow(growth(init), tmp_path)
    assert torch.equal(logits(after)[..., :OLD], logits(before)[..., :OLD])
    for name, tensor in before.named_parameters():
        kept = OLD if name in VOCABULARY_MATRICES else len(tensor)
        assert torch.equal(after.get_parameter(name)[:kept], tensor[:kept])


def test_rows_of_init_mean_are_close_to_the_mean(tmp_path: Path) -> None:
    """Of the tokenizer's rows alone: the outlier among the spare ones has no part in it."""
    model = grow(growth(), tmp_path)
    for name in VOCABULARY_MATRICES:
        old, new = model.get_parameter(name)[:OLD], model.get_parameter(name)[OLD:]
        assert torch.equal(old, original().get_parameter(name)[:OLD])
        torch.testing.assert_close(new, old.mean(0).expand_as(new), rtol=0, atol=1e-4)
        assert len(new.unique(dim=0)) > 100


def test_new_rows_have_a_part_of_the_old_covariance() -> None:
    old = torch.randn(OLD, 4) @ torch.tensor([[3.0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5]])
    matrix = torch.cat([old, torch.zeros(20000, 4)])
    rows = Growth(GrowConfig(), range(OLD, len(matrix)), small_vocabulary(), None, 0)
    rows.fill("lm_head.weight", matrix)
    expected = torch.cov(old.double().T, correction=0)
    torch.testing.assert_close(torch.cov(matrix[OLD:].double().T) * 1e9, expected, rtol=0.05, atol=0.5)


def test_rows_of_init_normal_have_the_spread_of_new_weights(tmp_path: Path) -> None:
    new = grow(growth("normal"), tmp_path).lm_head.weight[OLD:]
    assert new.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(new.mean().item()) < 1e-3


def test_new_rows_depend_on_the_seed_and_the_matrix(tmp_path: Path) -> None:
    one, again, other = (grow(growth("normal", seed), tmp_path) for seed in (0, 0, 1))
    assert torch.equal(one.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(one.lm_head.weight[OLD:], other.lm_head.weight[OLD:])
    assert not torch.equal(one.lm_head.weight[OLD:], one.model.embed_tokens.weight[OLD:])


@pytest.mark.parametrize("kind", ["chameleon", "emu3", "janus"])
def test_codes_get_the_projected_codebook(kind: Any, tmp_path: Path, vqgan: Path) -> None:
    """Distances between codes are those of the codebook, mean and spread those of the old rows."""
    weights = vqgan if kind == "chameleon" else tiny_transformers(tmp_path / kind, kind)
    codec = CodecConfig(tokenizer="x", vision=ImageTokenizerConfig(kind=kind, weights=str(weights)))
    codebook = load_network(kind, find_image_tokenizer(codec.vision)).quantize.embedding.weight
    vocabulary = Vocabulary.from_tokens({f"t{n}": n for n in range(OLD)}, len(codebook))
    hidden = 2048
    old = torch.randn(OLD, hidden) * 0.1 + torch.linspace(-1, 1, hidden)
    rows = Growth(GrowConfig(init="codebook"), range(OLD, 256), vocabulary, codec, 0)
    matrix = torch.cat([old, torch.zeros(256 - OLD, hidden)])
    rows.fill("lm_head.weight", matrix)
    codes = matrix[list(vocabulary.image_ids)]
    torch.testing.assert_close(codes.mean(0), old.mean(0), rtol=0, atol=1e-3)
    spread, needed = ((part - part.mean(0)).norm() / len(part) ** 0.5 for part in (codes, old))
    assert spread.item() == pytest.approx(needed.item(), rel=1e-3)
    ratio = torch.pdist(codes) / torch.pdist(codebook)
    assert ratio.std() < 0.05 * ratio.mean()
    others = [i for i in vocabulary.new_ids if i not in vocabulary.image_ids]
    torch.testing.assert_close(matrix[others], old.mean(0).expand(len(others), -1), rtol=0, atol=1e-3)


def test_tied_embeddings_need_one_matrix(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(SPARE, 32), "model.norm.weight": torch.ones(32)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    source = TensorSource("x", shapes, lambda names: {name: tensors[name] for name in names})
    grown = growth().grow(source, tmp_path / "x.pt")
    assert grown.shapes == {"model.embed_tokens.weight": (GROWN, 32), "model.norm.weight": (32,)}
    assert {name: tuple(tensor.shape) for name, tensor in grown.load().items()} == grown.shapes


def test_weights_with_a_vocabulary_are_taken_as_they_are(tmp_path: Path) -> None:
    small_vocabulary().save(tmp_path / "vocabulary.json")
    full = build(GROWN)
    load_weights(full, {}, seed=5)
    again = grow(growth(), tmp_path, full)
    for name, tensor in full.named_parameters():
        assert torch.equal(again.get_parameter(name), tensor)
    with pytest.raises(ConfigError, match=r"lm_head\.weight has shape \(60, 32\)"):
        grow(growth(), tmp_path)


@pytest.mark.parametrize("rows", [OLD - 1, GROWN + 1])
def test_too_few_or_too_many_rows_do_not_fit(rows: int, tmp_path: Path) -> None:
    model = build(rows)
    load_weights(model, {}, seed=0)
    with pytest.raises(ConfigError, match=rf"has shape \({rows}, 32\), the model needs \(192, 32\)"):
        grow(growth(), tmp_path, model)


def test_a_new_decoder_gets_the_same_kind_of_rows() -> None:
    model, plain = build(GROWN), build(GROWN)
    load_weights(model, {}, 0, growth())
    load_weights(plain, {}, 0)
    for name in parameter_shapes(model):
        found, drawn = model.get_parameter(name).detach(), plain.get_parameter(name).detach()
        if name in VOCABULARY_MATRICES:
            assert found[OLD:].std(0).max() < 1e-4
            found, drawn = found[:OLD], drawn[:OLD]
        assert torch.equal(found, drawn), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a pretrained model whose tokenizer lacks image codes."""
    folder = tmp_path_factory.mktemp("growth")
    write_data(folder / "data")
    write_pretrained(folder / "pretrained", SPARE)
    return folder


def write_pretrained(folder: Path, rows: int) -> None:
    model = build(rows)
    load_weights(model, {}, seed=3)
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    config = {**DECODER, "vocab_size": rows, "model_type": "chameleon", "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))


def run(folder: Path, name: str, *overrides: str) -> dict[str, Tensor]:
    """Run a stage on the pretrained model in folder `name`, and return its weights."""
    config = stage(
        folder,
        f"save.folder={folder / name}",
        f"model.decoder={folder / 'pretrained'}",
        "model.grow.init=mean",
        "trainable=[new_rows, adapter]",
        *overrides,
    )
    run_stage(config, check_stage(config, 1))
    return run_folder.open_weights(find_origin(config.save.folder)).load()


def test_stages_grow_a_model_once_and_go_on_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a pretrained folder to Stage I, to Stage II, and to an export that is the next stage's decoder."""
    before = open_decoder_folder(str(folder / "pretrained")).load()
    one = run(folder, "one", "max_duration=5ba")
    printed = capsys.readouterr().out
    assert "lm_head.weight: rows 50 to 191 are new (mean)" in printed
    adapter = sum(tensor.numel() for name, tensor in one.items() if name.startswith("adapter."))
    assert f"trains {2 * (GROWN - OLD) * 32 + adapter:,} parameters in 6 tensors" in printed
    for name, tensor in before.items():
        if name in VOCABULARY_MATRICES:
            assert one[name].shape == (GROWN, 32)
            assert torch.equal(one[name][:OLD], tensor[:OLD]), name
            # Moments as small as their epsilon: rows of one batch move by other steps than by decay.
            assert one[name][OLD:].std(0).max() > 1e-3
        else:
            assert torch.equal(one[name], tensor), name
    # The first step has a learning rate of 0: these are the weights that the stages begin with.
    two = run(folder, "two", f"init_from={folder}/one", "max_duration=1ba", "trainable=[model, lm_head]")
    export_model(str(folder / "one"), folder / "export", "fp32")
    three = run(folder, "three", f"model.decoder={folder}/export", "max_duration=1ba")
    assert "are new" not in capsys.readouterr().out
    for name in before:
        assert torch.equal(two[name], one[name]), name
        assert torch.equal(three[name], one[name]), name


def test_init_from_a_pretrained_folder_grows_it(folder: Path) -> None:
    decoder = f"model.decoder={json.dumps({**DECODER, 'vocab_size': SPARE})}"
    found = run(folder, "from", decoder, f"init_from={folder}/pretrained", "max_duration=1ba")
    expected = run(folder, "as-decoder", "max_duration=1ba")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_spare_rows_are_enough_if_the_vocabulary_fits(folder: Path) -> None:
    write_pretrained(folder / "spare", 165)
    found = run(folder, "fits", f"model.decoder={folder}/spare", "max_duration=1ba")
    before = open_decoder_folder(str(folder / "spare")).load()
    for name in VOCABULARY_MATRICES:
        assert found[name].shape == (165, 32)
        assert torch.equal(found[name][:OLD], before[name][:OLD])
        assert found[name][OLD:].std(0).max() < 1e-4


def test_a_learning_rate_of_new_rows_is_theirs_alone(folder: Path) -> None:
    start, found = (
        run(folder, f"scaled-{steps}", f"max_duration={steps}ba", "optimizer.lr_scales={new_rows: 0}")
        for steps in (1, 3)
    )
    moved = {name.split(".")[0] for name, tensor in found.items() if not torch.equal(tensor, start[name])}
    assert moved == {"adapter"}
    assert len(curve(folder / "scaled-3")) == 3
