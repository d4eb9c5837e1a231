"""Export a trained model as a folder of Hugging Face's layout.

transformers' class of the decoder's family and this program load it to the same logits.

config.json            of the family, with a mark of ours (`unitoken`); generation_config.json
model*.safetensors     model.*, lm_head.*; model.vqmodel.* if both decoder and image tokenizer are Chameleon's
tokenizer*             if `codec` names a tokenizer: with the tokens that it lacked
tower/                 config.json, model.safetensors (vit.*, adapter.*) and preprocessor_config.json of the
                       tower; beside the decoder's other programs would take them for parts of their class
README.md              the model card
vocabulary.json, pictures.json, stage.yaml

The folder is written aside and renamed: a folder of its name is complete. Weights are read and written one
tensor at a time, so that exporting a model of any size takes little more memory than its largest tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from unitoken.codec.image_tokenizer.files import Weights, find_image_tokenizer, hash_tensors
from unitoken.common.cli import report, warn
from unitoken.common.files import AsideFolder
from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import VOCABULARY, Manifest
from unitoken.train.check_tokenizers import (
    check_image_tokenizer,
    load_checked_tokenizer,
    read_local_manifests,
)
from unitoken.train.checkpoint.compatibility import CompleteMetadata, read_complete_metadata
from unitoken.train.checkpoint.integrity import check_checkpoint, compute_digests
from unitoken.train.checkpoint.locations import (
    CONFIG,
    TOWER,
    find_origin,
    is_checkpoint,
    latest_checkpoint,
    read_mark,
    step_of,
)
from unitoken.train.checkpoint.metadata import PICTURES, STAGE, ModelSizes, dump_stage, with_absolute_paths
from unitoken.train.checkpoint.tensor_file import in_order, write_tensors
from unitoken.train.checkpoint.tensors import (
    Tensors,
    TensorSource,
    check_shapes,
    drop_tied_head,
    fit_norms,
    parameter_shapes,
)
from unitoken.train.config import ModelConfig, StageConfig
from unitoken.train.export.config import (
    check_exportable,
    generation_config,
    model_config,
    prepare_tokenizer,
    preprocessor_config,
    tower_config,
)
from unitoken.train.export.model_card import model_card
from unitoken.train.export.target import CARD, check_export_target
from unitoken.train.model.unitoken import build_model
from unitoken.train.run import run_folder
from unitoken.train.run.bucket import working_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_SHARD_BYTES = 5_000_000_000
VQ = "model.vqmodel."
TOWER_PARTS = ("vit.", "adapter.")


def export_at_end(config: StageConfig, manifests: Sequence[Manifest]) -> None:
    """Export the last checkpoint of a finished stage to `save.export`, on the first rank.

    Nothing is done if that very checkpoint is exported already, so the same command completes an export that
    was killed. Checkpoints are compared by id, as another run may have ended at the same step.
    """
    if config.save.export is None:
        return
    checkpoint = latest_checkpoint(working_folder(config))
    assert checkpoint is not None, "a finished run has a checkpoint"
    out = Path(config.save.export)
    identity = run_folder.checkpoint_id(checkpoint)
    if identity is None or (read_mark(out) or {}).get("checkpoint") != identity:
        by_stream = dict(zip(config.data.streams, manifests, strict=True))
        export_model(str(checkpoint), out, stage=config, manifests=by_stream)
        report(f"{config.name}: exported to {out}")


def export_model(
    source: str,
    out: Path,
    dtype: Literal["bf16", "fp32"] = "bf16",
    stage: StageConfig | None = None,
    manifests: Mapping[str, Manifest] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Export a model to a folder, which may hold an earlier export.

    Args:
        source: the model: anything that `init_from` takes.
        out: the folder to write or replace.
        dtype: of the tensors.
        stage: supplies the metadata that is missing beside the source, and the tokenizers; None reads it from
            there.
        manifests: of the datasets that the model was trained on, by the name of their stream; None reads
            those that are on this machine.
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
    check_exportable(metadata.sizes.decoder, str(origin))
    if is_checkpoint(origin):
        check_checkpoint(origin)
    weights = _in_transformers_layout(run_folder.open_weights(origin), metadata.sizes)
    if manifests is None:
        manifests = read_local_manifests(metadata.stage.data) if metadata.stage else {}
    tokenizer = _prepared_tokenizer(metadata)
    image_tokenizer = _find_image_tokenizer(metadata, manifests)

    out.parent.mkdir(parents=True, exist_ok=True)
    with AsideFolder(out) as folder:
        _write_weights(folder.path, weights, image_tokenizer, DTYPES[dtype], max_shard_bytes)
        _write_metadata(folder.path, metadata, tokenizer)
        fields = model_config(metadata, tokenizer, image_tokenizer, dtype)
        card = model_card(metadata, manifests, out.name, dtype)
        noted = _origin_fields(origin) | _image_tokenizer_field(folder.path, image_tokenizer)
        mark = {"vocabulary": metadata.vocabulary.fingerprint, **noted}
        _mark(folder.path, fields, card, mark)
        _publish(folder, out)
    if tokenizer is None:
        report(f"{out}: without tokenizer and image tokenizer: set codec.tokenizer and codec.vision.weights")


def _prepared_tokenizer(metadata: CompleteMetadata) -> Any:
    """Return the stage's text tokenizer with all tokens of the vocabulary; None if the stage names none."""
    codec = metadata.stage.codec if metadata.stage else None
    if codec is None:
        return None
    tokenizer = load_checked_tokenizer(codec, metadata.vocabulary)
    prepare_tokenizer(tokenizer, metadata.vocabulary)
    return tokenizer


