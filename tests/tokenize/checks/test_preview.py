"""Records as text."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.tokenizing import TOKENIZER, run_here, settings, some_items, write_items
from unitoken.codec.passages import describe
from unitoken.codec.text import load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.open import open_store
from unitoken.tokenize.__main__ import app
from unitoken.tokenize.checks.preview import read_records, show_samples
from unitoken.tokenize.merge import merge


@pytest.fixture(scope="module")
def dataset(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    run_here(settings(vqgan), write_items(folder, some_items(folder, 6)), folder / "out")
    merge(str(folder / "out"))
    return folder / "out"


def test_a_record_is_described_in_passages(dataset: Path) -> None:
    record = list(read_records(open_store(str(dataset))))[3]
    passages = describe(record, Vocabulary.load(dataset / "vocabulary.json"), load_tokenizer(str(TOKENIZER)))
    assert passages == [
        ("special", "<s>", False),
        ("image", "[image 4x4]", False),
        ("text", " and ", False),
        ("image", "[image 4x4]", False),
        ("special", "<reserved08706>", False),
        ("text", "Now ", True),
        ("image", "[image 4x4]", True),
        ("special", "<reserved08706>", True),
        ("text", "Thanks", False),
        ("special", "<reserved08706>", False),
    ]


def test_the_command_shows_samples(dataset: Path, vqgan: Path) -> None:
    config = ["--config", "yamls/tokenize/chameleon.yaml", f"tokenizer={TOKENIZER}"]
    result = CliRunner().invoke(app, ["preview", str(dataset), "--n", "2", *config])
    assert result.exit_code == 0
    assert len(re.findall(r"\d+ tokens, \d+ trained on", result.stdout)) == 2
    assert "[image 4x4]" in result.stdout


def test_another_tokenizer_is_refused(dataset: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"was made with another tokenizer: its vocabulary is [0-9a-f]{16}, .* is [0-9a-f]{16}",
    ):
        show_samples(str(dataset), str(TOKENIZER.parent / "tokenizer_llama_style"), 1)


def test_records_are_read_in_order_as_by_streaming(dataset: Path) -> None:
    from streaming import StreamingDataset

    ours = [record.to_mds() for record in read_records(open_store(str(dataset)))]
    theirs = [
        Record.from_mds(sample).to_mds()
        for sample in StreamingDataset(local=str(dataset), batch_size=1, shuffle=False)
    ]
    assert str(ours) == str(theirs)
    assert len(ours) == 6
