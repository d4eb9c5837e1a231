"""Image tokenizers: codes depend on the picture alone and are those of transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tokenizing import tiny_model, tiny_transformers, vision_config
from unitoken.codec.image_tokenizer.encoder import VisionCodec, load_vision, nearest_codes
from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.codec.image_tokenizer.network import load_network
from unitoken.common.errors import ConfigError
from unitoken.dataset import images

KINDS = ("emu3", "janus")
GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: CUDA_VISIBLE_DEVICES=0 pytest -m gpu"
)


def load(folder: Path, device: str = "cpu", **changes: Any) -> VisionCodec:
    return load_vision(vision_config(folder, **changes), device)


def pixels(count: int, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def test_shapes_and_types_of_codes_and_pictures(vqgan: Path) -> None:
    vision = load(vqgan)
    assert (vision.codebook_size, vision.downsampling) == (64, 4)
    codes = vision.encode(pixels(2))
    assert codes.shape == (2, 4, 6)
    assert codes.dtype == np.int64
    decoded = vision.decode(codes)
    assert decoded.shape == (2, 16, 24, 3)
    assert decoded.dtype == np.uint8


def test_codes_do_not_depend_on_the_rest_of_the_batch(vqgan: Path) -> None:
    vision = load(vqgan)
    batch = pixels(5)
    alone = np.concatenate([vision.encode(one[None]) for one in batch])
    assert (vision.encode(batch) == alone).mean() > 0.99  # rounding may differ, so chunks keep their batches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_around_it_changes_neither_codes_nor_pixels(vqgan: Path, precision: str) -> None:
    """A run that trains in bf16 draws its samples under autocast."""
    vision = load(vqgan, precision=precision)
    codes = vision.encode(pixels(4))
    decoded = vision.decode(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert (vision.encode(pixels(4)) == codes).all()
        assert (vision.decode(codes) == decoded).all()


def test_flat_pictures_keep_their_codes(golden: Path) -> None:
    """Torch's GroupNorm on CPU loses the variance of nearly constant pictures in channels-last memory.

    Of this one, which is nearly white, a third of the codes was wrong at this size and all at 512 x 512.
    """
    folder = golden / "assets" / "vqgan"
    white = images.decode((golden / "assets" / "images" / "d11_16bit.png").read_bytes(), compat=True)
    flat = images.tokenizer_pixels(white, (256, 256))[None]
    found = load(folder).encode(flat)
    exact = load_network("chameleon", find_image_tokenizer(vision_config(folder))).double()
    x = torch.tensor(flat).permute(0, 3, 1, 2).contiguous().double() / 255 * 2 - 1
    expected = nearest_codes(exact.latents(x), exact.quantize.embedding.weight.float()).numpy()
    assert (found == expected).mean() > 0.98


def expected_codes(folder: Path, kind: str, batch: np.ndarray) -> np.ndarray:
    """Encode with transformers, picture by picture. Version 4.57 returns a tuple or list, 5 an object."""
    model = tiny_model(kind).eval()
    state = load_file(folder / "model.safetensors")
    model.load_state_dict(state)
    found = []
    for one in batch:
        x = torch.tensor(one[None]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            if kind == "emu3":
                codes = model.encode(x, torch.tensor([one.shape[:2]]))
                found.append(getattr(codes, "image_tokens", codes)[0].numpy())
            else:
                codes = model.encode(x)
                codes = codes.image_tokens if hasattr(codes, "image_tokens") else codes[2]
                found.append(codes.view(one.shape[0] // 4, one.shape[1] // 4).numpy())
    return np.stack(found)


def unit_codebook(folder: Path) -> None:
    """Scale the codebook to length 1, which transformers' Janus forgets to do when it encodes."""
    state = load_file(folder / "model.safetensors")
    weight = state["quantize.embedding.weight"]
    save_file(
        state | {"quantize.embedding.weight": weight / weight.norm(dim=1, keepdim=True)},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = tiny_transformers(tmp_path / kind, kind)
    if kind == "janus":
        unit_codebook(folder)
    vision = load(folder, kind=kind)
    assert (vision.codebook_size, vision.downsampling) == (64, 4)
    found = vision.encode(pixels(3))
    assert found.shape == (3, 4, 6)
    assert len(np.unique(found)) > 5
    assert (found == expected_codes(folder, kind, pixels(3))).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_codes_become_pictures_of_any_size(tmp_path: Path, kind: str) -> None:
    vision = load(tiny_transformers(tmp_path / kind, kind), kind=kind)
    decoded = vision.decode(vision.encode(pixels(2)))
    assert decoded.shape == (2, 16, 24, 3)
    assert decoded.std() > 5


def test_decoded_pictures_are_those_of_transformers(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 64, (2, 4, 4))
    for kind in KINDS:
        vision = load(tiny_transformers(tmp_path / kind, kind), kind=kind)
        model = tiny_model(kind).eval()
        model.load_state_dict(load_file(tmp_path / kind / "model.safetensors"))
        with torch.inference_mode():
            expected = model.decode(
                torch.tensor(codes) if kind == "emu3" else torch.tensor(codes).view(2, 16)
            )
        expected = ((expected.clamp(-1, 1) + 1) / 2 * 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        assert np.abs(vision.decode(codes).astype(int) - expected).max() <= 1


def test_janus_compares_directions(tmp_path: Path) -> None:
    """LlamaGen and Janus' own code do so: the length of a vector in the file's codebook has no effect."""
    folder = tiny_transformers(tmp_path / "janus", "janus")
    before = load(folder, kind="janus").encode(pixels(2))
    state = load_file(folder / "model.safetensors")
    lengths = torch.linspace(0.1, 10, 64)[:, None]
    save_file(
        {name: t * lengths if name == "quantize.embedding.weight" else t for name, t in state.items()},
        folder / "model.safetensors",
    )
    assert (load(folder, kind="janus").encode(pixels(2)) == before).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["vqmodel.", "model.vqmodel."])
def test_the_image_tokenizer_of_a_whole_model_is_read(tmp_path: Path, kind: str, prefix: str) -> None:
    """The model's files hold other tensors, too; the fingerprint is that of the image tokenizer alone."""
    alone = tiny_transformers(tmp_path / "alone", kind)
    state = {prefix + name: tensor for name, tensor in load_file(alone / "model.safetensors").items()}
    state |= {"model.text_model.weight": torch.zeros(3), "lm_head.weight": torch.zeros(3)}
    whole = tmp_path / "whole"
    whole.mkdir()
    for number in range(2):
        names = sorted(state)[number::2]
        save_file(
            {name: state[name] for name in names}, whole / f"model-{number + 1:05d}-of-00002.safetensors"
        )
    shape = json.loads((alone / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": kind, "vq_config": shape}))
    assert (
        find_image_tokenizer(vision_config(whole, kind=kind)).fingerprint
        == find_image_tokenizer(vision_config(alone, kind=kind)).fingerprint
    )
    assert (load(whole, kind=kind).encode(pixels(1)) == load(alone, kind=kind).encode(pixels(1))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_transformers_that_do_not_fit_are_listed(tmp_path: Path, kind: str) -> None:
    folder = tiny_transformers(tmp_path / kind, kind)
    state = load_file(folder / "model.safetensors")
    state["encoder.new"] = state.pop("encoder.conv_in.bias")
    state["quantize.embedding.weight"] = torch.zeros(64, 3)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        load(folder, kind=kind)
    for problem in (
        "missing encoder.conv_in.bias",
        "unknown encoder.new",
        r"quantize.embedding.weight is [64, 3], config.json says",
    ):
        assert problem in str(error.value)


def test_an_invalid_shape_is_one_line(tmp_path: Path) -> None:
    folder = tiny_transformers(tmp_path / "emu3", "emu3")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"num_res_blocks": "many"}))
    with pytest.raises(ConfigError, match=r"config.json: no shape of this kind: ") as error:
        load(folder, kind="emu3")
    assert "\n" not in str(error.value)


def test_precisions_nearly_agree_and_tf32_is_fp32_on_a_cpu(vqgan: Path) -> None:
    codes = {
        precision: load(vqgan, precision=precision).encode(pixels(8))
        for precision in ("fp32", "tf32", "bf16")
    }
    assert (codes["tf32"] == codes["fp32"]).all()
    assert 0.5 < (codes["bf16"] == codes["fp32"]).mean() < 1
    assert load(vqgan, precision="bf16").decode(codes["fp32"]).shape == (8, 16, 24, 3)


def test_torchs_global_settings_are_restored(vqgan: Path) -> None:
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )
    load(vqgan).encode(pixels(1))
    now = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )
    assert now == before


