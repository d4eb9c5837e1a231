"""Exported folders of Hugging Face's layout: complete or absent, with the same logits for every program."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.checkpoints import write_checkpoint, write_whole_file
from support.paths import ROOT
from support.small_datasets import make_record, small_vocabulary, write_dataset
from support.stages import DECODER, VISION, stage, write_data, write_stage
from unitoken.codec.config import CodecConfig
from unitoken.codec.config import ImageTokenizerConfig as ImageTokenizer
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.compatibility import read_complete_metadata
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.loading import find_weights, load_weights
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.metadata import (
    ModelSizes,
    PictureCrops,
    read_metadata,
    read_stage,
    with_absolute_paths,
    write_metadata,
)
from unitoken.train.checkpoint.tensors import open_decoder_folder, parameter_shapes
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig, VisionTowerConfig
from unitoken.train.export.model import export_model
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.run import run_folder

TOKENIZERS = {"tokenizer": "tokenizer", "vision.weights": "vqgan"}
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def write_run(folder: Path, config: StageConfig, vocabulary: Vocabulary, seed: int = 0) -> UniToken:
    """Write a run's folder as a stage leaves it, with random weights."""
    decoder, vision = model_configs(config.model)
    torch.manual_seed(seed)
    model = UniToken(decoder, vision).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_norm" in name:  # so that a mix-up of gains shows
                parameter.normal_(0.8, 0.3)
    folder.mkdir(parents=True)
    write_checkpoint(folder, 7, model.state_dict(), ranks=2)
    write_metadata(
        folder, config, ModelSizes(decoder=decoder, vision=vision), vocabulary, PictureCrops(crops=[(32, 16)])
    )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> UniToken:
    return write_run(folder / "run", stage(folder), small_vocabulary())


@pytest.fixture(scope="module")
def exported(folder: Path, model: UniToken) -> Path:
    export_model(str(folder / "run"), folder / "model", "fp32")
    return folder / "model"


def load(model: str, vision: str | None) -> UniToken:
    config = ModelConfig(decoder=model, vision=vision, dropout=0.0)
    network = build_model(*model_configs(config), config)
    load_weights(network, find_weights(network, config, None), seed=0)
    return network.eval()


IDS = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: UniToken) -> Tensor:
    positions = torch.arange(IDS.shape[1]).expand(2, -1)
    return model.lm_head(model.model(model.model.embed_tokens(IDS), positions, None))


def test_an_export_gives_the_same_logits_and_features_here(model: UniToken, exported: Path) -> None:
    """Bit for bit, as the base model of a new stage, with sizes and tower from the export."""
    again = load(str(exported), str(exported))
    assert torch.equal(logits(again), logits(model))
    pixels = torch.randint(
        0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(again.adapter(again.vit(pixels)), model.adapter(model.vit(pixels)))
    shapes = parameter_shapes(again)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (1, 16)  # one gain for all heads stays one
    for (name, tensor), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(tensor, other), name


def test_an_export_gives_the_same_logits_in_transformers(model: UniToken, exported: Path) -> None:
    from transformers import AutoImageProcessor, ChameleonForConditionalGeneration

    theirs, report = ChameleonForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not report["unexpected_keys"]
    # Without a codec in the stage the image tokenizer is a random one.
    assert all(name.startswith("model.vqmodel.") for name in report["missing_keys"])
    with torch.no_grad():
        found = theirs.eval()(input_ids=IDS).logits
    # Transformers masks the logits of image codes.
    text = [token for token in range(170) if token not in small_vocabulary().image_ids]
    torch.testing.assert_close(found[..., text], logits(model)[..., text], rtol=1e-5, atol=1e-5)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (
        small_vocabulary().bos,
        small_vocabulary().end_of_turn,
    )
    processor = AutoImageProcessor.from_pretrained(exported / "tower")
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        pixels[0], (torch.from_numpy(picture).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    )


def test_an_export_has_all_metadata(folder: Path, exported: Path) -> None:
    whole = read_complete_metadata(find_origin(str(exported)))
    assert whole.vocabulary == small_vocabulary()
    assert whole.pictures == PictureCrops(crops=[(32, 16)])
    assert whole.stage == stage(folder)
    assert whole.sizes.vision == VisionTowerConfig.model_validate(VISION)
    assert (
        whole.sizes.decoder.model_dump()
        == DecoderConfig.model_validate(
            {**DECODER, "num_key_value_heads": 2, "max_position_embeddings": 4096}
        ).model_dump()
    )
    fields = json.loads((exported / "config.json").read_bytes())
    files = sorted(path.name for path in exported.iterdir() if path.name != "README.md")
    tower = {f"tower/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")}
    assert set(fields["unitoken"].pop("sha256")) == {*files, *tower, ""} - {"config.json", "tower"}
    assert fields["unitoken"].pop("card") == sha256_of_file(exported / "README.md")
    assert fields["unitoken"] == {
        "vocabulary": small_vocabulary().fingerprint,
        "step": 7,
        "checkpoint": None,
        "files": files,
    }
    assert fields["dtype"] == "float32"


