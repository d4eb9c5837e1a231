"""Checks and resolves a stage's settings before anything large is loaded; needs neither torch nor Composer.

config = load_config(StageConfig, "yamls/stage1.yaml", ["optimizer.lr=5e-4"])
resolved = check_stage(config, world_size=8)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pydantic

from unitoken.common.config import first_problem
from unitoken.common.errors import ConfigError
from unitoken.common.missing_paths import check_writable
from unitoken.dataset.manifest import Manifest
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.check import (
    check_sources,
    check_streams_vocabulary,
    other_codes,
    uneven_proportions,
    vocabulary_of,
)
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, crops_of, open_sources
from unitoken.train.check_tokenizers import check_codec
from unitoken.train.checkpoint.compatibility import check_fits, check_growth, compare_constants
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.locations import checkpoint_folder, find_origin, latest_checkpoint
from unitoken.train.checkpoint.metadata import ModelSizes, PictureCrops, read_metadata
from unitoken.train.config import (
    IMAGE_ROWS,
    LORA,
    NEW_ROWS,
    ROWS,
    VOCABULARY_MATRICES,
    DecoderConfig,
    LogConfig,
    StageConfig,
    TrainedRows,
)
from unitoken.train.evaluation.opened_suite import open_suite
from unitoken.train.export.config import check_exportable
from unitoken.train.export.target import check_export_target
from unitoken.train.generation.check_samples import check_samples
from unitoken.train.run.bucket import bucket_of, fetch_origin, working_folder

FLOAT8_MULTIPLE = 16  # of the sizes of matrices that GPUs multiply in float8
VOCABULARY_MULTIPLE = 64  # grown matrices have a multiple of it as rows, for which GPUs are fastest


@dataclasses.dataclass(frozen=True)
class ResolvedData:
    """Settings of a mixture with its open datasets."""

    config: DataConfig
    sources: list[StreamSource]

    @property
    def manifests(self) -> list[Manifest]:
        """The manifests of all datasets."""
        return [source.manifest for source in self.sources]


@dataclasses.dataclass(frozen=True)
class ResolvedStage:
    """What the settings of a stage stand for: files and datasets are opened and read once, here.

    Attributes:
        sizes: of decoder and vision tower, from the settings or from the checkpoints that they name.
        views: how the vision tower sees an image; None without a vision tower.
        train: the data to train on.
        evaluation: the data to evaluate on; None without `eval`.
        vocabulary: the one vocabulary of all datasets.
        new_rows: the rows of the decoder's matrices that `model.grow` adds; None without it.
        trained_rows: the only rows of these matrices that are trained; None trains all or none of them.
        pictures: the sizes to which the images of the training data were cropped.
        compat: behave as the reference. This weights the loss by microbatches instead of by tokens, applies
            weight decay to all parameters, trains on separators, and shows the vision tower images as the
            reference did.
        warnings: suspicious settings, one per line.
    """

    sizes: ModelSizes
    views: Views | None
    train: ResolvedData
    evaluation: ResolvedData | None
    vocabulary: Vocabulary
    new_rows: range | None
    trained_rows: TrainedRows | None
    pictures: PictureCrops
    compat: bool
    warnings: tuple[str, ...]


def check_stage(config: StageConfig, world_size: int) -> ResolvedStage:
    """Resolve a stage's settings; checks that are cheap come first.

    Raises:
        ConfigError: a setting is wrong, or does not fit the data, the checkpoints or the machine.
    """
    check_settings(config, world_size)
    _check_loggers(config.log)
    train = ResolvedData(config.data, open_sources(config.data))
    evaluation_config = _evaluation_config(config)
    _check_save(config)
    # Downloads what is named by a hub id.
    decoder, vision = model_configs(config.model, vocabulary_of(train.sources).size)
    _check_tied_head(config, decoder)
    _check_float8(config, decoder)
    if config.save.export is not None:
        check_exportable(decoder, "save.export")
    views = Views(vision.image_size, vision.patch_size, config.data.anyres) if vision else None
    vocabulary = check_sources(train.sources, config.data, views)
    sizes = ModelSizes(decoder=with_room(config, decoder, vocabulary), vision=vision)
    warnings = [*uneven_proportions(config.data), *other_codes(train.sources)]
    warnings += _check_origins(config, sizes, vocabulary)
    if config.codec is not None and uses_codec(config):
        warnings += check_codec(config.codec, vocabulary, train.manifests)
    pictures = PictureCrops(crops=crops_of(train.manifests))
    guidance_trained = config.data.null_prompt_fraction > 0
    warnings += check_samples(config.samples, config.codec, pictures, guidance_trained)
    if config.suite is not None:
        open_suite(Path(config.suite.file), config.codec)
    evaluation = None
    if evaluation_config is not None:
        evaluation = ResolvedData(evaluation_config, _evaluation_sources(config, evaluation_config, train))
        check_streams_vocabulary(evaluation.sources, vocabulary, "the data that is trained on")
    new_rows = range(vocabulary.new_ids.start, sizes.decoder.vocab_size) if config.model.grow else None
    return ResolvedStage(
        sizes=sizes,
        views=views,
        train=train,
        evaluation=evaluation,
        vocabulary=vocabulary,
        new_rows=new_rows,
        trained_rows=_trained_rows(config, vocabulary, new_rows),
        pictures=pictures,
        compat=config.compat == "unitoken",
        warnings=tuple(warnings),
    )


def check_settings(config: StageConfig, world_size: int) -> None:
    """Check what needs neither data nor checkpoints. Raises ConfigError."""
    _check_data(config, world_size)
    _check_ranks(config, world_size)
    _check_microbatch(config)
    _check_trainable(config)
    _check_lora(config)


def uses_codec(config: StageConfig) -> bool:
    """Return whether the stage itself uses the tokenizers, so that they are checked before it trains."""
    uses = (config.samples, config.suite, config.save.export)
    return any(use is not None for use in uses) or _grows_by_codebook(config)


def _grows_by_codebook(config: StageConfig) -> bool:
    return config.model.grow is not None and config.model.grow.init == "codebook"


def with_room(config: StageConfig, decoder: DecoderConfig, vocabulary: Vocabulary) -> DecoderConfig:
    """Return the decoder's sizes, grown for the vocabulary with `model.grow`. Raises ConfigError."""
    room, needed, first = decoder.vocab_size, vocabulary.size, vocabulary.new_ids.start
    if config.model.grow is None:
        if needed > room:
            raise ConfigError(
                f"model.decoder: it has room for {room} ids (vocab_size), "
                f"the datasets' vocabulary has {needed}; `model.grow: {{init: mean}}` adds rows"
            )
        return decoder
    if not vocabulary.new_ids:
        raise ConfigError("model.grow: the tokenizer of the datasets has all their ids; leave it out")
    if first > room:
        raise ConfigError(
            f"model.grow: the tokenizer of the datasets has {first} ids and model.decoder rows for {room} "
            "(vocab_size), so it is not this model's tokenizer"
        )
    if _grows_by_codebook(config) and config.codec is None:
        raise ConfigError("model.grow: init 'codebook' needs `codec`, whose image tokenizer has the codebook")
    if needed <= room:
        return decoder
    rounded = math.ceil(needed / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return decoder.model_copy(update={"vocab_size": rounded})


def _trained_rows(config: StageConfig, vocabulary: Vocabulary, new_rows: range | None) -> TrainedRows | None:
    """Return the only rows of the vocabulary's matrices that are trained. Raises ConfigError."""
    if NEW_ROWS in config.trainable and new_rows is not None:
        return TrainedRows(NEW_ROWS, new_rows.start, new_rows.stop)
    if IMAGE_ROWS not in config.trainable:
        return None
    first, last = min(vocabulary.image_ids), max(vocabulary.image_ids)
    if last - first + 1 != len(vocabulary.image_ids):
        raise ConfigError(
            f"trainable: '{IMAGE_ROWS}' needs image codes with consecutive ids; the datasets' "
            f"{len(vocabulary.image_ids)} are spread over {first} to {last}"
        )
    return TrainedRows(IMAGE_ROWS, first, last + 1)


def _check_save(config: StageConfig) -> None:
    save, bucket = config.save, bucket_of(config)
    if save.export is not None:
        out = Path(save.export)
        if bucket is None and Path(save.folder).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"save.export: {save.export} holds the run's own folder, save.folder: {save.folder}"
            )
        check_export_target(out)
        check_writable("save.export", out.resolve().parent)
    key = "save.folder" if bucket is None else "data.cache"  # in which a run that is saved to a bucket works
    check_writable(key, working_folder(config))
    if bucket is not None:
        bucket.fetch()


