"""A trained model as a folder of Hugging Face's layout, which transformers' Chameleon and this program load to the same logits.

config.json            Chameleon's, with the tower's sizes (`vision_config`) and a mark of ours (`unitoken`)
model*.safetensors     model.*, lm_head.*, vit.*, adapter.*; and model.vqmodel.* where the stage's `codec` names a Chameleon VQGAN
tokenizer*.json        where `codec` names a tokenizer
tower/                 preprocessor_config.json of the tower: beside config.json transformers takes it for Chameleon's
vocabulary.json, pictures.json, stage.yaml

The folder is written aside and renamed: what bears its name is whole. Weights pass one file at a time, so that a model of any
size takes 15 GB of memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from unitoken.codec.image_tokenizer.files import Parameters, Weights, find_image_tokenizer
from unitoken.common.files import AsideFolder
from unitoken.dataset.manifest import VOCABULARY, Manifest
from unitoken.dataset.vocabulary import Vocabulary, image_code_name
from unitoken.train.check_tokenizers import check_image_tokenizer, checked_tokenizer, manifests_here
from unitoken.train.checkpoint import run_folder
from unitoken.train.checkpoint.compatibility import read_whole
from unitoken.train.checkpoint.export_mark import check_target, mark_of
from unitoken.train.checkpoint.integrity import check_checkpoint, digests
from unitoken.train.checkpoint.layouts import CONFIG, find_origin, latest_checkpoint
from unitoken.train.checkpoint.loading import shapes_of
from unitoken.train.checkpoint.metadata import PICTURES, STAGE, ModelSizes, dump_stage, found_anywhere
from unitoken.train.checkpoint.tensors import Tensors, TensorSource, check_shapes, fit_norms
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig, VisionTowerConfig
from unitoken.train.model.unitoken import build_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 5_000_000_000
VQ = "model.vqmodel."
TOWER = "tower"
IMAGE_NAMES = (
    "<image>",
    "<reserved08707>",
)  # what transformers writes where an image will be: its name there, and Chameleon's


def export_at_end(config: StageConfig, manifests: Sequence[Manifest]) -> None:
    """What `save.export` asks for, on the first rank; where a run was killed before, the same command again does it.

    Nothing where that very checkpoint is exported already: another run may have ended at the same step.
    """
    if config.save.export is None:
        return
    checkpoint = latest_checkpoint(Path(config.save.folder))
    assert checkpoint is not None, "a run that ends has saved"
    out = Path(config.save.export)
    wanted = run_folder.id_of(checkpoint)
    if wanted is None or (mark_of(out) or {}).get("checkpoint") != wanted:
        export_model(str(checkpoint), out, stage=config, manifests=manifests)
        print(f"{config.name}: exported to {out}", flush=True)


def _origin_fields(origin: Path) -> dict[str, Any]:
    """Which checkpoint it is, for `export_at_end`."""
    if origin.is_dir():
        return {}
    return {"step": run_folder.step_of(origin), "checkpoint": run_folder.id_of(origin)}


def export_model(
    source: str,
    out: Path,
    dtype: Literal["bf16", "fp32"] = "bf16",
    stage: StageConfig | None = None,
    manifests: Sequence[Manifest] | None = None,
) -> None:
    """Write the model in `source` (anything that `init_from` takes) to the folder `out`, or in the place of an exported one there.

    `stage` says what the source's folder does not say itself, and where the tokenizers are; `manifests` are those of the datasets
    it was trained on, where they are open already.

    Raises:
        ConfigError: no checkpoint, one that does not fit its own settings, or `out` is or holds something else.
    """
    check_target(out)
    out = out.resolve()  # a link stays one
    _settle(out)
    origin = find_origin(source)
    whole = read_whole(origin, stage)
    if origin.is_file():
        check_checkpoint(origin)
    weights = _in_transformers_layout(run_folder.open_source(origin), whole.sizes)
    codec = whole.stage.codec if whole.stage else None
    tokenizer = checked_tokenizer(codec, whole.vocabulary) if codec else None
    image_tokenizer = (
        find_image_tokenizer(codec.vision) if codec and codec.vision.kind == "chameleon" else None
    )
    if codec is not None and whole.stage is not None and image_tokenizer is not None:
        if manifests is None:
            manifests = manifests_here(whole.stage.data)
        for odd in check_image_tokenizer(codec, image_tokenizer, whole.vocabulary, manifests):
            print(f"warning: {odd}", flush=True)
        weights = _with_image_tokenizer(weights, image_tokenizer)

    out.parent.mkdir(parents=True, exist_ok=True)
    with AsideFolder(out) as folder:
        _write_tensors(folder.path, weights, DTYPES[dtype])
        if whole.sizes.vision is not None:
            (folder.path / TOWER).mkdir()
            _write_json(folder.path / TOWER / "preprocessor_config.json", _preprocessor(whole.sizes.vision))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder.path)
        if whole.stage is not None:
            (folder.path / STAGE).write_bytes(dump_stage(found_anywhere(whole.stage)))
        if whole.pictures is not None:
            _write_json(folder.path / PICTURES, whole.pictures.model_dump())
        whole.vocabulary.save(folder.path / VOCABULARY)
        files = sorted([CONFIG, *(path.name for path in folder.path.iterdir())])
        fields = {
            **_config(whole.sizes, whole.vocabulary, tokenizer),
            **({"vq_config": _vq_config(image_tokenizer)} if image_tokenizer else {}),
            "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        }
        mark = {"vocabulary": whole.vocabulary.fingerprint, **_origin_fields(origin), "files": files}
        fields["unitoken"] = {**mark, "sha256": digests(folder.path, fields)}
        _write_json(folder.path / CONFIG, fields)
        _publish(folder, out)
    if codec is None:
        print(
            f"{out}: without tokenizer and image tokenizer: set codec.tokenizer and codec.vision.weights",
            flush=True,
        )


def _publish(folder: AsideFolder, out: Path) -> None:
    """Give the folder its name; a model that bears it steps aside, and comes back if that fails.

    What takes a while is done before: between the two renames a kill would leave no model of that name, until `_settle`.
    """
    folder.sync()
    if out.exists():
        out.rename(_before(out))
    try:
        folder.publish()
    finally:
        _settle(out)


def _settle(out: Path) -> None:
    """The model that stepped aside comes back where no new one took its place, and else goes."""
    before = _before(out)
    if before.exists() and not out.exists():
        before.rename(out)
    shutil.rmtree(before, ignore_errors=True)


def _before(out: Path) -> Path:
    return out.with_name(f".before-{out.name}")


def _in_transformers_layout(source: TensorSource, sizes: ModelSizes) -> TensorSource:
    """With a row a head in the norms of queries and keys, as transformers builds them; checked against the model's sizes."""
    decoder = sizes.decoder.model_copy(update={"qk_norm": "per_head"})
    expected = shapes_of(
        build_model(decoder, sizes.vision, ModelConfig(decoder=decoder, vision=sizes.vision))
    )
    fitted = fit_norms(source, expected)
    check_shapes(fitted.shapes, expected, source.where)
    return fitted


