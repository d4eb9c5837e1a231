"""A mistake in a stage's settings is a one-line error, found before torch is imported."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.paths import ROOT
from support.small_datasets import make_record, small_vocabulary, write_dataset
from support.stages import DECODER, VISION, stage, write_data, write_stage
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import SPECIAL_NAMES, Vocabulary, grid_name, image_code_name
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.layouts import model_configs, read_decoder, read_vision
from unitoken.train.checkpoint.locations import checkpoint_folder, find_origin
from unitoken.train.checkpoint.metadata import ModelSizes, write_metadata
from unitoken.train.config import StageConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    write_data(folder / "data")
    other = small_vocabulary(text_tokens=51)
    write_dataset(folder / "other", [make_record("x", other, 9)], other)
    return folder


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage1-anyres", "stage2-anyres"])
def test_the_real_stages_hold_the_references_settings(name: str) -> None:
    config = load_config(StageConfig, ROOT / f"yamls/{name}.yaml")
    one, anyres = name.startswith("stage1"), name.endswith("anyres")
    assert config.optimizer.lr == (1e-3 if one else 1e-5)
    assert config.optimizer.lr_scales == ({"vit": 1e-2} if one else {"vit": 1.0})
    assert config.trainable == (["vit", "adapter"] if one else ["vit", "adapter", "model", "lm_head"])
    assert (config.optimizer.min_lr, config.optimizer.weight_decay, config.optimizer.betas) == (
        0.0,
        0.1,
        (0.9, 0.95),
    )
    assert (config.optimizer.clip_norm, config.optimizer.eps, config.optimizer.warmup) == (
        4.0,
        1e-8,
        "0.01ep",
    )
    assert (config.optimizer.schedule, config.precision, config.fsdp.reduce) == ("cosine", "bf16", "fp32")
    assert (config.model.dropout, config.model.z_loss, config.max_duration) == (0.05, 1e-5, "1ep")
    assert not config.model.mask_image_logits
    assert config.init_from == (None if one else f"runs/{name.replace('2', '1')}")
    assert config.save.folder == f"runs/{name}"
    assert config.data.anyres == anyres
    assert (
        config.data.packed_length > (4760 if anyres else 1790) + 256
    )  # the longest sample with an image, and its text
    assert config.data.global_batch == 128 // 2  # the reference's samples, two a pack


@pytest.mark.parametrize("variant", ["", "-anyres"])
def test_stage_two_starts_from_stage_one_with_its_own_data(variant: str) -> None:
    """The reference's Stage II named an undefined variable, a missing folder, and Stage I's data (bug 25)."""
    one, two = (load_config(StageConfig, ROOT / f"yamls/stage{n}{variant}.yaml") for n in (1, 2))
    assert two.init_from == one.save.folder != two.save.folder
    assert not {stream.local for stream in two.data.streams.values()} & {
        stream.local for stream in one.data.streams.values()
    }
    assert (two.model.decoder, two.model.vision) == (one.model.decoder, one.model.vision)


def test_compat_gives_features_to_all_images(folder: Path) -> None:
    assert stage(folder).data.continuous == "questions"
    config = stage(folder, "compat=unitoken")
    assert config.data.continuous == "all"
    check_stage(config, 1)
    assert stage(folder, "compat=unitoken", "data.continuous=all") == config
    check_stage(
        stage(folder, "compat=unitoken", "model.vision=null", "data.continuous=none", "trainable=[model]"), 1
    )


def test_the_longest_image_of_anyres_fits_into_a_pack() -> None:
    """For all shapes up to six to one; the reference's own sweep found at most 3,699 features."""
    config = load_config(StageConfig, ROOT / "yamls/stage1-anyres.yaml")
    sizes = np.array([(width, height) for width in range(128, 1300, 32) for height in range(128, 1300, 32)])
    longest = 1060 + 1 + int(Views(384, 14, anyres=True).counts(sizes).max())
    assert longest == 4760
    assert config.data.packed_length > longest + 1024


