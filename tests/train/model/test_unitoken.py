"""The whole model: checkpoints of transformers, features in their positions, ranks without images."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.decoders import VQ_CONFIG
from unitoken.common.errors import ConfigError
from unitoken.streaming_data.reading.batch import target_places
from unitoken.train.checkpoint.layouts import model_configs, read_decoder, read_vision
from unitoken.train.checkpoint.loading import find_weights, load_weights
from unitoken.train.checkpoint.tensors import TensorSource, parameter_shapes
from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig
from unitoken.train.model.unitoken import UniToken, build_model

DECODER = DecoderConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
VISION = VisionTowerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)


def build(
    decoder: Any = DECODER, vision: Any = VISION, trained: TensorSource | None = None, **settings: Any
) -> UniToken:
    config = ModelConfig(decoder=decoder, vision=vision, **{"dropout": 0.0, **settings})
    model = build_model(*model_configs(config), config)
    load_weights(model, find_weights(model, config, trained), seed=0)
    return model


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves it: gains per head, a VQ-VAE beside the decoder, several files."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    torch.manual_seed(0)
    config = ChameleonConfig(
        **DECODER.model_dump(exclude={"qk_norm", "num_key_value_heads"}, exclude_none=True),
        num_key_value_heads=2,
        vocabulary_map={"<image>": 5, "IMGIMGAZ": 6},
        vq_config=VQ_CONFIG,
    )
    model = ChameleonForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "_norm" in name:  # so that a mix-up of gains shows
            torch.nn.init.normal_(parameter, 0.8, 0.3)
    folder = tmp_path_factory.mktemp("chameleon")
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SigLIP model, with its text tower and pooling head."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    folder = tmp_path_factory.mktemp("siglip")
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION.model_dump())).save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_gives_transformers_logits(chameleon: Path) -> None:
    from transformers import ChameleonForConditionalGeneration

    assert (chameleon / "model.safetensors.index.json").exists()
    theirs = ChameleonForConditionalGeneration.from_pretrained(chameleon).eval()
    ours = build(str(chameleon), None).eval()
    assert read_decoder(str(chameleon)).qk_norm == "layer_per_head"
    ids = torch.randint(7, 60, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found = ours.lm_head(ours.model(ours.model.embed_tokens(ids), torch.arange(11).expand(2, -1), None))
    text = [i for i in range(60) if i != 6]  # transformers masks the logits of image codes
    torch.testing.assert_close(found[..., text], expected[..., text], rtol=1e-5, atol=1e-5)


def test_one_gain_for_all_heads_is_the_same_as_equal_gains(chameleon: Path, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for path in chameleon.glob("*.safetensors"):
        tensors |= load_file(path)
    gains = {name: tensor for name, tensor in tensors.items() if ".q_norm." in name or ".k_norm." in name}
    shared = {**tensors, **{name: tensor[:1].clone() for name, tensor in gains.items()}}
    equal = {**tensors, **{name: tensor[:1].repeat(len(tensor), 1) for name, tensor in gains.items()}}
    states = []
    for name, layout in (("shared", shared), ("equal", equal)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((chameleon / "config.json").read_bytes())
        save_file(layout, folder / "model.safetensors")
        model = build(str(folder), None).eval()
        rows = 1 if name == "shared" else 4
        assert parameter_shapes(model)["model.layers.0.self_attn.q_norm.weight"] == (rows, 8)
        ids = torch.arange(10)[None]
        states.append(model.model(model.model.embed_tokens(ids), ids, None))
    assert torch.equal(*states)


def test_siglips_last_hidden_state_is_transformers(siglip: Path) -> None:
    from transformers import SiglipVisionModel

    assert read_vision(str(siglip)) == VISION
    theirs = SiglipVisionModel.from_pretrained(siglip).eval()
    ours = build(DECODER, str(siglip))
    pixels = torch.randint(
        0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = theirs(pixel_values=(pixels.float() / 255 - 0.5) / 0.5).last_hidden_state
        torch.testing.assert_close(ours.vit(pixels), expected, rtol=1e-5, atol=1e-5)


NORM = "model.layers.0.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"not part of this model: model\.extra"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(59, 32)}),
            r"lm_head\.weight has shape \(59, 32\), .* needs \(60, 32\)",
        ),
        (
            lambda t: t.update({NORM: torch.tensor(1.0)}),
            r"q_norm\.weight has shape \(\), the model needs \(4, 8\)",
        ),
        (
            lambda t: t.update({NORM: torch.zeros(0, 8)}),
            r"q_norm\.weight has shape \(0, 8\), the model needs \(4, 8\)",
        ),
        (lambda t: t.update({"surplus.weight": torch.zeros(1)}), r"not part of this model: surplus\.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(
    spoil: Any, message: str, chameleon: Path, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    for path in chameleon.glob("*.safetensors"):
        tensors |= load_file(path)
    spoil(tensors)
    (tmp_path / "config.json").write_bytes((chameleon / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        build(str(tmp_path), None)


def from_model(model: UniToken, *parts: str) -> TensorSource:
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not parts or name.split(".")[0] in parts
    }
    return TensorSource(
        "init_from",
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda names: {name: state[name] for name in names},
    )


def test_a_stage_without_a_tower_does_not_change_the_next_tower(siglip: Path) -> None:
    base = build(DECODER, None)
    with torch.no_grad():
        base.lm_head.weight.fill_(0.5)
    fresh = build(DECODER, str(siglip))
    model = build(DECODER, str(siglip), trained=from_model(base))
    for name, tensor in model.state_dict().items():
        source = base if name.split(".")[0] in ("model", "lm_head") else fresh
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_an_earlier_stages_tower_comes_before_the_pretrained_one(siglip: Path) -> None:
    earlier = build(DECODER, str(siglip))
    with torch.no_grad():
        earlier.vit.post_layernorm.bias.fill_(7.0)
    model = build(DECODER, str(siglip), trained=from_model(earlier))
    assert (model.vit.post_layernorm.bias == 7.0).all()


def test_an_incomplete_part_is_an_error() -> None:
    source = from_model(build())
    del source.shapes["vit.post_layernorm.bias"]
    with pytest.raises(
        ConfigError, match=r"init_from: 1 tensors do not fit: missing: vit\.post_layernorm\.bias"
    ):
        build(trained=source)


def spoiled_folder(chameleon: Path, folder: Path, *lost: str) -> str:
    tensors: dict[str, Tensor] = {}
    for path in chameleon.glob("*.safetensors"):
        tensors |= load_file(path)
    folder.mkdir()
    (folder / "config.json").write_bytes((chameleon / "config.json").read_bytes())
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)},
        folder / "model.safetensors",
    )
    return str(folder)


def test_a_lost_part_is_not_replaced_by_random_weights(chameleon: Path, tmp_path: Path) -> None:
    """Its companion is there, so both were trained together. One error names all that is missing."""
    with pytest.raises(
        ConfigError,
        match=r"^init_from: 4 tensors do not fit: missing: adapter\.0\.weight; .*adapter\.2\.bias$",
    ):
        build(trained=from_model(build(), "model", "lm_head", "vit"))
    with pytest.raises(
        ConfigError, match=r"^init_from: 5 tensors do not fit: missing: adapter.*; missing: lm_head\.weight$"
    ):
        build(trained=from_model(build(), "model", "vit"))
    with pytest.raises(ConfigError, match=r"no_head: 1 tensors do not fit: missing: lm_head\.weight$"):
        build(spoiled_folder(chameleon, tmp_path / "no_head", "lm_head"), None)
    with pytest.raises(ConfigError, match=r"init_from: \d+ tensors do not fit: missing: vit\."):
        build(trained=from_model(build(), "model", "lm_head", "adapter"))
    build(trained=from_model(build(), "model", "lm_head"))


def test_one_error_names_what_does_not_fit_in_all_folders(
    chameleon: Path, siglip: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"x: 2 tensors .*model\.norm\.weight; missing: lm_head.*; .*siglip\d*: 1 .*shape"
    ):
        build(
            spoiled_folder(chameleon, tmp_path / "x", "model.norm", "lm_head"),
            str(spoiled_tower(siglip, tmp_path / "siglip1")),
        )


def spoiled_tower(siglip: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((siglip / "config.json").read_bytes())
    tensors = load_file(siglip / "model.safetensors")
    tensors["vision_model.post_layernorm.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_new_weights_depend_on_the_seed_alone() -> None:
    with_tower, without = build(), build(vision=None)
    assert torch.equal(with_tower.lm_head.weight, without.lm_head.weight)
    assert not torch.equal(with_tower.lm_head.weight[:, :1], with_tower.model.embed_tokens.weight[:, :1])
    assert parameter_shapes(with_tower).keys() > parameter_shapes(without).keys()


def batch_of(images: int) -> dict[str, Tensor]:
    """Return two packs of 20 tokens, with 4 features an image from position 3 of the second pack on."""
    generator = torch.Generator().manual_seed(0)
    input_ids, labels = torch.randint(0, 60, (2, 2, 20), generator=generator)
    return {
        "input_ids": input_ids,
        "labels": labels,
        **target_places(labels),
        "position_ids": torch.arange(20).expand(2, -1),
        "document_ids": torch.zeros(2, 20, dtype=torch.int32),
        "pixel_values": torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8, generator=generator),
        "view_rows": torch.ones(images, dtype=torch.int64),
        "feature_rows": torch.ones(images * 4, dtype=torch.int64),
        "feature_columns": torch.arange(images * 4) + 3,
        "feature_views": torch.arange(images).repeat_interleave(4),
        "feature_patches": torch.arange(4).repeat(images),
    }


def test_features_replace_just_the_positions_of_the_batch() -> None:
    model = build()
    batch = batch_of(2)
    embeddings = model.embed(batch)
    expected = model.model.embed_tokens(batch["input_ids"]).clone()
    expected[1, 3:11] = model.adapter(model.vit(batch["pixel_values"])).flatten(0, 1)
    torch.testing.assert_close(embeddings, expected)


def test_unsupervised_rows_never_become_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model, rows = batch_of(0), build(), []
    batch["labels"] = torch.full((2, 20), -100)
    batch["labels"][1, 10:15] = 1
    batch |= target_places(batch["labels"])
    real = F.linear

    def linear(states: Tensor, weight: Tensor, *bias: Tensor | None) -> Tensor:
        if weight is model.lm_head.weight:
            rows.append(len(states))
        return real(states, weight, *bias)

    monkeypatch.setattr(F, "linear", linear)
    model(batch)
    assert rows == [5]


def test_a_batch_without_targets_has_a_gradient_of_zero() -> None:
    batch, model = batch_of(0), build()
    batch |= target_places(torch.full((2, 20), -100))
    loss = model(batch).total
    assert loss.item() == 0.0
    loss.backward()
    for part in (model.lm_head, model.model.embed_tokens):
        assert part.weight.grad is not None
        assert not part.weight.grad.any()


def test_a_rank_without_images_runs_the_tower_too() -> None:
    """Under FSDP2 the ranks gather the tower together: a rank that skipped it would hang the others."""
    model = build().train()
    calls: list[int] = []
    model.vit.register_forward_hook(lambda *_: calls.append(1))
    loss = model(batch_of(0)).total
    loss.backward()
    assert calls == [1]
    gradients = [parameter.grad for part in (model.vit, model.adapter) for parameter in part.parameters()]
    # The tower takes part in the backward pass, with gradients of zero.
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    text_only = build(vision=None).train()
    text_only.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name in text_only.state_dict()}
    )
    assert text_only(batch_of(0)).total.item() == loss.item()


def test_flex_and_sdpa_give_the_same_loss_and_gradients() -> None:
    batch = batch_of(2)
    batch["document_ids"] = torch.tensor(
        [[0] * 9 + [1] * 8 + [-1] * 3, [0] * 15 + [1] * 5], dtype=torch.int32
    )
    results = []
    for attention in ("sdpa", "flex"):
        model = build(attention=attention)
        loss = model(batch).total
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