def _with_image_tokenizer(source: TensorSource, found: Weights) -> TensorSource:
    """And encoder and codebook of the VQGAN, which transformers keeps inside its Chameleon; its decoder has no place there."""
    from unitoken.codec.image_tokenizer.network import load_network

    state: Tensors = load_network("chameleon", found).state_dict()
    kept = {f"{VQ}{name}": tensor for name, tensor in state.items() if not name.startswith("decoder.")}

    def read(names: Collection[str]) -> Tensors:
        return source.read([name for name in names if name not in kept]) | {
            name: kept[name] for name in names if name in kept
        }

    return TensorSource(
        source.where, source.shapes | {name: tuple(tensor.shape) for name, tensor in kept.items()}, read
    )


def _write_tensors(folder: Path, source: TensorSource, dtype: torch.dtype) -> None:
    """`model.safetensors`, or several files and their index. The image tokenizer stays in float32: less precision, other codes."""
    dtypes = {name: torch.float32 if name.startswith(VQ) else dtype for name in source.shapes}
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in source.shapes.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + size > SHARD_BYTES:
            files.append([])
        files[-1].append(name)
    paths = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    if len(files) == 1:
        paths = ["model.safetensors"]
    for path, names in zip(paths, files, strict=True):
        tensors = {name: tensor.to(dtypes[name]).contiguous() for name, tensor in source.read(names).items()}
        (folder / path).touch()
        mode = (folder / path).stat().st_mode
        save_file(tensors, folder / path, metadata={"format": "pt"})
        (folder / path).chmod(mode)  # as of any file here: safetensors leaves one that nobody else may read
    if len(files) > 1:
        places = {name: path for path, names in zip(paths, files, strict=True) for name in names}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places},
        )


def _config(sizes: ModelSizes, vocabulary: Vocabulary, tokenizer: Any) -> dict[str, Any]:
    """Transformers' ChameleonConfig. It keeps `qk_norm`, which says that the rows of a norm are one, and `vision_config` unread."""
    names = {image_code_name(code): token for code, token in enumerate(vocabulary.image_ids)}
    ids = tokenizer.get_vocab() if tokenizer is not None else {}
    image = next((ids[name] for name in IMAGE_NAMES if name in ids), None)
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        **_decoder_fields(sizes.decoder),
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.end_of_turn,
        "vocabulary_map": names | ({} if image is None else {"<image>": image}),
        "vq_config": {
            "num_embeddings": len(vocabulary.image_ids)
        },  # where nobody names the image tokenizer, it is a random one
        **({} if sizes.vision is None else {"vision_config": _vision_fields(sizes.vision)}),
    }


def _decoder_fields(decoder: DecoderConfig) -> dict[str, Any]:
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    return {**decoder.model_dump(), "num_key_value_heads": decoder.kv_heads, **fixed}


def _vision_fields(vision: VisionTowerConfig) -> dict[str, Any]:
    fixed = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    return {**fixed, **vision.model_dump()}


def _vq_config(weights: Weights) -> dict[str, Any]:
    """A VQGAN's YAML in transformers' words."""
    from unitoken.codec.image_tokenizer.chameleon import shape_of

    assert isinstance(weights.shape, Parameters), "asked for a VQGAN of Chameleon's only"
    return shape_of(weights.shape)


def _preprocessor(vision: VisionTowerConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