def _check_origins(config: StageConfig, sizes: ModelSizes, vocabulary: Vocabulary) -> list[str]:
    """Check architecture and vocabulary of the weights that the stage starts from; return warnings."""
    origins, warnings = {}, []
    saved = latest_checkpoint(working_folder(config))
    if saved is not None:  # a resumed run needs no other weights
        origins[f"save.folder: {config.save.folder}"] = saved
    else:
        if config.init_from is not None:
            origins[f"init_from: {config.init_from}"] = find_origin(
                fetch_origin(config.init_from, config.data.cache_folder)
            )
        if isinstance(config.model.decoder, str):
            origins[f"model.decoder: {config.model.decoder}"] = checkpoint_folder(config.model.decoder)
    for where, origin in origins.items():
        about = read_metadata(origin)
        if where.startswith("model.decoder"):
            # The model's own sizes were read from this folder, and the vision tower in it need not be used.
            about = about._replace(sizes=None)
        if config.model.grow is not None:
            about = check_growth(about, sizes, vocabulary, where)
        check_fits(about, sizes, vocabulary, where)
        difference = compare_constants(about, sizes)
        if difference is not None and saved is not None:
            raise ConfigError(f"{where}: {difference}; a run goes on with those it began with")
        if difference is not None:
            warnings.append(f"{where}: {difference}")
    return warnings


