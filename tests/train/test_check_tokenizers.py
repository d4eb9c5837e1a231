"""The tokenizers of exports and samples are those of the data, which is checked before training."""

import re
from pathlib import Path
from typing import Any

import pytest

from support.drawn import CODEC, drawing_stage, write_data, write_run
from support.tokenizing import TOKENIZER, tiny_vqgan
from unitoken.common.errors import ConfigError
from unitoken.train.check import check_stage
from unitoken.train.config import StageConfig
from unitoken.train.export.model import export_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_data(folder / "data")
    tiny_vqgan(folder / "other")
    return folder


def with_codec(
    folder: Path, run: Path, tokenizer: Any = CODEC["tokenizer"], weights: Any = None
) -> StageConfig:
    config = drawing_stage(
        folder, f"save.folder={run}", f"save.export={run}/model", f"codec.tokenizer={tokenizer}"
    )
    assert config.codec is not None
    vision = config.codec.vision.model_copy(update={"weights": str(weights or config.codec.vision.weights)})
    return config.model_copy(update={"codec": config.codec.model_copy(update={"vision": vision})})


ANOTHER = r"codec\.vision\.weights: .*/other has 64 image codes, the data's vocabulary has 128"


@pytest.mark.filterwarnings("ignore")
def test_an_image_tokenizer_of_another_codebook_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(folder, with_codec(folder, tmp_path / "run"))
    with pytest.raises(ConfigError, match=ANOTHER):
        export_model(
            str(tmp_path / "run"),
            tmp_path / "out",
            stage=with_codec(folder, tmp_path / "run", weights=folder / "other"),
        )
    assert not (tmp_path / "out").exists()
    export_model(str(tmp_path / "run"), tmp_path / "out", stage=with_codec(folder, tmp_path / "run"))
    warnings = capsys.readouterr().err
    assert re.search(
        r"warning: .*weights: .* has fingerprint \w{16}, image codes of the data are of 0{16}\n", warnings
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "{folder}/other"}, ANOTHER),
        ({"weights": "/nowhere"}, r"vision\.weights: /nowhere: no such file or folder"),
        ({"tokenizer": "/nowhere"}, r"tokenizer: /nowhere: no such folder"),
    ],
)
def test_the_tokenizers_of_an_export_are_checked_with_settings(
    changes: dict[str, str], message: str, folder: Path, tmp_path: Path
) -> None:
    config = with_codec(
        folder, tmp_path, **{key: value.format(folder=folder) for key, value in changes.items()}
    )
    with pytest.raises(ConfigError, match=message):
        check_stage(config, 1)


def test_other_image_tokenizer_weights_give_a_warning(folder: Path, tmp_path: Path) -> None:
    (note,) = check_stage(with_codec(folder, tmp_path), 1).warnings
    assert re.fullmatch(
        r"codec\.vision\.weights: .*/vqgan has fingerprint \w{16}, .* of the data are of 0{16}", note
    )


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_tokenizer_is_an_error_before_loading_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unitoken.train.stage import run_stage

    monkeypatch.setattr("unitoken.train.stage.load_weights", lambda *_: pytest.fail("it loaded weights"))
    config = with_codec(folder, tmp_path, tokenizer=TOKENIZER)
    with pytest.raises(
        ConfigError, match=r"codec\.tokenizer: .* gives a vocabulary .*, the data is in \w{16} \(583"
    ):
        run_stage(config, check_stage(config, 1))
