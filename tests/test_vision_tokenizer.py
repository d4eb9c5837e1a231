"""The image tokenizer: what its weights must be, and that codes depend on the picture alone."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizing import tiny_vqgan

from unitoken.streaming_data import images
from unitoken.streaming_data.config import ConfigError
from unitoken.tokenize.vision import load_vision
from unitoken.tokenize.weights import find_weights


def pixels(count: int, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def test_shapes(vqgan: Path) -> None:
    vision = load_vision(str(vqgan))
    assert (vision.codebook_size, vision.downsampling) == (64, 4)
    codes = vision.encode(pixels(2))
    assert codes.shape == (2, 4, 6)
    assert codes.dtype == np.int64
    decoded = vision.decode(codes)
    assert decoded.shape == (2, 16, 24, 3)
    assert decoded.dtype == np.uint8


def test_codes_do_not_depend_on_the_rest_of_the_batch(vqgan: Path) -> None:
    vision = load_vision(str(vqgan))
    batch = pixels(5)
    alone = np.concatenate([vision.encode(one[None]) for one in batch])
    assert (vision.encode(batch) == alone).mean() > 0.99  # last bits may differ, so chunks keep their batches


def test_flat_pictures_keep_their_codes(golden: Path) -> None:
    """torch's GroupNorm on CPU loses the variance of nearly constant pictures in channels-last memory: of this one,
    which is all but white, a third of the codes was wrong at this size and all at 512 x 512."""
    vision = load_vision(str(golden / "assets" / "vqgan"))
    white = images.decode((golden / "assets" / "images" / "d11_16bit.png").read_bytes(), compat=True)
    flat = images.tokenizer_pixels(white, (256, 256))[None]
    found = vision.encode(flat)
    exact = vision._model.double()
    x = torch.tensor(flat).permute(0, 3, 1, 2).contiguous().double() / 255 * 2 - 1
    with torch.inference_mode():
        expected = exact.codes(exact.latents(x)).numpy()
    assert (found == expected).mean() > 0.98


def test_one_file_and_checkpoints_of_taming_are_read(vqgan: Path, tmp_path: Path) -> None:
    expected = load_vision(str(vqgan)).encode(pixels(1))
    state = load_file(vqgan / "vqgan.safetensors")
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    torch.save({"state_dict": state | {"loss.discriminator.weight": torch.zeros(3)}, "epoch": 3}, tmp_path / "vqgan.ckpt")
    assert (load_vision(str(tmp_path)).encode(pixels(1)) == expected).all()
    assert (load_vision(str(vqgan / "vqgan.safetensors")).encode(pixels(1)) == expected).all()


def test_other_weights_have_another_fingerprint(vqgan: Path, tmp_path: Path) -> None:
    other = tiny_vqgan(tmp_path / "other", seed=1)
    assert find_weights(str(vqgan)).fingerprint != find_weights(str(other)).fingerprint
    assert find_weights(str(vqgan)).fingerprint == find_weights(str(vqgan / "vqgan.safetensors")).fingerprint


def changed(vqgan: Path, folder: Path, **changes: torch.Tensor | None) -> str:
    """A copy in which tensors (`__` for `.`) are replaced or left out."""
    state = load_file(vqgan / "vqgan.safetensors")
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, folder / "vqgan.safetensors")
    (folder / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    return str(folder)


def test_tensors_that_do_not_fit_are_listed(vqgan: Path, tmp_path: Path) -> None:
    zero = torch.zeros(3)
    folder = changed(vqgan, tmp_path, quant_conv__bias=None, quantize__embedding__weight=zero, encoder__new=zero.clone())
    with pytest.raises(ConfigError) as error:
        load_vision(folder)
    message = str(error.value)
    assert "missing quant_conv.bias" in message
    assert "unknown encoder.new" in message
    assert "quantize.embedding.weight is [3], the .yaml says [64, 4]" in message


def test_many_problems_are_cut_short(tmp_path: Path, vqgan: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "vqgan.safetensors")
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    with pytest.raises(ConfigError, match=r"and \d+ more$") as error:
        load_vision(str(tmp_path))
    assert len(str(error.value)) < 1000


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code in a checkpoint ran')",))


def test_no_code_in_a_checkpoint_runs(vqgan: Path, tmp_path: Path) -> None:
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    (tmp_path / "vqgan.ckpt").write_bytes(pickle.dumps({"state_dict": _Evil()}))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_vision(str(tmp_path))


def test_a_cut_file_is_one_line(vqgan: Path, tmp_path: Path) -> None:
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    whole = (vqgan / "vqgan.safetensors").read_bytes()
    (tmp_path / "vqgan.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read") as error:
        load_vision(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such", "./no", "no-such", "a/b/c"])
def test_missing_weights_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"vision.weights: {name}: no such file or folder"):
        find_weights(name)


SHAPE = "{params: {n_embed: 3, embed_dim: 3, ddconfig: {ch: 32, ch_mult: [1], z_channels: 3, resolution: 8, num_res_blocks: 1}}}"


@pytest.mark.parametrize(
    ("yaml", "needed"),
    [
        ("model: 3", "expected a VQGAN's YAML"),
        ("{", "expected a VQGAN's YAML"),
        ("model: {params: {n_embed: 3}}", "model.params.embed_dim: Field required"),
        ("model: " + SHAPE.replace("ch: 32", "ch: 20"), "ddconfig.ch: .*multiple of 32"),
        ("model: " + SHAPE.replace("ch: 32", "ch: 32, attn_resolutions: [8]"), "ddconfig.attn_resolutions: "),
    ],
)
def test_a_bad_yaml_is_named(tmp_path: Path, yaml: str, needed: str) -> None:
    (tmp_path / "vqgan.safetensors").write_bytes(b"")
    (tmp_path / "vqgan.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=needed) as error:
        find_weights(str(tmp_path))
    assert str(tmp_path / "vqgan.yaml") in str(error.value)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it needs vqgan.yaml and vqgan.ckpt"):
        find_weights(str(tmp_path))