def _check_data(config: StageConfig, world_size: int) -> None:
    data = config.data
    if data.global_batch % world_size:
        raise ConfigError(
            f"data.global_batch: {data.global_batch} packs can not be shared evenly by {world_size} ranks; "
            f"take a multiple of {world_size}"
        )
    if config.model.vision is None and data.continuous != "none":
        raise ConfigError(
            f"data.continuous: '{data.continuous}' needs model.vision; without a vision tower it is 'none'"
        )
    if config.compat == "unitoken" and data.null_prompt_fraction:
        raise ConfigError(
            "data.null_prompt_fraction: compat 'unitoken' leaves every prompt, "
            f"found {data.null_prompt_fraction}"
        )


def _check_ranks(config: StageConfig, world_size: int) -> None:
    replicas = config.fsdp.replicas
    if world_size % replicas:
        raise ConfigError(
            f"fsdp.replicas: {world_size} ranks can not be shared evenly by {replicas} copies of the model"
        )
    if replicas > 1 and replicas == world_size:
        raise ConfigError(
            f"fsdp.replicas: {replicas} of {world_size} ranks leaves one rank a copy; "
            "nothing would be sharded"
        )
    if config.fsdp.reduce == "bf16" and config.precision != "bf16":
        raise ConfigError(
            f"fsdp.reduce: bf16 is for `precision: bf16`; gradients of {config.precision} are summed in fp32"
        )
    if config.activation_checkpointing == "selective" and not config.supports_selective:
        raise ConfigError(
            "activation_checkpointing: 'selective' with model.attention 'flex' needs model.compile; "
            "or take 'full', or 'sdpa'"
        )


def _check_float8(config: StageConfig, decoder: DecoderConfig) -> None:
    if not config.model.float8:
        return
    if config.precision != "bf16":
        raise ConfigError(f"model.float8: is for `precision: bf16`, found {config.precision}")
    if config.model.lora is not None:
        raise ConfigError("model.float8: can not be combined with model.lora; leave out one")
    for name in ("hidden_size", "intermediate_size", "query_size", "key_size"):
        size = getattr(decoder, name)
        if size % FLOAT8_MULTIPLE:
            raise ConfigError(
                f"model.float8: {FLOAT8_MULTIPLE} has to divide all sizes; the decoder's {name} is {size}"
            )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("model.float8: torchao is not installed: pip install 'unitoken-streaming[float8]'")


def _check_microbatch(config: StageConfig) -> None:
    if config.microbatch == "auto" and config.compat == "unitoken":
        raise ConfigError(
            "microbatch: auto: compat 'unitoken' takes the mean of the microbatches' means, which depends on "
            "their size; give a number"
        )