def _mark(folder: Path, fields: dict[str, Any], card: str, mark: dict[str, Any]) -> None:
    """Write config.json with the mark of a complete export, and the model card.

    The card is the user's to complete, so it is neither among `files` nor among `sha256`.
    """
    files = sorted([CONFIG, *(path.name for path in folder.iterdir())])
    digests = compute_digests(folder, fields)
    (folder / CARD).write_text(card, encoding="utf-8")
    mark = {**mark, "files": files, "sha256": digests, "card": sha256_of_file(folder / CARD)}
    _write_json(folder / CONFIG, {**fields, "unitoken": mark})


def _origin_fields(origin: Path) -> dict[str, Any]:
    """Return the mark's fields about the exported checkpoint, which `export_at_end` compares."""
    if not is_checkpoint(origin):
        return {}
    return {"step": step_of(origin), "checkpoint": run_folder.checkpoint_id(origin)}


def _image_tokenizer_field(folder: Path, weights: Weights | None) -> dict[str, Any]:
    """Return the mark's field by which data made with the export counts as made with the original weights."""
    if weights is None:
        return {}
    return {"image_tokenizer": {"fingerprint": weights.fingerprint, "tensors": hash_tensors(folder)}}


def _find_image_tokenizer(metadata: CompleteMetadata, manifests: Mapping[str, Manifest]) -> Weights | None:
    """Return the stage's image tokenizer if transformers' class of the model has a place for it.

    That is Chameleon's; others stay in a folder of their own, which is only compared with the data.
    """
    stage = metadata.stage
    if stage is None or stage.codec is None:
        return None
    weights = find_image_tokenizer(stage.codec.vision)
    for warning in check_image_tokenizer(stage.codec, weights, metadata.vocabulary, manifests.values()):
        warn(warning)
    is_chameleon = stage.codec.vision.kind == metadata.sizes.decoder.family == "chameleon"
    return weights if is_chameleon else None


def _write_weights(
    folder: Path, weights: TensorSource, image_tokenizer: Weights | None, dtype: torch.dtype, shard: int
) -> None:
    """Write the decoder and what belongs to its class, and the tower and its adapter beside it."""
    decoder = _part(weights, lambda name: not name.startswith(TOWER_PARTS))
    if image_tokenizer is not None:
        decoder = _add_image_tokenizer(decoder, image_tokenizer)
    _write_tensors(folder, decoder, dtype, shard)
    tower = _part(weights, lambda name: name.startswith(TOWER_PARTS))
    if tower.shapes:
        (folder / TOWER).mkdir()
        _write_tensors(folder / TOWER, tower, dtype, shard)


def _part(source: TensorSource, is_in: Callable[[str], bool]) -> TensorSource:
    return source._replace(shapes={name: shape for name, shape in source.shapes.items() if is_in(name)})


def _write_metadata(folder: Path, metadata: CompleteMetadata, tokenizer: Any) -> None:
    """Write all files of the export but config.json, the model card and the tensors."""
    if metadata.sizes.vision is not None:
        _write_json(folder / TOWER / CONFIG, tower_config(metadata.sizes.vision))
        _write_json(folder / TOWER / "preprocessor_config.json", preprocessor_config(metadata.sizes.vision))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _write_json(folder / "generation_config.json", generation_config(metadata.vocabulary, tokenizer))
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
    """Convert Chameleon's norms of queries and keys to a row for each head, and check the shapes of all."""
    decoder = sizes.decoder
    if decoder.family == "chameleon":
        decoder = decoder.model_copy(update={"qk_norm": "layer_per_head"})
    model = build_model(decoder, sizes.vision, ModelConfig(decoder=decoder, vision=sizes.vision))
    expected = parameter_shapes(model)
    fitted = drop_tied_head(fit_norms(source, expected), expected)
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
        layout = {name: (dtypes[name], source.shapes[name]) for name in names}
        tensors = ((name, source.read([name])[name].to(dtypes[name])) for name in in_order(layout))
        write_tensors(folder / file, layout, tensors)
    if shards.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shards.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
