"""Everything that can be found wrong with a stage before anything large is loaded; torch and Composer are not needed.

config = load_config(StageConfig, "yamls/stage1.yaml", ["optimizer.lr=5e-4"])
checked = check(config, world_size=8)
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pydantic

from unitoken.common.config import first_problem
from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.check import check_sources, check_streams_vocabulary
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import crops_of, open_sources
from unitoken.train.check_tokenizers import check_codec
from unitoken.train.checkpoint.compatibility import check_fits, compare_constants
from unitoken.train.checkpoint.export_mark import check_export_target
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.locations import checkpoint_folder, find_origin, latest_checkpoint
from unitoken.train.checkpoint.metadata import ModelSizes, PictureCrops, read_metadata
from unitoken.train.config import DecoderConfig, SaveConfig, StageConfig, VisionTowerConfig
from unitoken.train.generation.check_samples import check_samples


class ResolvedStage(NamedTuple):
    decoder: DecoderConfig
    vision: VisionTowerConfig | None
    vocabulary: Vocabulary
    pictures: PictureCrops  # how the data's were cut
    evaluation: DataConfig | None = None  # what is evaluated on
    notes: Sequence[str] = ()  # what may be meant and may be not, a line each


def check_stage(config: StageConfig, world_size: int) -> ResolvedStage:
    """Everything that can be found wrong before anything large is loaded, what is cheap to find first. Raises ConfigError."""
    _check_data(config, world_size)
    _check_ranks(config, world_size)
    _check_trainable(config)
    _check_loggers(config)
    sources = open_sources(config.data)
    manifests = [source.manifest for source in sources]
    evaluation = _evaluation_data(config)
    _check_save(config.save)
    decoder, vision = model_configs(config.model)  # of a hub id: downloaded
    views = Views(vision.image_size, vision.patch_size, config.data.anyres) if vision else None
    vocabulary = check_sources(sources, config.data, views)
    if vocabulary.size > decoder.vocab_size:
        raise ConfigError(
            f"model.decoder: it has room for {decoder.vocab_size} ids (vocab_size), the datasets' vocabulary has {vocabulary.size}"
        )
    notes = _check_origins(config, ModelSizes(decoder=decoder, vision=vision), vocabulary)
    if config.codec is not None and needs_codec(config):
        notes += check_codec(config.codec, vocabulary, manifests)
    pictures = PictureCrops(crops=crops_of(manifests))
    notes += check_samples(config, pictures)
    if evaluation is not None:
        check_streams_vocabulary(open_sources(evaluation), vocabulary, "the data that is trained on")
    return ResolvedStage(decoder, vision, vocabulary, pictures, evaluation, notes)


def needs_codec(config: StageConfig) -> bool:
    """Whether the stage itself uses the data's tokenizers, which then must be right before days of training."""
    return config.samples is not None or config.save.export is not None


def _check_save(save: SaveConfig) -> None:
    if save.export is not None:
        out = Path(save.export)
        if Path(save.folder).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"save.export: {save.export} holds the run's own folder, save.folder: {save.folder}"
            )
        check_export_target(out)
        _check_writable("save.export", out.resolve().parent)
    _check_writable("save.folder", Path(save.folder))


