"""Finding an image tokenizer's files: which are accepted, and the errors for all others."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from support.tokenizing import encoder_alone, tiny_transformers, tiny_vqgan, vision_config, whole_model
from unitoken.codec.image_tokenizer.convert_vqgan import convert_vqgan
from unitoken.codec.image_tokenizer.encoder import VisionCodec, load_vision
from unitoken.codec.image_tokenizer.files import Weights, hash_tensors
from unitoken.codec.image_tokenizer.files import find_image_tokenizer as find
from unitoken.common.errors import ConfigError
from unitoken.tokenize.__main__ import app


def load_vision_of(folder: Path) -> VisionCodec:
    return load_vision(vision_config(folder))


def find_weights(folder: Path | str, kind: str = "chameleon") -> Weights:
    return find(vision_config(folder, kind=kind))


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 24, 3), np.uint8)


def test_single_files_and_checkpoints_of_taming_are_read(vqgan: Path, tmp_path: Path) -> None:
    expected = load_vision_of(vqgan).encode(pixels(1))
    state = load_file(vqgan / "vqgan.safetensors")
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    torch.save(
        {"state_dict": state | {"loss.discriminator.weight": torch.zeros(3)}, "epoch": 3},
        tmp_path / "vqgan.ckpt",
    )
    assert (load_vision_of(tmp_path).encode(pixels(1)) == expected).all()
    assert (load_vision_of(vqgan / "vqgan.safetensors").encode(pixels(1)) == expected).all()


def test_other_weights_have_another_fingerprint(vqgan: Path, tmp_path: Path) -> None:
    other = tiny_vqgan(tmp_path / "other", seed=1)
    assert find_weights(vqgan).fingerprint != find_weights(other).fingerprint
    assert find_weights(vqgan).fingerprint == find_weights(vqgan / "vqgan.safetensors").fingerprint


def taming(vqgan: Path, folder: Path, **more: Any) -> Path:
    """Write Meta's own layout: vqgan.ckpt, which also holds tensors of its training."""
    folder.mkdir()
    (folder / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    state = load_file(vqgan / "vqgan.safetensors") | {"loss.discriminator.weight": torch.zeros(3)}
    torch.save({"state_dict": state | more, "epoch": 3}, folder / "vqgan.ckpt")
    return folder


def test_a_converted_checkpoint_keeps_codes_and_fingerprint(vqgan: Path, tmp_path: Path) -> None:
    folder, out = taming(vqgan, tmp_path / "meta"), tmp_path / "new" / "converted"
    done = CliRunner().invoke(app, ["convert-vqgan", str(folder), str(out)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"vqgan.yaml", "vqgan.safetensors"}
    pickled, converted = load_vision_of(folder), load_vision_of(out)
    assert (converted.encode(pixels(2)) == pickled.encode(pixels(2))).all()
    codes = pickled.encode(pixels(2))
    assert (converted.decode(codes) == pickled.decode(codes)).all()
    assert find_weights(out).fingerprint == find_weights(folder).fingerprint
    assert converted.fingerprint in done.output


def test_a_changed_converted_file_has_its_own_fingerprint(vqgan: Path, tmp_path: Path) -> None:
    folder = taming(vqgan, tmp_path / "meta")
    convert_vqgan(folder, tmp_path / "out")
    path = tmp_path / "out" / "vqgan.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert find_weights(tmp_path / "out").fingerprint != find_weights(folder).fingerprint


def test_a_failed_conversion_is_one_line_and_leaves_no_files(vqgan: Path, tmp_path: Path) -> None:
    folder = taming(vqgan, tmp_path / "meta")
    with pytest.raises(ConfigError, match="it is there already"):
        convert_vqgan(folder, folder)
    with pytest.raises(ConfigError, match=r"no vqgan\.ckpt in it"):
        convert_vqgan(vqgan, tmp_path / "out")
    (folder / "vqgan.ckpt").write_bytes(pickle.dumps({"state_dict": _Evil()}))
    with pytest.raises(ConfigError, match="cannot be read"):
        convert_vqgan(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"unknown encoder\.new"):
        convert_vqgan(taming(vqgan, tmp_path / "more", **{"encoder.new": torch.zeros(1)}), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "more"]


def changed(vqgan: Path, folder: Path, **changes: torch.Tensor | None) -> str:
    """Write a copy in which tensors are replaced or left out; their names have `__` for `.`."""
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
    folder = changed(
        vqgan, tmp_path, quant_conv__bias=None, quantize__embedding__weight=zero, encoder__new=zero.clone()
    )
    with pytest.raises(ConfigError) as error:
        load_vision_of(Path(folder))
    message = str(error.value)
    assert "missing quant_conv.bias" in message
    assert "unknown encoder.new" in message
    assert "quantize.embedding.weight is [3], the .yaml says [64, 4]" in message


def test_many_problems_are_shortened(tmp_path: Path, vqgan: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "vqgan.safetensors")
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    with pytest.raises(ConfigError, match=r"and \d+ more$") as error:
        load_vision_of(tmp_path)
    assert len(str(error.value)) < 1000


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code in a checkpoint ran')",))


def test_no_code_in_a_checkpoint_runs(vqgan: Path, tmp_path: Path) -> None:
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    (tmp_path / "vqgan.ckpt").write_bytes(pickle.dumps({"state_dict": _Evil()}))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_vision_of(tmp_path)


def test_a_cut_file_is_one_line(vqgan: Path, tmp_path: Path) -> None:
    (tmp_path / "vqgan.yaml").write_text((vqgan / "vqgan.yaml").read_text())
    whole = (vqgan / "vqgan.safetensors").read_bytes()
    (tmp_path / "vqgan.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read") as error:
        load_vision_of(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such", "./no", "no-such", "a/b/c"])
def test_missing_weights_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"vision.weights: {name}: no such file or folder"):
        find_weights(name)


SIZES = "{ch: 32, ch_mult: [1], z_channels: 3, resolution: 8, num_res_blocks: 1}"
SHAPE = f"{{params: {{n_embed: 3, embed_dim: 3, ddconfig: {SIZES}}}}}"


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
        find_weights(tmp_path)
    assert str(tmp_path / "vqgan.yaml") in str(error.value)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"kind chameleon needs vqgan.yaml and vqgan.ckpt .* found none of them"
    ):
        find_weights(tmp_path)


def test_a_folder_of_another_kind_is_one_line(vqgan: Path, tmp_path: Path) -> None:
    janus = tiny_transformers(tmp_path / "janus", "janus")
    with pytest.raises(
        ConfigError, match=r"kind chameleon needs model_type 'chameleon' or .*, found 'janus_vqgan'"
    ):
        find_weights(janus)
    with pytest.raises(ConfigError, match=r"kind janus needs config.json in it"):
        find_weights(vqgan, "janus")
    with pytest.raises(
        ConfigError, match=r"kind emu3 needs model_type 'emu3' or 'emu3_vqgan', found 'janus_vqgan'"
    ):
        find_weights(janus, "emu3")


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ("{", "not readable as JSON"),
        ("[]", "found None"),
        ('{"model_type": "emu3", "vq_config": 3}', "vq_config: expected an object, found int"),
        ('{"model_type": "emu3", "vq_config": {"codebook_size": "x"}}', "codebook_size: "),
    ],
)
def test_a_bad_config_is_named(tmp_path: Path, config: str, needed: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=needed) as error:
        find_weights(tmp_path, "emu3")
    assert str(tmp_path / "config.json") in str(error.value)