def test_tensors_are_readable_and_the_towers_processor_is_apart(
    exported: Path,
) -> None:
    assert (exported / "model.safetensors").stat().st_mode == (exported / "config.json").stat().st_mode
    assert not (exported / "preprocessor_config.json").exists()
    assert (exported / "tower" / "preprocessor_config.json").is_file()


def test_an_export_in_bf16_and_several_files_loads_the_same(
    folder: Path, model: UniToken, tmp_path: Path
) -> None:
    export_model(str(folder / "run" / "step-00000007"), tmp_path / "half", max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("half/model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(path.stat().st_size for path in files) < 24_000
    again = load(str(tmp_path / "half"), str(tmp_path / "half"))
    for (name, tensor), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(tensor.bfloat16().float(), other), name


def load_without_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """Load an exported Chameleon with transformers, and return its text tokenizer."""
    from transformers import AutoTokenizer, ChameleonForConditionalGeneration
    from transformers.utils import logging

    logging.enable_propagation()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs, report = ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    logging.disable_propagation()
    assert not caplog.records
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.image_token_id == 8711
    return tokenizer


def test_the_tokenizers_are_exported_with_the_model(
    folder: Path, golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With `codec`, transformers' image tokenizer gives the codes of the data."""
    from transformers import AutoTokenizer, ChameleonForConditionalGeneration

    assets = golden / "assets"
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizer")
    vocabulary = Vocabulary.from_tokens(tokenizer.get_vocab(), 8192)
    codec = CodecConfig(
        tokenizer=str(assets / "tokenizer"),
        vision=ImageTokenizer(weights=str(assets / "vqgan"), precision="fp32"),
    )
    unusual = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3}
    decoder = DecoderConfig.model_validate({**DECODER, "vocab_size": vocabulary.size, **unusual})
    config = stage(folder).model_copy(update={"codec": codec, "model": ModelConfig(decoder=decoder)})
    model = write_run(tmp_path / "run", config, vocabulary)
    export_model(str(tmp_path / "run"), tmp_path / "out")
    exported = load_without_a_warning(tmp_path / "out", caplog)
    assert exported.get_vocab() == tokenizer.get_vocab()
    assert (exported.sep_token, exported.sep_token_id) == ("<reserved08706>", vocabulary.end_of_turn)
    pictures = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    expected = load_vision(codec.vision).encode(pictures)
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (theirs.model.vqmodel.encode(pixels.float())[2].view(1, 4, 4).numpy() == expected).all()
        text = theirs(input_ids=IDS).logits[..., 9300:]
    again = load(str(tmp_path / "out"), None)
    torch.testing.assert_close(text, logits(again)[..., 9300:], rtol=1e-5, atol=1e-5)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16().float())

    # The export is an image tokenizer itself, and counts as the one that it was made from.
    ours = load_vision(codec.vision.model_copy(update={"weights": str(tmp_path / "out")}))
    assert (ours.encode(pictures) == expected).all()
    assert ours.fingerprint == load_vision(codec.vision).fingerprint

    other = codec.model_copy(update={"tokenizer": str(assets / "tokenizer_llama_style")})
    with pytest.raises(
        ConfigError,
        match=rf"codec\.tokenizer: .* gives a vocabulary .*, the data is in {vocabulary.fingerprint}",
    ):
        export_model(
            str(tmp_path / "run"), tmp_path / "other", stage=config.model_copy(update={"codec": other})
        )


@pytest.mark.parametrize("call", ["write_tensors", "_write_json", "_publish", "AsideFolder.publish"])
def test_a_killed_export_leaves_the_earlier_model(
    call: str, folder: Path, model: UniToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for before in ([], ["model"]):
        with monkeypatch.context() as patch:
            patch.setattr(f"unitoken.train.export.model.{call}", killed)
            with pytest.raises(KeyboardInterrupt):
                export_model(str(folder / "run"), tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == before
        export_model(str(folder / "run"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(
        load(str(tmp_path / "model"), str(tmp_path / "model")).lm_head.weight,
        model.lm_head.weight.bfloat16().float(),
    )


KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pathlib import Path
from unitoken.train.export.model import export_model

rename = Path.rename

def killed(self, target):
    rename(self, target)
    if self.name == "model":  # the earlier model has stepped aside
        os.kill(os.getpid(), signal.SIGKILL)

Path.rename = killed
export_model(sys.argv[1], Path(sys.argv[2]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_kill_between_the_renames_loses_no_model(
    folder: Path, model: UniToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next export restores the earlier model, even if it is killed itself."""
    out = tmp_path / "model"
    export_model(str(folder / "run"), out)
    before = contents(out)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BETWEEN_THE_RENAMES, folder / "run", out], check=False
    )
    assert done.returncode == -9
    assert not out.exists()
    for name in ("model-2", "model"):  # an export beside it changes nothing
        with monkeypatch.context() as patch:
            patch.setattr("unitoken.train.export.model._write_tensors", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                export_model(str(folder / "run"), tmp_path / name)
    assert contents(out) == before
    export_model(str(folder / "run"), out)
    assert contents(out) == before
    assert not list(tmp_path.glob(".before-*"))


def test_the_earlier_model_stays_until_the_new_one_is_synced(
    folder: Path, model: UniToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncing 14 GB takes a while; a kill in that time must not lose the earlier model."""
    export_model(str(folder / "run"), tmp_path / "model")
    synced: list[Path] = []
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if self.name == "model":
            assert any(path.name == "model.safetensors" for path in synced)
        return rename(self, target)

    monkeypatch.setattr("unitoken.common.files._sync", synced.append)
    monkeypatch.setattr(Path, "rename", renamed)
    export_model(str(folder / "run"), tmp_path / "model")
    assert synced


def test_foreign_files_in_an_export_are_not_deleted_with_it(
    folder: Path, model: UniToken, tmp_path: Path
) -> None:
    """An export to the folder of the run's own base model once deleted a run's folder inside it."""
    out = tmp_path / "model"
    export_model(str(folder / "run"), out)
    shutil.copytree(folder / "run", out / "finetune", symlinks=True)
    (out / "README.md").write_text("mine")
    with pytest.raises(
        ConfigError,
        match=r"model: it holds README\.md, finetune besides the exported model, so it is not replaced",
    ):
        export_model(str(out / "finetune"), out)
    fields = json.loads((out / "config.json").read_bytes())
    del fields["unitoken"]["files"]  # as exported before files were listed, and before the tower had a folder
    shutil.rmtree(out / "tower")
    (out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"model: it holds finetune besides the exported model"):
        export_model(str(out / "finetune"), out)
    shutil.rmtree(out / "finetune")
    export_model(str(folder / "run"), out)


def test_an_export_to_a_link_keeps_the_link(folder: Path, model: UniToken, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    export_model(str(folder / "run"), tmp_path / "disk" / "model")
    (tmp_path / "link").symlink_to("disk/model")
    export_model(str(folder / "run"), tmp_path / "link", "fp32")
    assert (tmp_path / "link").readlink() == Path("disk/model")
    assert json.loads((tmp_path / "disk/model/config.json").read_bytes())["dtype"] == "float32"
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
    (tmp_path / "nowhere").symlink_to("gone/model")
    with pytest.raises(ConfigError, match=r"nowhere: it is a link to gone/model, which does not exist"):
        export_model(str(folder / "run"), tmp_path / "nowhere")


def test_an_export_replaces_only_exports(folder: Path, model: UniToken, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("mine")
    for out in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.txt", folder / "run"):
        with pytest.raises(ConfigError, match="it exists and is not an exported model"):
            export_model(str(folder / "run"), out)
        with pytest.raises(ConfigError, match="it exists and is not an exported model"):
            check_stage(stage(folder, f"save.folder={tmp_path}/new", f"save.export={out}"), 1)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "mine"


def test_an_export_can_not_replace_its_own_run(folder: Path, tmp_path: Path) -> None:
    """An error at the start, not after days of training, though neither folder exists yet."""
    for out in (tmp_path / "new", tmp_path / "new" / "run"):
        with pytest.raises(
            ConfigError,
            match=rf"save\.export: {out} holds the run's own folder, save\.folder: {tmp_path}/new/run",
        ):
            check_stage(stage(folder, f"save.folder={tmp_path}/new/run", f"save.export={out}"), 1)
    check_stage(stage(folder, f"save.folder={tmp_path}/new/run", f"save.export={tmp_path}/new/run/model"), 1)


def test_an_old_run_without_metadata_needs_its_stage(folder: Path, model: UniToken, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(folder / "run" / "step-00000007", run / "step-00000007")
    with pytest.raises(
        ConfigError, match=r"step-00000007: no vocabulary\.json beside it; name the stage .* --config"
    ):
        export_model(str(run / "step-00000007"), tmp_path / "out")
    export_model(str(run / "step-00000007"), tmp_path / "out", stage=stage(folder))
    assert read_metadata(tmp_path / "out").vocabulary == small_vocabulary()
    with pytest.raises(
        ConfigError,
        match=r"step-00000007: \d+ tensors do not fit: .*lm_head\.weight has shape \(170, 32\)",
    ):
        export_model(
            str(run / "step-00000007"),
            tmp_path / "out",
            stage=stage(folder, "model.decoder.vocab_size=180"),
        )


def test_the_command_line(folder: Path, model: UniToken, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "unitoken.train", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )

    done = call(
        "export",
        str(folder / "run"),
        str(tmp_path / "out"),
        "--config",
        str(write_stage(folder)),
        "--dtype",
        "fp32",
    )
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            f"{tmp_path}/out: without tokenizer and image tokenizer: "
            "set codec.tokenizer and codec.vision.weights",
            f"{tmp_path}/out: exported from {folder}/run",
        ],
    ), done.stderr
    assert torch.equal(logits(load(str(tmp_path / "out"), str(tmp_path / "out"))), logits(model))
    # The command line may add settings: the tokenizer of another vocabulary is refused, so it was read.
    codec = [f"codec.{key}={ROOT / 'tests/data/golden/assets' / name}" for key, name in TOKENIZERS.items()]
    refused = call("export", str(folder / "run"), str(tmp_path / "out"), *codec)
    assert "error: codec.tokenizer: " in refused.stderr
    refused = call("export", str(tmp_path), str(tmp_path / "out"))
    assert refused.returncode == 2
    why = "no checkpoint in it, neither a run's step-* (did that stage run?) nor a model's config.json"
    assert refused.stderr == f"error: {tmp_path}: {why}\n"


# --- init_from, before torch is imported
# ------------------------------------------------------------------------------


def test_init_from_takes_every_form(
    folder: Path, model: UniToken, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: str(exported) if name == "me/model" else None
    )
    for form in (
        folder / "run",
        folder / "run" / "latest",
        folder / "run" / "step-00000007",
        write_whole_file(folder / "before", 7, model.state_dict()),
        exported,
        "me/model",
    ):
        config = stage(folder, f"init_from={form}", f"save.folder={folder}/new")
        check_stage(config, 1)
        network = build_model(*model_configs(config.model), config.model)
        assert config.init_from is not None
        source = run_folder.open_weights(find_origin(config.init_from))
        load_weights(network, find_weights(network, config.model, source), seed=1)
        assert torch.equal(logits(network.eval()), logits(model)), form


@pytest.mark.parametrize("form", ["run", "model"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.decoder.hidden_size=64",
            "another architecture: its decoder and this stage's have hidden_size 32 and 64",
        ),
        ("model.decoder.num_hidden_layers=3", "its decoder and this stage's have num_hidden_layers 2 and 3"),
        ("model.decoder.vocab_size=180", "its decoder and this stage's have vocab_size 170 and 180"),
        ("model.vision.image_size=12", "its vision tower and this stage's have image_size 8 and 12"),
        (
            ("model.vision=null", "data.continuous=none", "trainable=[model]"),
            "it has a vision tower, this stage's model has none",
        ),
        (
            ("data.streams.all.local={folder}/other", "data.cache={folder}/cache2"),
            r"it was trained in a vocabulary with fingerprint \w{16} \(163 tokens\), "
            r"the datasets have \w{16} \(164 tokens\)",
        ),
    ],
)
def test_init_from_another_model_names_both_values(
    form: str, override: str | tuple[str, ...], message: str, folder: Path, exported: Path
) -> None:
    if not (folder / "other").exists():
        other = small_vocabulary(text_tokens=51)
        write_dataset(folder / "other", [make_record("x", other, 9)], other)
    overrides = [
        text.format(folder=folder) for text in ([override] if isinstance(override, str) else override)
    ]
    config = stage(folder, *overrides, f"init_from={folder / form}", f"save.folder={folder}/new")
    with pytest.raises(ConfigError, match=f"init_from: {folder / form}: .*{message}") as caught:
        check_stage(config, 1)
    assert "\n" not in str(caught.value)


def test_constants_that_no_shape_shows_are_compared(folder: Path, model: UniToken, exported: Path) -> None:
    """They once changed without a message. A new stage gets a warning, a resumed run an error."""
    changes = ("model.decoder.rope_theta=500", "model.vision.layer_norm_eps=1e-3")
    found = "its model and this stage's have rope_theta 10000.0 and 500.0, layer_norm_eps 1e-06 and 0.001"
    for form in ("run", "model"):
        checked = check_stage(
            stage(folder, *changes, f"init_from={folder / form}", f"save.folder={folder}/new"), 1
        )
        assert checked.warnings == (f"init_from: {folder / form}: {found}",)
    assert not check_stage(stage(folder, f"init_from={exported}", f"save.folder={folder}/new"), 1).warnings
    with pytest.raises(
        ConfigError, match=rf"save\.folder: {folder}/run: {found}; a run goes on with those it began with"
    ):
        check_stage(stage(folder, *changes), 1)


def test_a_misfit_ends_with_status_2_before_importing_torch(folder: Path, exported: Path) -> None:
    arguments = [
        str(write_stage(folder)),
        f"init_from={exported}",
        "model.decoder.hidden_size=64",
        f"save.folder={folder}/new",
    ]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'composer', 'streaming', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "train.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: init_from: {exported}: another architecture: "
        "its decoder and this stage's have hidden_size 32 and 64\n"
    )


def test_a_run_is_not_resumed_with_data_of_another_vocabulary(folder: Path, model: UniToken) -> None:
    other = small_vocabulary(text_tokens=49)
    write_dataset(folder / "fewer", [make_record("x", small_vocabulary(40), 9)], other)
    with pytest.raises(
        ConfigError,
        match=r"save\.folder: .* in a vocabulary with fingerprint \w{16} \(163 tokens\), .* \(162 tokens\)",
    ):
        check_stage(stage(folder, f"data.streams.all.local={folder}/fewer"), 1)


def test_a_base_model_of_another_vocabulary_is_refused(folder: Path, exported: Path) -> None:
    other = small_vocabulary(text_tokens=45)
    write_dataset(folder / "few", [make_record("x", small_vocabulary(40), 9)], other)
    config = stage(
        folder,
        f"data.streams.all.local={folder}/few",
        f"save.folder={folder}/new",
        f"model.decoder={exported}",
    )
    with pytest.raises(
        ConfigError, match=rf"model\.decoder: {exported}: it was trained in a vocabulary .* \(163 tokens\)"
    ):
        check_stage(config, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such checkpoint"),
        (lambda path: path.mkdir(), "no checkpoint in it, neither a run's step-"),
        (lambda path: path.mkdir() or (path / "config.json").write_text("{}"), "it has no model.safetensors"),
        (
            lambda path: path.mkdir() or (path / "latest").symlink_to("step-00000003"),
            "which does not exist",
        ),
    ],
)
def test_init_from_needs_a_checkpoint(make: Any, message: str, folder: Path, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(ConfigError, match=message) as caught:
        check_stage(stage(folder, f"init_from={tmp_path}/x", f"save.folder={folder}/new"), 1)
    assert str(tmp_path / "x") in str(caught.value)


def test_the_hub_is_not_asked_for_a_missing_local_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """runs/stage1 is also a valid name of a repository."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked")
    )
    (folder / "runs").mkdir()
    with pytest.raises(ConfigError, match=r"^runs/stage1: no such checkpoint; it was looked for in "):
        find_origin("runs/stage1")


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("yamls/*.yaml")) + sorted(ROOT.glob("yamls/demo/*.yaml")),
    ids=lambda path: path.stem,
)
def test_a_stages_settings_come_back_from_its_folder(path: Path, tmp_path: Path) -> None:
    config = load_config(
        StageConfig, path, ["optimizer.lr=5e-4", "data.cache_limit=1gb", "data.global_batch=8"]
    )
    write_metadata(
        tmp_path,
        config,
        ModelSizes(decoder=DecoderConfig.model_validate(DECODER), vision=None),
        small_vocabulary(),
    )
    assert read_stage(tmp_path / "step-00000001.pt") == with_absolute_paths(config)
    sizes = read_metadata(tmp_path / "step-00000001.pt").sizes
    assert sizes is not None
    assert sizes.decoder == DecoderConfig.model_validate(DECODER)


def test_a_changed_file_of_an_export_is_named(exported: Path, tmp_path: Path) -> None:
    for name in sorted(
        path.relative_to(exported).as_posix()
        for path in exported.rglob("*")
        if path.is_file() and path.name != "README.md"  # which the user completes
    ):
        copy = tmp_path / "copy"
        shutil.copytree(exported, copy)
        content = bytearray((copy / name).read_bytes())
        if name == "config.json":
            content = content.replace(b'"rms_norm_eps": 1e-05', b'"rms_norm_eps": 1e-04')
            assert bytes(content) != (exported / name).read_bytes()
        else:
            content[-9] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(ConfigError, match="changed"):  # noqa: PT012 - either of the two raises
            read_metadata(copy)
            open_decoder_folder(str(copy)).load()
        shutil.rmtree(copy)
    read_metadata(exported)
    open_decoder_folder(str(exported)).load()
