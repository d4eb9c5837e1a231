"""Parts of tokenization tests: a tiny image tokenizer, pictures, items, and a job in the test's process."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.paths import GOLDEN
from unitoken.codec.config import ImageTokenizerConfig
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.job import Job
from unitoken.tokenize.prepare import prepare

TOKENIZER = GOLDEN / "assets" / "tokenizer"

# Four pixels per latent, in each direction.
TINY = """
model:
  params:
    embed_dim: 4
    n_embed: 64
    ddconfig:
      {z_channels: 8, resolution: 16, in_channels: 3, out_ch: 3,
       ch: 32, ch_mult: [1, 1, 2], num_res_blocks: 1}
"""


def tiny_vqgan(folder: Path, seed: int = 0) -> Path:
    """Write a folder in Meta's layout with random weights."""
    import torch
    from safetensors.torch import save_file

    from unitoken.codec.image_tokenizer.chameleon import VQGAN, meta_name
    from unitoken.codec.image_tokenizer.files import read_parameters

    folder.mkdir(parents=True)
    (folder / "vqgan.yaml").write_text(TINY)
    torch.manual_seed(seed)
    model = VQGAN(read_parameters(folder / "vqgan.yaml"))
    torch.nn.init.normal_(model.quantize.embedding.weight)
    save_file(
        {meta_name(name, 3): tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "vqgan.safetensors",
    )
    return folder


def encoder_alone(vqgan: Path, folder: Path) -> Path:
    """Write the image tokenizer of a folder in Meta's layout as transformers saves it, without a decoder."""
    from safetensors.torch import load_file
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    from unitoken.codec.image_tokenizer.chameleon import shape_of
    from unitoken.codec.image_tokenizer.files import read_parameters

    model = ChameleonVQVAE(ChameleonVQVAEConfig(**shape_of(read_parameters(vqgan / "vqgan.yaml"))))
    state = load_file(vqgan / "vqgan.safetensors")
    model.load_state_dict({name: state[name] for name in state if not name.startswith("decoder.")})
    model.save_pretrained(folder)
    return folder


def whole_model(alone: Path, folder: Path, kind: str) -> Path:
    """Write an image tokenizer as part of a whole model: the second of its two files."""
    import torch
    from safetensors.torch import load_file, save_file

    state = {f"model.vqmodel.{name}": t for name, t in load_file(alone / "model.safetensors").items()}
    rest = {"model.embed_tokens.weight": torch.zeros(3), "lm_head.weight": torch.zeros(3)}
    folder.mkdir()
    files = {"model-00001-of-00002.safetensors": rest, "model-00002-of-00002.safetensors": state}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shape = json.loads((alone / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vq_config": shape}))
    return folder


def tiny_transformers(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a folder of Emu3's or Janus' image tokenizer with random weights, as transformers saves it.

    It has 64 codes and 4 pixels per latent.
    """
    import torch

    model = tiny_model(kind, seed)
    if kind == "emu3":  # the statistics of a new model have no effect
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    return folder


def tiny_model(kind: str, seed: int = 0) -> Any:
    """Return transformers' Emu3VQVAE or JanusVQVAE with random weights."""
    import torch
    from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
    }
    if kind == "emu3":
        model = Emu3VQVAE(
            Emu3VQVAEConfig(**shape, codebook_size=64, num_res_blocks=1, attn_resolutions=[2], hidden_size=64)
        )
    else:
        model = JanusVQVAE(JanusVQVAEConfig(**shape, num_embeddings=64, num_res_blocks=1, num_patches=4))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def vision_config(folder: Path | str, **changes: Any) -> ImageTokenizerConfig:
    """Return the settings of an image tokenizer in float32."""
    return ImageTokenizerConfig.model_validate({"weights": str(folder), "precision": "fp32"} | changes)


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> str:
    """Write a PNG of smooth random colours and return its file name."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path.name


def png(size: tuple[int, int] = (20, 16)) -> bytes:
    """Return a PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def turns(*texts: str | None) -> list[dict[str, str | None]]:
    """Return the turns of a conversation, human first."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def some_items(folder: Path, count: int) -> list[dict[str, Any]]:
    """Return items with text only, one image, an image in the answer, several images; one in seven is bad."""
    items: list[dict[str, Any]] = []
    for n in range(count):
        kinds: list[dict[str, Any]] = [
            {"conversations": turns(f"How many is {n}?", f"It is {n}.")},
            {
                "conversations": turns("What is this? <|image|>", f"Picture {n}."),
                "image": picture(folder / f"a{n}.png", n),
            },
            {
                "id": f"draw-{n}",
                "conversations": turns("Draw.", "<|image|> There."),
                "image": [picture(folder / f"b{n}.png", n + 1000)],
            },
            {
                "conversations": turns("<|image|> and <|image|>", "Now <|image|>", "Thanks", None),
                "image": [
                    picture(folder / f"c{n}-{k}.png", 100 * n + k, (10 + 10 * k, 24)) for k in range(3)
                ],
            },
        ]
        items.append({"conversations": [], "id": n} if n % 7 == 6 else kinds[n % 4])
    return items


def write_items(folder: Path, items: object) -> Path:
    """Write `items.json` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "items.json"
    path.write_text(json.dumps(items))
    return path


def settings(vqgan: Path, **changes: Any) -> TokenizeConfig:
    """Return the settings of a tokenization with small chunks and pictures."""
    fields = {
        "tokenizer": str(TOKENIZER),
        "vision": {"weights": str(vqgan), "batch_size": 3},
        "target_size": 16,
        "chunk_size": 4,
    }
    return TokenizeConfig.model_validate(fields | changes)


def run_here(config: TokenizeConfig, source: Path | str, out: Path, splits: int = 1) -> Job:
    """Run all ranks one after the other in this process, without the merge."""
    from unitoken.tokenize.pipeline.worker import run_rank

    job = prepare(config, [str(source)], str(out))
    for rank in range(splits):
        run_rank(job, rank, splits, lambda finished, rejected: None)
    return job


def content(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder, including hidden ones."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
