"""Published checkpoints, each as a tiny folder of exactly its layout: names, shapes, types, files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.layouts import model_configs, read_decoder, read_vision
from unitoken.train.checkpoint.loading import find_weights, load_weights
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.tensors import TensorSource, fit_norms, open_decoder_folder, parameter_shapes
from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig
from unitoken.train.model.unitoken import UniToken, build_model

HEADS, HEAD_DIM = 4, 8
DECODER = DecoderConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS
)
VISION = VisionTowerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
CHAMELEON = {  # the config.json of all three folders: transformers' Chameleon
    "architectures": ["ChameleonForConditionalGeneration"],
    "model_type": "chameleon",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    **DECODER.model_dump(exclude={"qk_norm", "num_key_value_heads"}),
    "num_key_value_heads": HEADS,
    "vq_config": {"embed_dim": 256, "num_embeddings": 8192},
    "vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6},
}
VQ_KEYS = {
    "model.vqmodel.encoder.conv_in.weight": torch.ones(4, 3, 3, 3),
    "model.vqmodel.quantize.embedding.weight": torch.ones(8, 4),
    "model.vqmodel.post_quant_conv.bias": torch.ones(4),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights of a UniToken, in bfloat16 as published."""
    torch.manual_seed(0)
    model = UniToken(DECODER, VISION)
    return {name: torch.randn_like(parameter).bfloat16() for name, parameter in model.named_parameters()}


def save(folder: Path, config: Mapping[str, Any], *files: Mapping[str, Tensor]) -> str:
    """Write one file as `model.safetensors`, several as shards with their index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for name, tensors in zip(names if len(files) > 1 else ["model.safetensors"], files, strict=True):
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        places = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
    return str(folder)


def part(weights: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.split(".")[0] in parts}


def repeat_norms_per_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.repeat(HEADS, 1) if "q_norm" in name or "k_norm" in name else tensor
        for name, tensor in tensors.items()
    }


def chameleon(folder: Path, weights: Mapping[str, Tensor]) -> str:
    decoder = repeat_norms_per_head(part(weights, "model", "lm_head"))
    first = {name: tensor for name, tensor in decoder.items() if ".layers.1." not in name}
    second = {name: tensor for name, tensor in decoder.items() if ".layers.1." in name}
    return save(folder, CHAMELEON, first, second | VQ_KEYS)


def lumina(folder: Path, weights: Mapping[str, Tensor]) -> str:
    config = CHAMELEON | {
        "architectures": ["ChameleonXLLMXForConditionalGeneration"],
        "mask_image_logits": True,
        "dropout": 0.0,
    }
    return save(folder, config, part(weights, "model", "lm_head"))


def lumina_with_vq(folder: Path, weights: Mapping[str, Tensor]) -> str:
    return save(folder, CHAMELEON, part(weights, "model", "lm_head") | VQ_KEYS)


def unitoken(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """`vit` is the `.vision_model` of transformers' SigLIP, with the pooling head that nobody uses."""
    head = {"vit.head.probe": torch.ones(1, 1, 16), "vit.head.attention.in_proj_weight": torch.ones(48, 16)}
    return save(
        folder, CHAMELEON | {"architectures": ["ChameleonXLLMXForConditionalGeneration"]}, {**weights, **head}
    )