def test_many_distances_are_compared_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(2, 4, 6, 8, generator=generator), torch.randn(64, 4, generator=generator)
    expected = nearest_codes(latents, codebook)
    assert (nearest_codes(latents, codebook, max_distances=640) == expected).all()


# --- on a GPU -----------------------------------------------------------------------------------------------


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "agreement"), [("fp32", 0.99), ("tf32", 0.9), ("bf16", 0.5)])
def test_a_gpu_finds_the_codes_of_a_cpu(vqgan: Path, precision: str, agreement: float) -> None:
    expected = load(vqgan).encode(pixels(8))
    codes = load(vqgan, "cuda", precision=precision).encode(pixels(8))
    assert (codes == expected).mean() > agreement


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_gpu_finds_the_same_codes_each_time(golden: Path, precision: str) -> None:
    folder = golden / "assets" / "vqgan"
    batch = pixels(4, (256, 256))
    first = load(folder, "cuda", precision=precision).encode(batch)
    assert (load(folder, "cuda", precision=precision).encode(batch) == first).all()


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_emu3_and_janus_run_on_a_gpu(tmp_path: Path, kind: str, precision: str) -> None:
    folder = tiny_transformers(tmp_path / kind, kind)
    vision = load(folder, "cuda", kind=kind, precision=precision)
    codes = vision.encode(pixels(4))
    assert (codes == load(folder, kind=kind).encode(pixels(4))).mean() > (
        0.99 if precision == "fp32" else 0.4
    )
    assert vision.decode(codes).shape == (4, 16, 24, 3)


