"""Weights -> the networks of image tokenizers, checked tensor by tensor.

A network has `latents` (pixels -> what is quantized), `pixels` (codes -> pixels) and a codebook, `quantize.embedding`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from unitoken.codec.image_tokenizer.chameleon import VQGAN, meta_name
from unitoken.codec.image_tokenizer.emu3_janus import Emu3, Janus
from unitoken.codec.image_tokenizer.files import Parameters, Weights
from unitoken.common.errors import ConfigError, one_line


def load_network(kind: str, weights: Weights) -> Any:
    """On the CPU, in float32. Raises ConfigError for tensors that are missing, unknown or of another shape."""
    network = {"chameleon": _chameleon, "emu3": _emu3, "janus": _janus}[kind](weights)
    return network.eval().requires_grad_(False)


def _chameleon(weights: Weights) -> VQGAN:
    assert isinstance(weights.shape, Parameters)
    with torch.device("meta"):
        network = VQGAN(weights.shape)
    levels = len(weights.shape.ddconfig.ch_mult)
    names = {name: meta_name(name, levels) for name in network.state_dict()}  # ours -> Meta's
    _fill(network, names, _read_all(weights), weights, "the .yaml")
    return network


def _emu3(weights: Weights) -> Any:
    network = _from_config(weights, lambda shape: Emu3(Emu3VQVAEConfig.from_dict(shape)))
    _fill(
        network, {name: name for name in network.state_dict()}, _read_named(weights), weights, "config.json"
    )
    return network


def _janus(weights: Weights) -> Any:
    network = _from_config(weights, lambda shape: Janus(JanusVQVAEConfig.from_dict(shape)))
    _fill(
        network, {name: name for name in network.state_dict()}, _read_named(weights), weights, "config.json"
    )
    network.normalize_codebook()
    return network


def _from_config(weights: Weights, build: Callable[[dict[str, Any]], Any]) -> Any:
    assert not isinstance(weights.shape, Parameters)
    try:
        with torch.device("meta"):
            return build(dict(weights.shape))
    except Exception as error:  # whatever a network's constructor says to a shape that is none
        reason = one_line(error)
        raise ConfigError(
            f"vision.weights: {weights.file}/config.json: no shape of this kind: {reason[:200]}"
        ) from None


def _fill(
    network: nn.Module, names: Mapping[str, str], found: Mapping[str, Tensor], weights: Weights, source: str
) -> None:
    """`names` are the network's names -> the files'."""
    needed = {names[name]: tensor for name, tensor in network.state_dict().items()}
    _check(found, needed, weights, source)
    state = {name: found[theirs].to(needed[theirs].dtype) for name, theirs in names.items()}
    network.load_state_dict(state, assign=True)


def _read_all(weights: Weights) -> dict[str, Tensor]:
    """Name -> tensor. Pickled files are read with `weights_only`: no code in them runs."""
    with _reading(weights):
        if weights.file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(weights.file)
        else:
            content = torch.load(weights.file, map_location="cpu", weights_only=True)
            content = content.get("state_dict", content)
        return {name: tensor for name, tensor in content.items() if not name.startswith("loss.")}


def _read_named(weights: Weights) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    with _reading(weights), contextlib.ExitStack() as stack:
        files = {file for file, _ in weights.tensors.values()}
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for name, (file, theirs) in weights.tensors.items():
            tensors[name] = opened[file].get_tensor(theirs)
    return tensors


@contextlib.contextmanager
def _reading(weights: Weights) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # zip, pickle, safetensors and their kin, all for a file that is no weights file
        reason = one_line(error)
        raise ConfigError(f"vision.weights: {weights.file}: cannot be read: {reason[:200]}") from None


def _check(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], weights: Weights, source: str) -> None:
    problems = [f"missing {name}" for name in needed if name not in found]
    problems += [f"unknown {name}" for name in found if name not in needed]
    problems += [
        f"{name} is {list(found[name].shape)}, {source} says {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConfigError(
            f"vision.weights: {weights.file}: does not fit {source}: {'; '.join(problems[:8])}{more}"
        )