def test_missing_values_are_transformers_defaults(tmp_path: Path) -> None:
    folder = tiny_transformers(tmp_path / "emu3", "emu3")
    (folder / "config.json").write_text(json.dumps({"model_type": "emu3"}))
    found = find_weights(folder, "emu3")
    assert (found.codebook_size, found.downsampling) == (32768, 8)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_an_invalid_safetensors_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "janus"}))
    with pytest.raises(ConfigError, match=r"no \*.safetensors in it"):
        find_weights(tmp_path, "janus")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"cannot be read as safetensors|no tensor quantize.embedding.weight"
    ) as error:
        find_weights(tmp_path, "janus")
    assert "\n" not in str(error.value)


def test_a_cut_file_of_transformers_is_one_line(tmp_path: Path) -> None:
    folder = tiny_transformers(tmp_path / "janus", "janus")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_vision(vision_config(folder, kind="janus"))


# --- Chameleon in transformers' layout ----------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_both_layouts_of_chameleon_give_the_same_codes(vqgan: Path, tmp_path: Path, whole: bool) -> None:
    folder = encoder_alone(vqgan, tmp_path / "alone")
    if whole:
        folder = whole_model(folder, tmp_path / "whole", "chameleon")
    vision = load_vision_of(folder)
    assert (vision.codebook_size, vision.downsampling) == (64, 4)
    codes = vision.encode(pixels(3))
    assert len(np.unique(codes)) > 1
    assert (codes == load_vision_of(vqgan).encode(pixels(3))).all()
    assert (
        vision.fingerprint == find_weights(tmp_path / "alone").fingerprint != find_weights(vqgan).fingerprint
    )


def test_an_encoder_alone_decodes_nothing_and_says_so(vqgan: Path, tmp_path: Path) -> None:
    vision = load_vision_of(encoder_alone(vqgan, tmp_path / "alone"))
    with pytest.raises(
        ConfigError, match=r"^vision\.weights: .*alone has transformers' encoder .* no decoder"
    ):
        vision.decode(np.zeros((1, 4, 4), np.int64))