def siglip(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """The whole model, as google/siglip-so400m-patch14-384 is."""
    tower = {
        name.replace("vit.", "vision_model.", 1): tensor for name, tensor in part(weights, "vit").items()
    }
    rest = {
        "vision_model.head.probe": torch.ones(1, 1, 16),
        "text_model.embeddings.token_embedding.weight": torch.ones(9, 16),
        "text_model.head.bias": torch.ones(16),
        "logit_scale": torch.ones(1),
        "logit_bias": torch.ones(1),
    }
    config = {
        "model_type": "siglip",
        "text_config": {"hidden_size": 16},
        "vision_config": VISION.model_dump(),
    }
    return save(folder, config, tower | rest)


def siglip_tower(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """As `SiglipVisionModel.save_pretrained` writes it."""
    tower = {
        name.replace("vit.", "vision_model.", 1): tensor for name, tensor in part(weights, "vit").items()
    }
    return save(folder, {"model_type": "siglip_vision_model", **VISION.model_dump()}, tower)


def siglip_inner_tower(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """The same of transformers 5, where the tower has no `vision_model` in it."""
    tower = {name.removeprefix("vit."): tensor for name, tensor in part(weights, "vit").items()}
    return save(
        folder,
        {"model_type": "siglip_vision_model", **VISION.model_dump()},
        tower | {"head.probe": torch.ones(1, 1, 16)},
    )


def load(config: ModelConfig, trained: TensorSource | None = None) -> UniToken:
    model = build_model(*model_configs(config), config)
    load_weights(model, find_weights(model, config, trained), seed=0)
    return model


def assert_holds(model: UniToken, expected: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[name].float()), name


@pytest.mark.parametrize("layout", [chameleon, lumina, lumina_with_vq])
def test_a_published_decoder_is_loaded(
    layout: Callable[..., str], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = layout(tmp_path / "decoder", weights)
    expected = part(weights, "model", "lm_head")
    per_head = layout is chameleon
    assert read_decoder(folder).qk_norm == ("layer_per_head" if per_head else "layer_shared")
    model = load(ModelConfig(decoder=folder))
    assert_holds(model, repeat_norms_per_head(expected) if per_head else expected)
    assert parameter_shapes(model).keys() == expected.keys()


@pytest.mark.parametrize("layout", [siglip, siglip_tower, siglip_inner_tower])
def test_a_published_tower_is_loaded(
    layout: Callable[..., str], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = layout(tmp_path / "siglip", weights)
    assert read_vision(folder) == VISION
    model = load(ModelConfig(decoder=lumina(tmp_path / "lumina", weights), vision=folder))
    assert_holds(model, part(weights, "model", "lm_head", "vit"))  # the adapter is new


def test_unitokens_folder_has_tower_and_adapter(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """As the decoder of a new stage, and as `init_from` of a stage with Lumina's and SigLIP's folders."""
    other = {name: tensor + 1 for name, tensor in weights.items()}
    tower = siglip(tmp_path / "siglip", other)
    folder = unitoken(tmp_path / "unitoken", weights)
    assert_holds(load(ModelConfig(decoder=folder, vision=tower)), weights)
    config = ModelConfig(decoder=lumina(tmp_path / "lumina", other), vision=tower)
    assert_holds(load(config, open_decoder_folder(str(find_origin(folder)))), weights)


def test_a_decoders_folder_has_no_sizes_of_a_tower(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of a Chameleon decoder and of no vision tower"):
        read_vision(unitoken(tmp_path / "unitoken", weights))


def test_norms_are_converted_between_the_layouts(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Lumina's weights with a row per head, and back, bit for bit; rows trained apart stay apart."""
    shared, per_head = lumina(tmp_path / "shared", weights), chameleon(tmp_path / "per_head", weights)
    expected = part(weights, "model", "lm_head")
    assert_holds(
        load(ModelConfig(decoder=per_head), open_decoder_folder(shared)), repeat_norms_per_head(expected)
    )
    assert_holds(load(ModelConfig(decoder=shared), open_decoder_folder(per_head)), expected)

    apart = repeat_norms_per_head(expected)
    name = "model.layers.1.self_attn.k_norm.bias"
    apart[name] = apart[name].clone()
    apart[name][2, 3] += 1
    folder = save(tmp_path / "apart", CHAMELEON, apart)
    assert_holds(load(ModelConfig(decoder=per_head), open_decoder_folder(folder)), apart)
    config = ModelConfig(decoder=shared)
    model = build_model(*model_configs(config), config)
    with pytest.raises(
        ConfigError, match=rf"{folder}: {name} differs from head to head, the model has one for all"
    ):
        find_weights(
            model, config, open_decoder_folder(folder)
        )  # an error before anything is loaded, on every rank


def test_groups_of_heads_are_repeated_in_their_order() -> None:
    """Chameleon 34B has a row for each machine that it was trained on."""
    norm = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    name = "model.layers.0.self_attn.q_norm.weight"
    fitted = fit_norms(
        TensorSource("", {name: (2, 2)}, lambda names: dict.fromkeys(names, norm)), {name: (4, 2)}
    )
    assert fitted.shapes == {name: (4, 2)}
    assert fitted.load()[name][:, 0].tolist() == [1, 1, 2, 2]


def test_only_the_requested_tensors_are_read(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the adapter of a folder does not read 28 GB of decoder with it."""
    source = open_decoder_folder(unitoken(tmp_path / "unitoken", weights))
    assert source.read(["adapter.0.bias"]).keys() == {"adapter.0.bias"}
