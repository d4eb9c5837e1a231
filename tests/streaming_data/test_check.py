"""Checks of a mixture before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.small_datasets import data_config, make_record, small_vocabulary, text_records, write_dataset
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import MANIFEST, load_manifest
from unitoken.dataset.record import Record
from unitoken.streaming_data.check import check_streams_vocabulary, other_codes
from unitoken.streaming_data.sources import open_sources


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "one", text_records(40))


def test_a_model_of_another_vocabulary_is_refused_naming_both(tmp_path: Path, dataset: Path) -> None:
    sources = open_sources(data_config(tmp_path, {"a": {"local": str(dataset)}}))
    check_streams_vocabulary(sources, small_vocabulary(), "the model")
    with pytest.raises(ConfigError) as caught:
        check_streams_vocabulary(sources, small_vocabulary(60), "the model")
    for part in (str(dataset), small_vocabulary(60).fingerprint, small_vocabulary().fingerprint, "the model"):
        assert part in str(caught.value)


def test_a_mixture_is_checked_without_heavy_imports(tmp_path: Path, dataset: Path) -> None:
    config = data_config(tmp_path, {"a": {"local": str(dataset)}}).model_dump_json()
    program = (
        "import sys\nfrom unitoken.streaming_data.check import check_sources\n"
        "from unitoken.streaming_data.sources import DataConfig, open_sources\n"
        "config = DataConfig.model_validate_json(sys.argv[1])\n"
        "print(check_sources(open_sources(config), config, None).fingerprint)\n"
        "assert not {'torch', 'streaming', 'composer', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, config], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == small_vocabulary().fingerprint


def with_vision(folder: Path, records: list[Record], **changes: str) -> dict[str, str]:
    write_dataset(folder, records)
    manifest = load_manifest(folder)
    changed = manifest.model_copy(update={"vision": manifest.vision.model_copy(update=changes)})
    (folder / MANIFEST).write_bytes(changed.dump())
    return {"local": str(folder)}


def test_different_image_tokenizers_give_a_warning(tmp_path: Path) -> None:
    drawn = [make_record("d", small_vocabulary(), 4, answer_images=1)]
    streams = {
        "a": with_vision(tmp_path / "a", drawn, precision="tf32"),
        "b": with_vision(tmp_path / "b", drawn, precision="tf32"),
        "texts": with_vision(
            tmp_path / "texts", text_records(3), precision="fp32"
        ),  # they hold no image codes
    }
    assert other_codes(open_sources(data_config(tmp_path, streams))) == []
    streams["c"] = with_vision(tmp_path / "c", drawn, precision="bf16", weights="unknown")
    message = "weights 0000000000000000 and unknown, precision tf32 and bf16"
    (line,) = other_codes(open_sources(data_config(tmp_path, streams)))
    assert line == f"streams 'a' and 'c' have image codes of different tokenizers: {message}"