def _check_trainable(config: StageConfig) -> None:
    trainable, shown = config.trainable, f"[{', '.join(config.trainable)}]"
    parts = ["model", "lm_head"] + (["vit", "adapter"] if config.model.vision is not None else [])
    for name in trainable:
        if name not in (*ROWS, LORA) and name.split(".")[0] not in parts:
            raise ConfigError(
                f"trainable: '{name}' is no part of this model; its parts are {', '.join(parts)}"
            )
        for rows in ROWS:
            if rows in trainable and any(_is_within(matrix, name) for matrix in VOCABULARY_MATRICES):
                raise ConfigError(f"trainable: '{name}' already trains all rows; leave out '{rows}' or it")
    if set(ROWS) <= set(trainable):
        raise ConfigError(f"trainable: '{NEW_ROWS}' and '{IMAGE_ROWS}' exclude each other; leave out one")
    if NEW_ROWS in trainable and config.model.grow is None:
        raise ConfigError(f"trainable: '{NEW_ROWS}' are the rows that model.grow adds, which is not set")
    trained_parts = {name.split(".")[0] for name in trainable}
    if config.data.continuous == "none" and trained_parts <= {"vit", "adapter"}:
        raise ConfigError(
            f"trainable: {shown} would train nothing: with data.continuous 'none' no image reaches them"
        )
    if not any(_has_learning_rate(name, config.optimizer.lr_scales) for name in trainable):
        raise ConfigError(f"trainable: {shown} would train nothing: optimizer.lr_scales gives all of it 0")
    for entry in config.optimizer.lr_scales:
        if not any(_is_within(name, entry) or _is_within(entry, name) for name in trainable):
            raise ConfigError(
                f"optimizer.lr_scales: '{entry}' names nothing that is trained, which is trainable: {shown}"
            )


def _check_lora(config: StageConfig) -> None:
    if (LORA in config.trainable) != (config.model.lora is not None):
        raise ConfigError(
            f"trainable: '{LORA}' trains the adapters of model.lora: set both, or neither; found "
            f"trainable: [{', '.join(config.trainable)}] and model.lora: {config.model.lora}"
        )
    for name in config.trainable if config.model.lora is not None else ():
        if _is_within("model.layers", name) or _is_within(name, "model.layers"):
            raise ConfigError(f"trainable: '{name}' trains layers that model.lora freezes; leave out one")


def _check_tied_head(config: StageConfig, decoder: DecoderConfig) -> None:
    """Raise ConfigError if lm_head is to be trained, which a model with tied embeddings does not have."""
    heads = [name for name in config.trainable if name.split(".")[0] == "lm_head"]
    if heads and decoder.tie_word_embeddings:
        raise ConfigError(
            f"trainable: '{heads[0]}' is model.embed_tokens in this model, whose decoder has "
            "tie_word_embeddings; name model or model.embed_tokens, and leave lm_head out"
        )


def _is_within(name: str, module: str) -> bool:
    """Return whether a dotted name is the module's own, or that of something inside it."""
    return name == module or name.startswith(f"{module}.")


def _has_learning_rate(name: str, scales: dict[str, float]) -> bool:
    """Return whether any parameter in `name` has a learning rate above 0.

    The longest entry of `lr_scales` that contains `name` decides for all of it, except for entries inside
    `name`.
    """
    containing = [entry for entry in scales if _is_within(name, entry)]
    if not containing or scales[max(containing, key=len)] > 0:
        return True
    return any(scale > 0 for entry, scale in scales.items() if _is_within(entry, name))


def _check_loggers(log: LogConfig) -> None:
    settings = {"tensorboard": log.tensorboard, "wandb": log.wandb, "mlflow": log.mlflow}
    for package, setting in settings.items():
        spec = importlib.util.find_spec(package) if setting else None
        # A spec without an origin is a plain folder of that name, such as the one in which wandb keeps its
        # logs.
        if setting and (spec is None or spec.origin is None):
            raise ConfigError(
                f"log.{package}: the package {package} is not installed; "
                f"pip install {package}, or leave it out"
            )


def _evaluation_config(config: StageConfig) -> DataConfig | None:
    """Return the settings of the data to evaluate on, or None without `eval`.

    These are the samples of `eval.streams`, held-out ones where those streams have `held_out`; or else all
    held-out samples of the training streams. Packs and global batches are as large as in training; a rest
    that fills no global batch is left out, whatever the number of ranks.
    """
    if config.eval is None:
        return None
    if config.eval.streams is not None:
        streams = config.eval.streams
        held_out = any(stream.held_out for stream in streams.values())
    else:
        all_samples = {"proportion": None, "repeat": None, "choose": None}
        streams = {
            name: stream.model_copy(update=all_samples)
            for name, stream in config.data.streams.items()
            if stream.held_out
        }
        held_out = True
        if not streams:
            raise ConfigError(
                "eval: no stream of data.streams has `held_out`, the share to evaluate on; "
                "or name eval.streams"
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


def _evaluation_sources(
    config: StageConfig, evaluation: DataConfig, train: ResolvedData
) -> list[StreamSource]:
    """Open the datasets of `eval.streams`, or take the training datasets, which hold the held-out samples."""
    if config.eval is not None and config.eval.streams is not None:
        return open_sources(evaluation)
    return [
        dataclasses.replace(source, config=evaluation.streams[source.name])
        for source in train.sources
        if source.name in evaluation.streams
    ]
