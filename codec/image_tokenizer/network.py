"""Weights -> the networks of image tokenizers, checked tensor by tensor.

A network has a method `latents` (pixels -> latents), a method `pixels` (codes -> pixels) and a codebook,
`quantize.embedding`.
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
from unitoken.codec.image_tokenizer.emu3_names import transformers_shape
from unitoken.codec.image_tokenizer.files import Parameters, Weights
from unitoken.common.errors import ConfigError, one_line


def load_network(kind: str, weights: Weights) -> Any:
    """Build a network and load its weights, on the CPU and in float32.

    Args:
        kind: `chameleon`, `emu3` or `janus`.
        weights: the files and the shape.

    Raises:
        ConfigError: tensors are missing, unknown or of another shape, or a file cannot be read.
    """
    network = {"chameleon": _chameleon, "emu3": _emu3, "janus": _janus}[kind](weights)
    return network.eval().requires_grad_(False)


def _chameleon(weights: Weights) -> VQGAN:
    assert isinstance(weights.shape, Parameters)
    with torch.device("meta"):
        network = VQGAN(weights.shape, weights.has_decoder)
    levels = len(weights.shape.ddconfig.ch_mult)
    names = {name: meta_name(name, levels) for name in network.state_dict()}  # ours -> Meta's
    if weights.tensors:  # transformers' names of the encoder are Meta's
        _load(network, names, _read_named(weights), weights, "config.json")
    else:
        _load(network, names, _read_all(weights), weights, "the .yaml")
    return network


def _emu3(weights: Weights) -> Any:
    network = _build(weights, lambda shape: Emu3(Emu3VQVAEConfig.from_dict(shape)))
    names = {name: name for name in network.state_dict()}
    tensors = {
        name: tensor.reshape(transformers_shape(name, list(tensor.shape)))
        for name, tensor in _read_named(weights).items()
    }
    _load(network, names, tensors, weights, "config.json")
    return network


def _janus(weights: Weights) -> Any:
    network = _build(weights, lambda shape: Janus(JanusVQVAEConfig.from_dict(shape)))
    names = {name: name for name in network.state_dict()}
    _load(network, names, _read_named(weights), weights, "config.json")
    network.normalize_codebook()
    return network


def _build(weights: Weights, build: Callable[[dict[str, Any]], Any]) -> Any:
    assert not isinstance(weights.shape, Parameters)
    try:
        with torch.device("meta"):
            return build(dict(weights.shape))
    except Exception as error:  # the networks' constructors fail in many ways
        raise ConfigError(
            f"vision.weights: {weights.file}/config.json: no shape of this kind: {one_line(error, 200)}"
        ) from None


def _load(
    network: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor], weights: Weights, source: str
) -> None:
    """Load tensors into a network.

    Args:
        network: the network, on the meta device.
        names: the name in `tensors` of each of the network's parameters.
        tensors: what the files hold.
        weights: the files, for messages.
        source: the file that says the network's shape, for messages.
    """
    needed = {names[name]: tensor for name, tensor in network.state_dict().items()}
    _check(tensors, needed, weights, source)
    state = {name: tensors[theirs].to(needed[theirs].dtype) for name, theirs in names.items()}
    network.load_state_dict(state, assign=True)


def _read_all(weights: Weights) -> dict[str, Tensor]:
    """Read all tensors of Meta's file, without those of its training.

    A pickled file is read with `weights_only`: no code in it runs.
    """
    with _read_errors(weights):
        if weights.file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(weights.file)
        else:
            content = torch.load(weights.file, map_location="cpu", weights_only=True)
            content = content.get("state_dict", content)
        return {name: tensor for name, tensor in content.items() if not name.startswith("loss.")}


def _read_named(weights: Weights) -> dict[str, Tensor]:
    """Read the tensors of the image tokenizer out of transformers' files."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    with _read_errors(weights), contextlib.ExitStack() as stack:
        files = {file for file, _ in weights.tensors.values()}
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for name, (file, theirs) in weights.tensors.items():
            tensors[name] = opened[file].get_tensor(theirs)
    return tensors


@contextlib.contextmanager
def _read_errors(weights: Weights) -> Iterator[None]:
    """Turn the many errors of zip, pickle and safetensors into a ConfigError that names the weights."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"vision.weights: {weights.file}: cannot be read: {one_line(error, 200)}") from None


def _check(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], weights: Weights, source: str) -> None:
    """Raise ConfigError that lists the tensors which are missing, unknown or of another shape."""
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