@pytest.mark.parametrize("place", [".", "original_tokenizers"])
def test_metas_files_are_preferred_as_they_can_draw(vqgan: Path, tmp_path: Path, place: str) -> None:
    """facebook/chameleon-7b has them in original_tokenizers/, beside transformers' files."""
    folder = encoder_alone(vqgan, tmp_path / "alone")
    (folder / place).mkdir(exist_ok=True)
    for file in vqgan.iterdir():
        (folder / place / file.name).write_bytes(file.read_bytes())
    assert find_weights(folder).has_decoder
    assert find_weights(folder).fingerprint == find_weights(vqgan).fingerprint


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"base_channels": 20}, "base_channels: .*multiple of 32"),
        ({"attn_resolutions": [8]}, "attn_resolutions: .*must be"),
        ({"attn_type": "none"}, "attn_type: "),
        ({"num_embeddings": "many"}, "num_embeddings: "),
    ],
)
def test_a_shape_that_is_not_chameleons_is_named(
    vqgan: Path, tmp_path: Path, change: dict[str, Any], needed: str
) -> None:
    path = encoder_alone(vqgan, tmp_path / "alone") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=f"{path}: {needed}"):
        find_weights(path.parent)


def test_a_model_without_its_image_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon"}))
    save_file({"lm_head.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no tensor .*model\.vqmodel\.quantize\.embedding\.weight in it"):
        find_weights(tmp_path)


def test_a_changed_export_loses_the_fingerprint_it_notes(vqgan: Path, tmp_path: Path) -> None:
    folder = encoder_alone(vqgan, tmp_path / "alone")
    own = find_weights(folder).fingerprint
    assert own == hash_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    noted = {"fingerprint": "0123456789abcdef", "tensors": own}
    for mark, expected in ((noted, noted["fingerprint"]), (noted | {"tensors": "?"}, own), ("?", own)):
        content = config | {"unitoken": {"image_tokenizer": mark}}
        (folder / "config.json").write_text(json.dumps(content))
        assert find_weights(folder).fingerprint == expected


# --- models in their authors' own layouts -------------------------------------------------------------------


def of_its_authors(folder: Path, out: Path) -> Path:
    """Rewrite Emu3's image tokenizer as in BAAI/Emu3-VisionTokenizer; its authors' code gave equal codes."""
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for rule in (
            (r"\.(down|up)_block\.", "."),
            (r"\.middle_block\.attn_norm\.", ".mid.attn_1.norm."),
            (r"\.middle_block\.", ".mid."),
            (r"\.attn_norms\.(\d)\.", r".attn.\1.norm."),
            (r"\.(\w)_proj\.", r".\1."),
            (r"\.out_proj\.", ".proj_out."),
        ):
            name = re.sub(*rule, name)
        is_projection = re.search(r"\.([qkv]|proj_out)\.weight$", name)
        state[name] = tensor[..., None, None] if is_projection else tensor
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / "model.safetensors")
    shape = json.loads((folder / "config.json").read_text())
    names = {"latent_channels": "z_channels", "base_channels": "ch", "channel_multiplier": "ch_mult"}
    content = {names.get(key, key): value for key, value in shape.items()} | {"model_type": "Emu3VisionVQ"}
    (out / "config.json").write_text(json.dumps(content))
    return out


def test_emu3_of_its_authors_gives_the_same_codes(tmp_path: Path) -> None:
    ours = tiny_transformers(tmp_path / "emu3", "emu3")
    theirs = of_its_authors(ours, tmp_path / "theirs")
    names = set(load_file(theirs / "model.safetensors"))
    assert {"encoder.down.2.attn.0.norm.weight", "decoder.mid.attn_1.proj_out.weight"} <= names
    first, second = (load_vision(vision_config(folder, kind="emu3")) for folder in (ours, theirs))
    codes = first.encode(pixels(2))
    assert (second.encode(pixels(2)) == codes).all()
    assert (second.decode(codes) == first.decode(codes)).all()
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("kind", "model_type", "needed"),
    [
        ("janus", "multi_modality", "name deepseek-community/Janus-Pro-1B, in transformers'"),
        ("emu3", "Emu3", "name BAAI/Emu3-Chat-hf, in transformers'"),
    ],
)
def test_a_model_of_its_authors_is_refused_by_name(
    tmp_path: Path, kind: str, model_type: str, needed: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        ConfigError, match=f"found '{model_type}', whose layout is its authors' own: {needed}"
    ):
        find_weights(tmp_path, kind)


def test_missing_weights_say_how_to_get_them() -> None:
    for name, command in (
        ("weights/Janus-Pro-1B", "`unitoken weights open` fetches it"),
        ("weights/Lumina-mGPT-7B-512", "`unitoken weights chameleon` fetches it"),
        ("weights/vqgan", "`unitoken convert-vqgan FOLDER weights/vqgan` converts it"),
    ):
        with pytest.raises(ConfigError, match=command):
            find_weights(name)
    with pytest.raises(ConfigError, match=r"no such file or folder; it was looked for in /"):
        find_weights("weights/other")