@pytest.mark.parametrize(
    "path",
    [path for place in ("", "demo/", "open/") for path in sorted(ROOT.glob(f"yamls/{place}[bs]*.yaml"))],
    ids=lambda p: p.stem,
)
def test_every_stage_in_the_repository_loads(path: Path) -> None:
    assert load_config(StageConfig, path).name == path.stem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.global_batch=5", r"data\.global_batch: 5 packs can not be shared evenly by 2 ranks"),
        (
            "data.packed_length=14",
            r"data\.packed_length: 14 is too short for any question image of stream 'all': "
            r"the smallest takes 15 \(10 tokens, a separator and 4 features\)",
        ),
        (
            ("data.packed_length=14", "compat=unitoken", "data.streams.all.kinds=[generation]"),
            r"14 is too short for any generated image of stream 'all': the smallest takes 15",
        ),
        (
            ("data.packed_length=9", "data.streams.all.kinds=[generation]"),
            r"9 is too short for any generated image of stream 'all': "
            r"the smallest takes 10 \(10 tokens\)",
        ),
        (
            ("data.anyres=true", "data.packed_length=48", "data.streams.all.max_tokens=20"),
            r"data\.streams\.all\.max_tokens: 20 is too short for any question image of stream 'all': "
            r"the smallest takes 21 \(10 tokens, a separator and 10 features\)",
        ),
        ("fsdp.replicas=3", r"fsdp\.replicas: 2 ranks can not be shared evenly by 3 copies of the model"),
        ("fsdp.replicas=2", r"fsdp\.replicas: 2 of 2 ranks leaves one rank a copy; nothing would be sharded"),
        ("fsdp.reduce=bf16", r"fsdp\.reduce: bf16 is for `precision: bf16`"),
        (
            ("activation_checkpointing=selective", "model.attention=flex"),
            r"'selective' with model\.attention 'flex' needs model\.compile",
        ),
        ("activation_checkpointing=some", r"activation_checkpointing"),
        ("microbatch=most", r"microbatch"),
        ("model.lora={}", r"trainable: 'lora' trains the adapters of model\.lora: set both, or neither"),
        ("trainable=[lora]", r"trainable: 'lora' trains the adapters of model\.lora: set both, or neither"),
        (
            ("model.lora={}", "trainable=[lora, model.layers.0]"),
            r"trainable: 'model\.layers\.0' trains layers that model\.lora freezes",
        ),
        (
            ("model.lora={}", "trainable=[lora, model]"),
            r"trainable: 'model' trains layers that model\.lora freezes",
        ),
        ("model.lora={targets: []}", r"model\.lora\.targets"),
        ("model.lora={targets: [lm_head]}", r"model\.lora\.targets"),
        (
            "trainable=[image_rows, lm_head]",
            r"trainable: 'lm_head' already trains all rows; leave out 'image_rows' or it",
        ),
        (
            ("model.grow={}", "trainable=[image_rows, new_rows]"),
            r"trainable: 'new_rows' and 'image_rows' exclude each other",
        ),
        ("model.float8=true", r"model\.float8: is for `precision: bf16`, found fp32"),
        (
            ("model.float8=true", "precision=bf16", "model.lora={}", "trainable=[lora]"),
            r"model\.float8: can not be combined with model\.lora",
        ),
        (
            ("model.float8=true", "precision=bf16", "model.decoder.intermediate_size=40"),
            r"model\.float8: 16 has to divide all sizes; the decoder's intermediate_size is 40",
        ),
        (("microbatch=auto", "compat=unitoken"), r"microbatch: auto: compat 'unitoken' takes the mean"),
        ("activation_checkpointing=0", r"activation_checkpointing"),
        ("model.vision=null", r"data\.continuous: 'questions' needs model\.vision"),
        (
            ("compat=unitoken", "data.continuous=questions"),
            r"data\.continuous: compat 'unitoken' gives features to all images, found 'questions'",
        ),
        (
            ("compat=unitoken", "data.null_prompt_fraction=0.1"),
            r"data\.null_prompt_fraction: compat 'unitoken' leaves every prompt, found 0\.1",
        ),
        (
            "trainable=[vit, adaptor]",
            r"trainable: 'adaptor' is no part of this model; its parts are model, lm_head, vit, adapter",
        ),
        (
            "model.decoder.tie_word_embeddings=true",
            r"trainable: 'lm_head' is model\.embed_tokens in this model, "
            r"whose decoder has tie_word_embeddings; name model or model\.embed_tokens, "
            r"and leave lm_head out$",
        ),
        (
            "model.decoder.attention_bias=true",
            r"`model\.decoder`: attention_bias is Qwen2's, which has `qk_norm: none`, found layer_shared",
        ),
        (
            ("model.decoder.qk_norm=rms", "model.decoder.swin_norm=true"),
            r"`model\.decoder`: swin_norm is Chameleon's, which has a LayerNorm as qk_norm, found rms",
        ),
        (
            "model.decoder.head_dim=8",
            r"`model\.decoder`: head_dim 8 times 2 heads is not hidden_size 32, as in Chameleon",
        ),
        (
            "model.decoder.rope_scaling={rope_type: linear, factor: 2, beta_fast: 3}",
            r"`model\.decoder\.rope_scaling`: rope_type linear has no beta_fast",
        ),
        (
            "model.decoder.rope_scaling={rope_type: dynamic, factor: 2}",
            r"rope_type`: Input should be .linear., .llama3. or .yarn., found .dynamic.",
        ),
        ("trainable=[]", r"`trainable`: List should have at least 1 item"),
        (
            ("data.continuous=none", "trainable=[vit, adapter.0]"),
            r"trainable: \[vit, adapter\.0\] would train nothing: "
            r"with data\.continuous 'none' no image reaches them",
        ),
        (
            "optimizer.lr_scales={vit: 0, adapter: 0, model: 0, lm_head: 0}",
            r"would train nothing: optimizer\.lr_scales gives all of it 0",
        ),
        (
            ("trainable=[vit.encoder, adapter.0]", "optimizer.lr_scales={vit: 0, adapter: 0, model: 1}"),
            r"trainable: \[vit\.encoder, adapter\.0\] would train nothing",
        ),
        (
            "model.decoder.vocab_size=150",
            r"room for 150 ids \(vocab_size\), the datasets' vocabulary has 163; `model\.grow: .* adds rows",
        ),
        (
            ("model.decoder.vocab_size=49", "model.grow={}"),
            r"50 ids and model\.decoder rows for 49 \(vocab_size\), so it is not this model's tokenizer",
        ),
        ("model.grow={init: median}", r"`model\.grow\.init`: Input should be 'mean', 'normal' or 'codebook'"),
        ("model.grow={init: codebook}", r"model\.grow: init 'codebook' needs `codec`"),
        ("trainable=[new_rows]", r"'new_rows' are the rows that model\.grow adds, which is not set"),
        (
            ("trainable=[new_rows, model]", "model.grow={}"),
            r"trainable: 'model' already trains all rows; leave out 'new_rows' or it",
        ),
        (
            ("trainable=[adapter, lm_head.weight, new_rows]", "model.grow={}"),
            r"trainable: 'lm_head\.weight' already trains all rows",
        ),
        (
            ("trainable=[new_rows]", "model.grow={}", "optimizer.lr_scales={model.embed_tokens: 2}"),
            r"optimizer\.lr_scales: 'model\.embed_tokens' names nothing that is trained",
        ),
        (
            "model.decoder.hiden_size=1",
            r"unknown key 'model\.decoder\.hiden_size'; did you mean 'hidden_size'",
        ),
        (
            "model.decoder.num_attention_heads=3",
            r"`model\.decoder`: hidden_size 32 is not an even number times 3 heads",
        ),
        (
            "model.decoder=/nowhere/at/all",
            r"^model\.decoder: /nowhere/at/all: no such folder, and not a hub id",
        ),
        (
            "model.vision=/nowhere/at/all",
            r"^model\.vision: /nowhere/at/all: no such folder, and not a hub id",
        ),
        ("data.streams.all.local=/nowhere", r"/nowhere: not a dataset folder: no such folder"),
        ("init_from=/nowhere", r"/nowhere: no such checkpoint"),
        ("max_duration=10", r"`max_duration`"),
        ("optimizer.betas=[2, 3]", r"`optimizer\.betas\.0`: Input should be less than 1, found 2"),
        (
            "optimizer.min_lr=1",
            r"`optimizer`: min_lr 1 is above lr 0\.003, from which the schedule falls to it",
        ),
        (
            "optimizer.lr_scales={vitt: 0.1}",
            r"optimizer\.lr_scales: 'vitt' names nothing that is trained, which is trainable: \[vit,",
        ),
        (
            "save.folder=http://server/run",
            r"`save\.folder`: expected a folder, or a URL that begins with s3://.*, found 'http://server/run'",
        ),
        ("save.export=gs://bucket/model", r"`save\.export`: it is written to a folder"),
        ("save.folder=/dev/null/run", r"save\.folder: /dev/null/run: cannot write there: Not a directory"),
        ("save.export=/dev/null/x/model", r"save\.export: /dev/null/x: cannot write there: Not a directory"),
        ("optimizer.learning_rate=1", r"unknown key 'optimizer\.learning_rate'"),
    ],
)
def test_a_wrong_setting_is_named(override: str | tuple[str, ...], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_stage(stage(folder, *([override] if isinstance(override, str) else override)), 2)
    assert "\n" not in str(caught.value)


def test_a_new_decoder_has_a_row_for_each_id_of_the_data(folder: Path) -> None:
    """By default, and with `auto`; a number stays a number."""
    unsized = {name: value for name, value in DECODER.items() if name != "vocab_size"}
    for sizes, rows in ((unsized, 163), ({**DECODER, "vocab_size": "auto"}, 163), (DECODER, 170)):
        config = stage(folder, model={"decoder": sizes, "vision": VISION})
        assert check_stage(config, 1).sizes.decoder.vocab_size == rows


def test_sizes_from_data_need_the_data(folder: Path) -> None:
    model = stage(folder, "model.decoder.vocab_size=auto").model
    with pytest.raises(ConfigError, match=r"^model\.decoder: vocab_size: auto is the size of the datasets'"):
        model_configs(model)
    assert model_configs(model, 99)[0].vocab_size == 99


def test_growth_gives_room_for_the_vocabulary(folder: Path) -> None:
    """Rounded up to a multiple of 64, unless spare rows are enough."""
    for room, grown in ((50, 192), (150, 192), (163, 163), (170, 170), (300, 300)):
        resolved = check_stage(stage(folder, "model.grow={}", f"model.decoder.vocab_size={room}"), 1)
        assert (resolved.sizes.decoder.vocab_size, resolved.new_rows) == (grown, range(50, grown))
    check_stage(stage(folder, "model.grow={}", "trainable=[new_rows, adapter, model.layers]"), 1)
    assert check_stage(stage(folder), 1).new_rows is None


def test_a_vocabulary_grows_once(folder: Path, tmp_path: Path) -> None:
    """Of a checkpoint as of a folder, one line says so before weights are loaded."""
    sizes = {**DECODER, "vocab_size": 192}
    config = stage(folder, "model.grow={}", f"model.decoder={sizes}")
    decoder = check_stage(config, 1).sizes.decoder
    write_metadata(tmp_path, config, ModelSizes(decoder=decoder, vision=None), small_vocabulary(60))
    with zipfile.ZipFile(tmp_path / "step-00000001.pt", "w"):
        pass
    for key in ("init_from", "save.folder"):
        with pytest.raises(
            ConfigError, match=rf"^{key}: .*: a vocabulary grows once: .*163 tokens"
        ) as caught:
            check_stage(stage(folder, "model.grow={}", f"{key}={tmp_path}"), 1)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_size_can_not_grow(folder: Path, tmp_path: Path) -> None:
    for rows in (49, 193):
        other = write_checkpoint(tmp_path / str(rows), {**DECODER, "vocab_size": rows}, {NORM: (1, 16)})
        with pytest.raises(ConfigError, match=rf"{rows}: it has rows for {rows} ids; .* 50 .* to 192"):
            check_stage(
                stage(folder, "model.grow={}", "model.decoder.vocab_size=150", f"init_from={other}"), 1
            )


def test_a_tokenizer_without_new_ids_can_not_grow(folder: Path, tmp_path: Path) -> None:
    names = [*SPECIAL_NAMES.values(), *map(grid_name, range(1, 100)), *map(image_code_name, range(8))]
    ids = {name: n for n, name in enumerate([*names, *(f"t{n}" for n in range(50))])}
    whole = Vocabulary.from_tokens(ids, codebook_size=8)
    write_dataset(tmp_path / "whole", [make_record("x", whole, 9)], whole)
    with pytest.raises(ConfigError, match=r"model\.grow: the tokenizer .* has all their ids; leave it out"):
        check_stage(stage(folder, "model.grow={}", f"data.streams={{all: {{local: {tmp_path}/whole}}}}"), 1)


def test_folders_may_be_in_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    save = stage(folder, "save.folder=~/runs/one", "save.export=~/model").save
    assert (save.folder, save.export) == ("/home/me/runs/one", "/home/me/model")


@pytest.mark.parametrize(
    "override",
    [
        "trainable=[vit, adaptor]",
        "optimizer.lr_scales={vitt: 1}",
        "data.global_batch=5",
        "data.streams.all.local=/nowhere",
        "log.wandb=project",
        "save.folder=/dev/null/run",
        "eval={interval: 1ba}",
    ],
)
def test_cheap_checks_come_before_downloads(
    override: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 GB were once downloaded first."""
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked")
    )
    with pytest.raises(
        ConfigError, match=override.split("=")[0].replace("data.streams.all.local", "/nowhere")
    ):
        check_stage(stage(folder, "model.decoder=owner/name", "model.vision=owner/tower", override), 2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainable=[vit, adapter]", "optimizer.lr_scales={vit: 0}"),
        ("trainable=[vit]", "optimizer.lr_scales={vit: 0, vit.encoder: 1}"),
        ("trainable=[vit.encoder]", "optimizer.lr_scales={vit: 0, vit.encoder: 0.1}"),
        ("trainable=[model]", "optimizer.lr_scales={model: 0, model.layers.1: 0.1}"),
        ("trainable=[model, adapter]", "data.continuous=none"),
    ],
)
def test_a_stage_may_train_a_part_of_what_it_names(overrides: tuple[str, ...], folder: Path) -> None:
    check_stage(stage(folder, *overrides), 2)


def test_streams_of_different_vocabularies_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="different vocabularies"):
        check_stage(stage(folder, f"data.streams.second.local={folder}/other"), 1)


def test_checking_settings_imports_neither_torch_nor_composer(folder: Path) -> None:
    code = (
        "import sys; from unitoken.common.config import load_config; "
        "from unitoken.train.config import StageConfig; "
        "from unitoken.train.check import check_stage; "
        f"check_stage(load_config(StageConfig, {str(write_stage(folder))!r}), 1); "
        "assert not {'torch', 'composer', 'streaming', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_is_the_docstring(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == (0 if arguments else 2)
    assert "composer -n 8 train.py yamls/stage1.yaml" in result.stdout


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Path:
    import json

    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, folder / "model.safetensors"
    )
    return folder


NORM = "model.layers.0.self_attn.q_norm.weight"


def test_the_sizes_are_read_from_old_and_new_config_files(tmp_path: Path) -> None:
    sizes = {**DECODER, "rms_norm_eps": 1e-5, "hidden_act": "silu", "model_type": "chameleon"}
    old = write_checkpoint(
        tmp_path / "old", {**sizes, "rope_theta": 5e5, "rope_scaling": None}, {NORM: (1, 16)}
    )
    new = write_checkpoint(
        tmp_path / "new",
        {**sizes, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {NORM: (2, 16)},
    )
    assert read_decoder(str(old)).model_dump() == {
        **read_decoder(str(new)).model_dump(),
        "qk_norm": "layer_shared",
    }
    assert read_decoder(str(new)).qk_norm == "layer_per_head"
    assert read_decoder(str(new)).rope_theta == 5e5
    whole = write_checkpoint(
        tmp_path / "siglip", {"vision_config": {"hidden_size": 48}, "text_config": {}}, {"a": (1,)}
    )
    assert (read_vision(str(whole)).hidden_size, read_vision(str(whole)).num_hidden_layers) == (48, 12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rotary embeddings of type 'dynamic'"),
        ({"attention_bias": True}, "`attention_bias` is True; only False is supported"),
        ({"vocab_size": "many"}, r"config\.json: vocab_size: Input should be a valid integer"),
    ],
)
def test_a_decoder_of_another_kind_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "x", {**DECODER, **config}, {NORM: (1, 16)})
    with pytest.raises(ConfigError, match=message):
        read_decoder(str(folder))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: not readable"):
        read_decoder(str(tmp_path))
    folder = write_checkpoint(tmp_path / "x", DECODER, {"other": (1,)})
    with pytest.raises(ConfigError, match="not a Chameleon decoder"):
        read_decoder(str(folder))
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="not readable as safetensors"):
        read_decoder(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(ConfigError, match="names files outside its folder"):
        read_decoder(str(folder))


@pytest.mark.parametrize("places", ["[]", "null", '{"a": 3}'])
def test_a_bad_index_is_a_one_line_error(places: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "x", DECODER, {NORM: (1, 16)})
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {places}}}')
    with pytest.raises(ConfigError, match=r"index\.json: `weight_map`: expected an object of file names$"):
        read_decoder(str(folder))


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "x", DECODER, {NORM: (1, 16)})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError,
        match=r"x: it has no model\.safetensors, and pytorch_model\.bin is not read, .*safetensors only",
    ):
        read_decoder(str(folder))


@pytest.mark.parametrize(
    ("name", "hint"), [("model.safetensors", "; name the folder that it is in"), ("notes.txt", "")]
)
def test_a_file_that_is_no_checkpoint_is_a_one_line_error(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a zip" * 100)
    with pytest.raises(ConfigError) as caught:
        find_origin(str(tmp_path / name))
    assert (
        str(caught.value)
        == f"{tmp_path / name}: not a checkpoint of a run (step-00000100), or a truncated one{hint}"
    )


def test_a_failed_download_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("Cannot reach the hub\nand here is how to debug it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ConfigError,
        match=r"^owner/name: no such folder, and the download from the hub failed: Cannot reach the hub(;|$)",
    ):
        checkpoint_folder("owner/name")
