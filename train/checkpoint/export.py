"""Export a trained model as a folder of Hugging Face's layout.

transformers' Chameleon and this program load it to the same logits.

config.json            Chameleon's, with the tower's sizes (`vision_config`) and a mark of ours (`unitoken`)
model*.safetensors     model.*, lm_head.*, vit.*, adapter.*; model.vqmodel.* if `codec` names Chameleon's
tokenizer*.json        if `codec` names a tokenizer
tower/                 preprocessor_config.json of the tower; beside config.json transformers would take it
                       for Chameleon's
vocabulary.json, pictures.json, stage.yaml

The folder is written aside and renamed: a folder of its name is complete. Weights are read and written one
file at a time, so that exporting a model of any size takes 15 GB of memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from unitoken.codec.image_tokenizer.files import Parameters, Weights, find_image_tokenizer, hash_tensors
from unitoken.common.cli import report, warn
from unitoken.common.errors import ConfigError
from unitoken.common.files import AsideFolder
from unitoken.dataset.manifest import VOCABULARY, Manifest
from unitoken.dataset.vocabulary import Vocabulary, image_code_name
from unitoken.train.check_tokenizers import (
    check_image_tokenizer,
    load_checked_tokenizer,
    read_local_manifests,
)
from unitoken.train.checkpoint import run_folder
from unitoken.train.checkpoint.compatibility import CompleteMetadata, read_complete_metadata
from unitoken.train.checkpoint.export_mark import check_export_target, read_mark
from unitoken.train.checkpoint.integrity import check_checkpoint, compute_digests
from unitoken.train.checkpoint.locations import CONFIG, find_origin, latest_checkpoint
from unitoken.train.checkpoint.metadata import PICTURES, STAGE, ModelSizes, dump_stage, with_absolute_paths
from unitoken.train.checkpoint.tensors import (
    Tensors,
    TensorSource,
    check_shapes,
    fit_norms,
    parameter_shapes,
)
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig, VisionTowerConfig
from unitoken.train.model.unitoken import build_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_SHARD_BYTES = 5_000_000_000
VQ = "model.vqmodel."
TOWER = "tower"
# The token that transformers writes where an image will be: by its own name, and by Chameleon's.
IMAGE_NAMES = ("<image>", "<reserved08707>")


def export_at_end(config: StageConfig, manifests: Sequence[Manifest]) -> None:
    """Export the last checkpoint of a finished stage to `save.export`, on the first rank.

    Nothing is done if that very checkpoint is exported already, so the same command completes an export that
    was killed. Checkpoints are compared by id, as another run may have ended at the same step.
    """
    if config.save.export is None:
        return
    checkpoint = latest_checkpoint(Path(config.save.folder))
    assert checkpoint is not None, "a finished run has a checkpoint"
    out = Path(config.save.export)
    identity = run_folder.checkpoint_id(checkpoint)
    if identity is None or (read_mark(out) or {}).get("checkpoint") != identity:
        export_model(str(checkpoint), out, stage=config, manifests=manifests)
        report(f"{config.name}: exported to {out}")


def export_model(
    source: str,
    out: Path,
    dtype: Literal["bf16", "fp32"] = "bf16",
    stage: StageConfig | None = None,
    manifests: Sequence[Manifest] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Export a model to a folder, which may hold an earlier export.

    Args:
        source: the model: anything that `init_from` takes.
        out: the folder to write or replace.
        dtype: of the tensors.
        stage: supplies the metadata that is missing beside the source, and the tokenizers; None reads it from
            there.
        manifests: of the datasets that the model was trained on; None reads those that are on this machine.
        max_shard_bytes: the largest size of a safetensors file with more than one tensor.

    Raises:
        ConfigError: no checkpoint, one that does not fit its own settings, or `out` is or holds something
            else.
    """
    check_export_target(out)
    out = out.resolve()  # so that a link stays a link
    _restore_previous(out)
    origin = find_origin(source)
    metadata = read_complete_metadata(origin, stage)
    _check_family(origin, metadata.sizes.decoder)
    if origin.is_file():
        check_checkpoint(origin)
    weights = _in_transformers_layout(run_folder.open_weights(origin), metadata.sizes)
    codec = metadata.stage.codec if metadata.stage else None
    tokenizer = load_checked_tokenizer(codec, metadata.vocabulary) if codec else None
    image_tokenizer = _find_image_tokenizer(metadata, manifests)
    if image_tokenizer is not None:
        weights = _add_image_tokenizer(weights, image_tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with AsideFolder(out) as folder:
        _write_tensors(folder.path, weights, DTYPES[dtype], max_shard_bytes)
        _write_metadata(folder.path, metadata, tokenizer)
        fields = _config(metadata, tokenizer, image_tokenizer, DTYPES[dtype])
        files = sorted([CONFIG, *(path.name for path in folder.path.iterdir())])
        noted = _origin_fields(origin) | _image_tokenizer_field(folder.path, image_tokenizer)
        mark = {"vocabulary": metadata.vocabulary.fingerprint, **noted, "files": files}
        fields["unitoken"] = {**mark, "sha256": compute_digests(folder.path, fields)}
        _write_json(folder.path / CONFIG, fields)
        _publish(folder, out)
    if codec is None:
        report(f"{out}: without tokenizer and image tokenizer: set codec.tokenizer and codec.vision.weights")


def _check_family(origin: Path, decoder: DecoderConfig) -> None:
    """Raise ConfigError for a decoder that is not Chameleon's, whose layout is not written yet."""
    if decoder.family != "chameleon" or decoder.tie_word_embeddings or decoder.rope_scaling:
        raise ConfigError(f"{origin}: a {decoder.family} decoder is not exported yet, only Chameleon's is")


def _origin_fields(origin: Path) -> dict[str, Any]:
    """Return the mark's fields about the exported checkpoint, which `export_at_end` compares."""
    if origin.is_dir():
        return {}
    return {"step": run_folder.step_of(origin), "checkpoint": run_folder.checkpoint_id(origin)}


def _image_tokenizer_field(folder: Path, weights: Weights | None) -> dict[str, Any]:
    """Return the mark's field by which data made with the export counts as made with the original weights."""
    if weights is None:
        return {}
    return {"image_tokenizer": {"fingerprint": weights.fingerprint, "tensors": hash_tensors(folder)}}


def _find_image_tokenizer(metadata: CompleteMetadata, manifests: Sequence[Manifest] | None) -> Weights | None:
    """Return the stage's image tokenizer if it is Chameleon's VQGAN, which the folder can hold."""
    stage = metadata.stage
    if stage is None or stage.codec is None or stage.codec.vision.kind != "chameleon":
        return None
    weights = find_image_tokenizer(stage.codec.vision)
    if manifests is None:
        manifests = read_local_manifests(stage.data)
    for warning in check_image_tokenizer(stage.codec, weights, metadata.vocabulary, manifests):
        warn(warning)
    return weights


def _write_metadata(folder: Path, metadata: CompleteMetadata, tokenizer: Any) -> None:
    """Write all files of the export but config.json and the tensors."""
    if metadata.sizes.vision is not None:
        (folder / TOWER).mkdir()
        _write_json(folder / TOWER / "preprocessor_config.json", _preprocessor(metadata.sizes.vision))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if metadata.stage is not None:
        (folder / STAGE).write_bytes(dump_stage(with_absolute_paths(metadata.stage)))
    if metadata.pictures is not None:
        _write_json(folder / PICTURES, metadata.pictures.model_dump())
    metadata.vocabulary.save(folder / VOCABULARY)


def _publish(folder: AsideFolder, out: Path) -> None:
    """Rename the folder to `out`; a model of that name steps aside, and comes back if that fails.

    Everything slow is done before: a kill between the two renames leaves no model of that name until
    `_restore_previous` runs.
    """
    folder.sync()
    if out.exists():
        out.rename(_previous(out))
    try:
        folder.publish()
    finally:
        _restore_previous(out)


def _restore_previous(out: Path) -> None:
    """Bring back the model that stepped aside if no new one took its place; otherwise remove it."""
    previous = _previous(out)
    if previous.exists() and not out.exists():
        previous.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(out: Path) -> Path:
    return out.with_name(f".before-{out.name}")


def _in_transformers_layout(source: TensorSource, sizes: ModelSizes) -> TensorSource:
    """Convert query and key norms to transformers' row for each head, and check the shapes of all weights."""
    decoder = sizes.decoder.model_copy(update={"qk_norm": "layer_per_head"})
    model = build_model(decoder, sizes.vision, ModelConfig(decoder=decoder, vision=sizes.vision))
    expected = parameter_shapes(model)
    fitted = fit_norms(source, expected)
    check_shapes(fitted.shapes, expected, source.where)
    return fitted


def _add_image_tokenizer(source: TensorSource, weights: Weights) -> TensorSource:
    """Add the VQGAN's encoder and codebook; transformers' Chameleon has no place for its decoder."""
    from unitoken.codec.image_tokenizer.network import load_network

    state: Tensors = load_network("chameleon", weights).state_dict()
    added = {f"{VQ}{name}": tensor for name, tensor in state.items() if not name.startswith("decoder.")}

    def read(names: Collection[str]) -> Tensors:
        tensors = source.read([name for name in names if name not in added])
        return tensors | {name: added[name] for name in names if name in added}

    added_shapes = {name: tuple(tensor.shape) for name, tensor in added.items()}
    return TensorSource(source.where, source.shapes | added_shapes, read)


def _write_tensors(folder: Path, source: TensorSource, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or several shards and their index.

    The image tokenizer stays in float32, as a lower precision would give other codes.
    """
    dtypes = {name: torch.float32 if name.startswith(VQ) else dtype for name in source.shapes}
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in source.shapes.items()}
    shards = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        tensors = {name: tensor.to(dtypes[name]).contiguous() for name, tensor in source.read(names).items()}
        path = folder / file
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # that of a new file: safetensors' own can be read by its owner only
    if shards.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shards.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _config(
    metadata: CompleteMetadata, tokenizer: Any, image_tokenizer: Weights | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the fields of transformers' ChameleonConfig.

    Transformers ignores two of them: `qk_norm`, which says that the rows of a norm are equal, and
    `vision_config`.
    """
    sizes, vocabulary = metadata.sizes, metadata.vocabulary
    fields = {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        **_decoder_fields(sizes.decoder),
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.end_of_turn,
        "vocabulary_map": _vocabulary_map(vocabulary, tokenizer),
        # Without image tokenizer transformers makes a random one of this size.
        "vq_config": {"num_embeddings": len(vocabulary.image_ids)},
    }
    if sizes.vision is not None:
        fields["vision_config"] = _vision_fields(sizes.vision)
    if image_tokenizer is not None:
        fields["vq_config"] = _vq_config(image_tokenizer)
    return {**fields, "dtype": str(dtype).removeprefix("torch.")}


def _vocabulary_map(vocabulary: Vocabulary, tokenizer: Any) -> dict[str, int]:
    """Return the ids of the image codes and, if the tokenizer has it, of the image's placeholder."""
    names = {image_code_name(code): token for code, token in enumerate(vocabulary.image_ids)}
    ids = tokenizer.get_vocab() if tokenizer is not None else {}
    placeholders = [ids[name] for name in IMAGE_NAMES if name in ids]
    return {**names, "<image>": placeholders[0]} if placeholders else names


def _decoder_fields(decoder: DecoderConfig) -> dict[str, Any]:
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    return {**decoder.model_dump(exclude_none=True), "num_key_value_heads": decoder.kv_heads, **fixed}


def _vision_fields(vision: VisionTowerConfig) -> dict[str, Any]:
    fixed = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    return {**fixed, **vision.model_dump()}


def _vq_config(weights: Weights) -> dict[str, Any]:
    """Return the settings of a Chameleon VQGAN under transformers' names."""
    from unitoken.codec.image_tokenizer.chameleon import shape_of

    assert isinstance(weights.shape, Parameters), "only a Chameleon VQGAN is exported"
    return shape_of(weights.shape)


def _preprocessor(vision: VisionTowerConfig) -> dict[str, Any]:
    """Return the settings of transformers' SiglipImageProcessor."""
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
