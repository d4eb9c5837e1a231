"""`unitoken check`: one screen about a stage, made without a GPU and without Composer."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.simulated_step import LUMINA_7B, SIGLIP_SO400M
from support.small_datasets import make_record, small_vocabulary, text_records, write_dataset
from support.stages import write_data, write_stage
from unitoken.commands.app import app
from unitoken.common.config import load_config
from unitoken.streaming_data.reading.dataset import PackedDataset
from unitoken.train.check import check_stage
from unitoken.train.config import StageConfig
from unitoken.train.overview.documents import show_documents
from unitoken.train.overview.facts import look_at
from unitoken.train.overview.screen import duration_text

SIZES = (f"model.decoder={LUMINA_7B.model_dump_json()}", f"model.vision={SIGLIP_SO400M.model_dump_json()}")


def check(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny stage of two streams: all kinds of samples, and text."""
    folder = tmp_path_factory.mktemp("stage")
    write_data(folder / "data")
    write_dataset(folder / "text", text_records(80), small_vocabulary())
    streams = {"all": {"local": str(folder / "data")}, "text": {"local": str(folder / "text")}}
    data = {"streams": streams, "packed_length": 64, "global_batch": 4, "cache": str(folder / "cache")}
    write_stage(folder, data=data)
    return folder


def test_the_screen_names_all_that_is_known(folder: Path) -> None:
    status, out, error = check(str(folder / "tiny.yaml"), "max_duration=2ep")
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    facts = {line.split("  ")[0]: line for line in lines if re.match(r"\w+  ", line)}
    assert {"device", "model", "memory", "settings", "steps", "speed", "time", "disk"} <= set(facts)
    assert "the CPU of this machine: no GPU was found; 1 rank" in facts["device"]
    assert "of 4 packs of 64 positions" in facts["steps"]
    assert re.search(r"about [\d,]+ tokens/s: a microbatch was tried out on this CPU", facts["speed"])
    assert re.search(r"^all +\d+\.\d%", out, re.MULTILINE), "the mixture's table"
    assert out.count("documents\n") == 4, "a row for each pack"
    assert not (folder / "run").exists(), "nothing is written but the plan"


def test_bars_are_letters_or_colours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, _ = check(str(folder / "tiny.yaml"))
    assert re.search(r"^  0 \|[aAbB.|]+ +\d+%, \d+ documents$", plain, re.MULTILINE)
    assert "a/A all" in plain
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, coloured, _ = check(str(folder / "tiny.yaml"))
    assert "\x1b[48;2;" in coloured
    assert "a/A" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    _, without, _ = check(str(folder / "tiny.yaml"))
    assert "\x1b[48;2;" not in without
    assert "a/A all" in without


def test_the_first_batch_is_the_one_that_training_reads(folder: Path) -> None:
    config = load_config(StageConfig, folder / "tiny.yaml")
    overview = look_at(config, 1, None)
    resolved = check_stage(config, 1)
    dataset = PackedDataset(config.data, resolved.train.sources, views=resolved.views, batch_packs=4)
    packs = list(itertools.islice(dataset, 4))
    assert [record.id for record in overview.records] == [record.id for record in packs[0]]
    assert [len(pack) for pack in overview.batch] == [len(pack) for pack in packs]
    streams = [[segment.stream for segment in pack] for pack in overview.batch]
    assert streams == [[record.stream for record in pack] for pack in packs]


def test_speed_on_known_gpus_is_computed_and_says_so(folder: Path) -> None:
    known = (str(folder / "tiny.yaml"), *SIZES, "precision=bf16", "data.packed_length=2048")
    status, out, error = check(
        *known, "--gpu", "80gb", "-n", "2", "data.global_batch=2", "trainable=[adapter]"
    )
    assert status == 0, error
    assert "2 x GPUs of 80 GB" in out
    assert "tokens/s on H100, or " in out
    assert "assumed, not measured" in " ".join(out.split())
    _, out, _ = check(*known, "--gpu", "81gb", "data.global_batch=2", "trainable=[adapter]")
    assert "unknown: computed for bf16 on H100" in out


def test_a_batch_too_large_is_told_what_fits(folder: Path) -> None:
    large = (
        str(folder / "tiny.yaml"),
        *SIZES,
        "precision=bf16",
        "data.packed_length=2048",
        "data.global_batch=2",
    )
    status, out, error = check(*large, "microbatch=2", "--gpu", "50gb", "trainable=[adapter]")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert re.search(r"microbatch: 2 needs [\d.]+ GB of a GPU's 50 .*; activation_checkpointing=\w+ ", error)


def test_weights_that_are_not_there_are_found_before_training(folder: Path, tmp_path: Path) -> None:
    status, _, error = check(str(folder / "tiny.yaml"), f"init_from={tmp_path / 'none'}")
    assert (status, error.count("\n")) == (2, 1)
    assert "no such checkpoint" in error


def test_neither_composer_nor_streaming_is_imported(folder: Path) -> None:
    program = (
        "import sys; from unitoken.commands.app import app; "
        f"app(['check', {str(folder / 'tiny.yaml')!r}], standalone_mode=False); "
        "print(sorted({'composer', 'streaming'} & set(sys.modules)), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stderr.splitlines()[-1] == "[]"


class _Words:
    """A text tokenizer that writes each id as a word."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{number}" for number in ids) + "\n"


def test_the_text_of_a_document_shows_what_is_trained_on() -> None:
    vocabulary = small_vocabulary()
    record = make_record("q", vocabulary, 4, question_images=1)
    ids = record.tokens[-5:-1].tolist()
    name, text = show_documents([record], ["all"], vocabulary, _Words(), coloured=False)
    assert name.plain == "all: q, 16 tokens, 3 trained on, 1 image"
    start, end = text.plain.split("[image 2x2]")
    assert "{{" not in start
    asked, answered = f"w{ids[0]} w{ids[1]}\\n", f"w{ids[2]} w{ids[3]}\\n"
    assert end.startswith(f"{asked}{{{{{answered}")
    assert end.endswith("}}")
    _, coloured = show_documents([record], ["all"], vocabulary, _Words(), coloured=True)
    assert "{{" not in coloured.plain
    green = [coloured.plain[s.start : s.end] for s in coloured.spans if "green" in str(s.style)]
    assert green[0] == answered


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (80, "80 s"), (3000, "50 min"), (8000, "2 h 13 min"), (3e5, "3 days 11 h")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