def _check_writable(key: str, folder: Path) -> None:
    """Makes nothing: what else is wrong with the settings should not leave a folder behind."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(f"{key}: {folder}: cannot write there: {error.strerror or error}") from None


def _check_origins(config: StageConfig, sizes: ModelSizes, vocabulary: Vocabulary) -> list[str]:
    """That the weights this stage begins with are this model's, and of the data's vocabulary; gives back what may be meant."""
    origins, notes = {}, []
    if (
        saved := latest_checkpoint(Path(config.save.folder))
    ) is not None:  # a run that resumes needs nothing else any more
        origins[f"save.folder: {config.save.folder}"] = saved
    else:
        if config.init_from is not None:
            origins[f"init_from: {config.init_from}"] = find_origin(config.init_from)
        if isinstance(config.model.decoder, str):
            origins[f"model.decoder: {config.model.decoder}"] = checkpoint_folder(config.model.decoder)
    for where, origin in origins.items():
        about = read_metadata(origin)
        if where.startswith("model.decoder"):  # its sizes are the model's, and its tower need not be used
            about = about._replace(sizes=None)
        check_fits(about, sizes, vocabulary, where)
        if (difference := compare_constants(about, sizes)) is not None:
            if saved is not None:
                raise ConfigError(f"{where}: {difference}; a run goes on with those it began with")
            notes.append(f"{where}: {difference}")
    return notes


def _check_data(config: StageConfig, world_size: int) -> None:
    data, vision = config.data, config.model.vision
    if data.global_batch % world_size:
        raise ConfigError(
            f"data.global_batch: {data.global_batch} packs can not be shared evenly by {world_size} ranks"
        )
    if vision is None and data.continuous != "none":
        raise ConfigError(
            f"data.continuous: '{data.continuous}' needs model.vision; without a vision tower it is 'none'"
        )
    if config.compat == "unitoken" and vision is not None and data.continuous != "all":
        raise ConfigError(
            f"data.continuous: compat 'unitoken' gives features to all images, found '{data.continuous}'"
        )
    if config.compat == "unitoken" and data.null_prompt_fraction:
        raise ConfigError(
            f"data.null_prompt_fraction: compat 'unitoken' leaves every prompt, found {data.null_prompt_fraction}"
        )


def _check_ranks(config: StageConfig, world_size: int) -> None:
    replicas = config.fsdp.replicas
    if world_size % replicas:
        raise ConfigError(
            f"fsdp.replicas: {world_size} ranks can not be shared evenly by {replicas} copies of the model"
        )
    if replicas > 1 and replicas == world_size:
        raise ConfigError(
            f"fsdp.replicas: {replicas} of {world_size} ranks leaves one rank a copy; nothing would be sharded"
        )
    if config.fsdp.reduce == "bf16" and config.precision == "fp32":
        raise ConfigError("fsdp.reduce: bf16 is for `precision: bf16`; gradients of fp32 are summed in fp32")
    if (
        config.activation_checkpointing == "selective"
        and config.model.attention == "flex"
        and not config.model.compile
    ):
        raise ConfigError(  # torch ignores what is compiled inside of a selective region, and flex attention must be
            "activation_checkpointing: 'selective' with model.attention 'flex' needs model.compile; or take 'full', or 'sdpa'"
        )


def _check_trainable(config: StageConfig) -> None:
    parts = ["model", "lm_head"] + (["vit", "adapter"] if config.model.vision is not None else [])
    for name in config.trainable:
        if name.split(".")[0] not in parts:
            raise ConfigError(
                f"trainable: '{name}' is no part of this model; its parts are {', '.join(parts)}"
            )
    sees = {name.split(".")[0] for name in config.trainable}
    if config.data.continuous == "none" and sees <= {"vit", "adapter"}:
        raise ConfigError(
            f"trainable: [{', '.join(config.trainable)}] would train nothing: with data.continuous 'none' no image reaches them"
        )
    if not any(_learns(name, config.optimizer.lr_scales) for name in config.trainable):
        raise ConfigError(
            f"trainable: [{', '.join(config.trainable)}] would train nothing: optimizer.lr_scales gives all of it 0"
        )

    for entry in config.optimizer.lr_scales:
        if not any(
            f"{name}.".startswith(f"{entry}.") or entry.startswith(f"{name}.") for name in config.trainable
        ):
            raise ConfigError(
                f"optimizer.lr_scales: '{entry}' names nothing that is trained, which is trainable: [{', '.join(config.trainable)}]"
            )


def _learns(name: str, scales: dict[str, float]) -> bool:
    """Whether something of that name has a learning rate over 0: the longest entry that names it decides, or one below it."""
    above = [entry for entry in scales if name == entry or name.startswith(f"{entry}.")]
    if not above or scales[max(above, key=len)] > 0:
        return True
    return any(scale > 0 for entry, scale in scales.items() if entry.startswith(f"{name}."))


def _check_loggers(config: StageConfig) -> None:
    wanted = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb, "mlflow": config.log.mlflow}
    for package, setting in wanted.items():
        spec = importlib.util.find_spec(package) if setting else None
        if setting and (
            spec is None or spec.origin is None
        ):  # without an origin it is a mere folder, such as wandb's of logs
            raise ConfigError(
                f"log.{package}: the package {package} is not installed; pip install {package}, or leave it out"
            )


def _evaluation_data(config: StageConfig) -> DataConfig | None:
    """`eval.streams`, with what `held_out` keeps back where they say so; or what it keeps back of the training streams, all of it.

    Packed as in training and into the same global batches: those that fill none are left out, for any number of ranks.
    """
    if config.eval is None:
        return None
    if config.eval.streams is not None:
        streams = config.eval.streams
        held_out = any(stream.held_out for stream in streams.values())
    else:
        whole = {"proportion": None, "repeat": None, "choose": None}
        streams = {name: s.model_copy(update=whole) for name, s in config.data.streams.items() if s.held_out}
        held_out = True
        if not streams:
            raise ConfigError(
                "eval: no stream of data.streams has `held_out`, the share to evaluate on; or name eval.streams"
            )
    settings = config.data.model_dump() | {
        "streams": {name: stream.model_dump() for name, stream in streams.items()},
        "split": "held_out" if held_out else "train",
        "epoch_samples": None,
        "epoch_tokens": None,
        "null_prompt_fraction": 0.0,
        "canonical_nodes": 1,
        "workers": min(config.data.workers, 1),
    }
    try:
        return DataConfig.model_validate(settings)
    except pydantic.ValidationError as error:
        raise ConfigError(f"eval.streams: {first_problem(error)}") from None