@GPU
@pytest.mark.gpu
def test_flat_pictures_keep_their_codes_on_a_gpu(golden: Path) -> None:
    """Pictures are channels-last on a GPU, where torch's GroupNorm keeps their variance."""
    folder = golden / "assets" / "vqgan"
    white = images.decode((golden / "assets" / "images" / "d11_16bit.png").read_bytes(), compat=True)
    flat = images.tokenizer_pixels(white, (256, 256))[None]
    assert (load(folder, "cuda").encode(flat) == load(folder).encode(flat)).mean() > 0.98


def test_a_compiled_encoder_pads_batches_to_one_size(vqgan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def compile_and_record(latents: Any, **settings: Any) -> Any:
        def call(x: torch.Tensor) -> Any:
            shapes.append(tuple(x.shape))
            return latents(x)

        return call

    monkeypatch.setattr(torch, "compile", compile_and_record)
    plain, compiled = load(vqgan), load(vqgan, compile=True, batch_size=4)
    for count in (1, 3, 4):
        codes = compiled.encode(pixels(count))
        assert codes.shape == (count, 4, 6)
        assert (codes == plain.encode(pixels(count))).mean() > 0.99  # rounding may differ
    assert shapes == [(4, 3, 16, 24)] * 3


@GPU
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_compiled_codes_are_near_uncompiled_ones(vqgan: Path, precision: str) -> None:
    eager = load(vqgan, "cuda", precision=precision).encode(pixels(3))
    compiled = load(vqgan, "cuda", precision=precision, compile=True, batch_size=8)
    assert (compiled.encode(pixels(3)) == eager).mean() > 0.5
    assert (compiled.encode(pixels(2)) == compiled.encode(pixels(3))[:2]).all()  # padded to the same batch
    batches = [compiled.begin(pixels(8)) for _ in range(3)]  # in flight at once
    assert all((batch.codes() == batches[0].codes()).all() for batch in batches)
    assert batches[0].started < batches[0].ended <= batches[2].started
