"""Decoders of every family, as transformers saves them: the same logits, packed, cached, and in flex."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.decoders import LENGTHS, VQ_CONFIG, packed_inputs
from unitoken.streaming_data.reading.batch import target_places
from unitoken.train.checkpoint.layouts import model_configs, read_decoder
from unitoken.train.checkpoint.loading import find_weights, load_weights
from unitoken.train.config import ModelConfig
from unitoken.train.model.decoder import KVCache, causal_bias
from unitoken.train.model.unitoken import UniToken, build_model

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TINY_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}


class Case(NamedTuple):
    """A model of transformers: its `model_type`, and settings beside the common sizes."""

    kind: str
    settings: dict[str, Any]


CASES = {
    "chameleon": Case("chameleon", {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6}, "vq_config": VQ_CONFIG}),
    "chameleon_swin": Case(
        "chameleon",
        {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6}, "vq_config": VQ_CONFIG, "swin_norm": True},
    ),
    "llama": Case("llama", {}),
    "llama_tied": Case("llama", {"tie_word_embeddings": True, "rope_theta": 5e5}),
    "llama_head_dim": Case("llama", {"head_dim": 12}),
    "llama_linear": Case("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama_llama3": Case("llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama_yarn": Case("llama", {"rope_scaling": YARN}),
    "llama_yarn_numbers": Case(
        "llama",
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "llama_yarn_factor": Case(
        "llama", {"rope_scaling": {**YARN, "attention_factor": 1.3, "truncate": False}}
    ),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_long_window": Case("mistral", {"sliding_window": 64, "head_dim": 8}),
    "qwen2": Case("qwen2", {}),
    "qwen2_tied": Case("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": Case("qwen3", {"head_dim": 16}),
    "qwen3_tied": Case("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "emu3": Case(
        "emu3",
        {
            "text_config": SIZES,
            "vq_config": {**TINY_VQ, "codebook_size": 8},
            "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7},
        },
    ),
    "janus": Case(
        "janus",
        {
            "text_config": {**SIZES, "model_type": "llama"},
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "projection_dim": 32,
            },
            "vq_config": {**TINY_VQ, "num_embeddings": 8, "projection_dim": 32, "image_token_embed_dim": 32},
        },
    ),
}
NESTED = ("emu3", "janus")


def build_theirs(case: Case) -> Any:
    """Build a model of transformers with random weights, of which none is 0 or 1."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    sizes = {} if case.kind in NESTED else SIZES
    config = AutoConfig.for_model(case.kind, **{**sizes, **case.settings})
    auto = AutoModelForImageTextToText if case.kind in ("chameleon", *NESTED) else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # so that a mix-up of gains shows
            torch.nn.init.normal_(parameter, 0.8, 0.3)
        elif "vision" not in name and "vq" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Return a function that gives a case's model of transformers and the folder it was saved to."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            model, folder = build_theirs(CASES[name]), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


Saved = Callable[[str], tuple[Any, Path]]


def load(folder: Path, attention: Literal["sdpa", "flex"] = "sdpa") -> UniToken:
    config = ModelConfig(decoder=str(folder), dropout=0.0, attention=attention)
    model = build_model(*model_configs(config), config)
    load_weights(model, find_weights(model, config, None), seed=0)
    return model


def logits_of(model: UniToken, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return F.linear(model.model(model.model.embed_tokens(ids), positions, None), model.output_weight)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_folder_gives_the_logits_of_transformers(name: str, saved: Saved) -> None:
    theirs, folder = saved(name)
    ids = torch.randint(7, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits, logits_of(load(folder), ids)
    kept = [i for i in range(50) if i != 6 or "chameleon" not in name]  # transformers masks image codes
    assert expected[..., kept].abs().max() > 1
    torch.testing.assert_close(found[..., kept], expected[..., kept], rtol=0, atol=1e-4)


def batch() -> dict[str, Tensor]:
    """Return a pack of three documents and padding, with labels from the second token of each on."""
    ids, positions, documents = packed_inputs()
    labels = torch.where((positions > 0) & (documents >= 0), ids, -100)
    return {
        "input_ids": ids,
        "labels": labels,
        **target_places(labels),
        "position_ids": positions,
        "document_ids": documents,
        "pixel_values": torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    }


FAMILIES = ("chameleon", "llama_llama3", "llama_yarn", "mistral", "qwen2", "qwen2_tied", "qwen3_tied")


@pytest.mark.parametrize("name", FAMILIES)
def test_flex_and_sdpa_train_documents_as_if_alone(name: str, saved: Saved) -> None:
    _, folder = saved(name)
    packed = batch()
    results = []
    for attention in ("sdpa", "flex"):
        model = load(folder, attention)
        loss = model(packed)
        loss.total.backward()
        gradients = {each: parameter.grad for each, parameter in model.named_parameters()}
        results.append((loss.token_ce, gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    model = load(folder)
    alone = []
    for document in packed["input_ids"][0, : sum(LENGTHS)].split(LENGTHS):
        logits = logits_of(model, document[None])[0]
        alone.append(F.cross_entropy(logits[:-1], document[1:], reduction="none"))
    torch.testing.assert_close(results[0][0], torch.cat(alone).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_tokens_have_the_logits_of_a_full_pass(name: str, saved: Saved) -> None:
    """The prompt of the second row is three tokens shorter, and padded."""
    model = load(saved(name)[1]).eval()
    ids = torch.randint(7, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    lengths, pixels = torch.tensor([[7], [4]]), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    past = KVCache(2, 2, 12)
    with torch.no_grad():
        past.begin(torch.arange(2), 7)
        prompts = {"input_ids": ids[:, :7], "position_ids": torch.arange(7).expand(2, -1)}
        found = [model.predict({**prompts, "pixel_values": pixels}, None, past, columns=lengths - 1)]
        for step in range(5):
            positions = lengths + step
            past.proceed(positions, 12)
            part = {"input_ids": ids.gather(1, positions), "position_ids": positions, "pixel_values": pixels}
            found.append(model.predict(part, causal_bias(positions, 12, torch.float32), past))
        expected = torch.stack([logits_of(model, ids[:1])[0, 6:], logits_of(model, ids[1:, :9])[0, 3:]])
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_are_one_tensor(saved: Saved) -> None:
    model = load(saved("llama_tied")[1])
    assert "lm_head.weight" not in model.state_dict()
    assert model.output_weight is model.model.embed_tokens.weight
    untied = load(saved("llama")[1])
    assert untied.output_weight is untied.lm_head.weight


def rewrite(folder: Path, **changes: Any) -> Path:
    """Change fields of a folder's config.json; None removes a field."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("qwen3", {"rope_theta": 7e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}),
        (
            "llama",
            {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}},
        ),
        (
            "llama",
            {"rope_theta": 7e4, "rope_scaling": {"type": "yarn", "factor": 2}},  # of the whole length
            {
                "rope_parameters": {
                    **YARN,
                    "factor": 2,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 7e4,
                }
            },
        ),
    ],
)
def test_config_files_of_transformers_4_and_5_are_read(
    name: str, old: dict[str, Any], new: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    import shutil

    sizes = []
    for number, fields in enumerate((old, new)):
        folder = Path(shutil.copytree(saved(name)[1], tmp_path / str(number)))
        without = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}
        sizes.append(read_decoder(str(rewrite(folder, **{**without, **fields}))))
    assert sizes[0] == sizes[1]
    assert sizes[0].rope_theta == 7e4
