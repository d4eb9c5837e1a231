"""The command line: quick help, and one line for what a user got wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.tokenizing import TOKENIZER, picture, some_items, turns, write_items
from unitoken.tokenize.__main__ import app
from unitoken.tokenize.executors import local
from unitoken.tokenize.job import Job

HEAVY = ("torch", "transformers", "streaming", "composer", "pyarrow", "numpy", "PIL")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers as calls: the processes themselves are tested in test_launch.py."""

    def work(job: Job, splits: int) -> list[str]:
        from unitoken.tokenize.pipeline.worker import run_rank

        for rank in range(splits):
            run_rank(job, rank, splits, lambda finished, rejected: None)
        return []

    monkeypatch.setattr(local, "launch", work)


def arguments(source: Path, out: Path, weights: Path) -> list[str]:
    return [
        *(
            "run",
            "--config",
            "yamls/tokenize/chameleon.yaml",
            "--in_filename",
            str(source),
            "--out_dir",
            str(out),
        ),
        *("--target_size", "16", f"tokenizer={TOKENIZER}", f"vision.weights={weights}"),
    ]


def call(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["merge", "--help"], ["preview", "--help"]])
def test_help_says_how_to_run_it(args: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "unitoken.tokenize", *args], capture_output=True, text=True, check=True
    )
    assert "python -m unitoken.tokenize" in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--config", "none.yaml", "--in_filename", "i", "--out_dir", "o"],
        ["merge", "--out_dir", "none"],
    ],
)
def test_nothing_heavy_is_imported_for_help_and_bad_settings(args: list[str]) -> None:
    program = f"""
import sys
from unitoken.tokenize.__main__ import app
try:
    app({args!r})
except SystemExit:
    print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    allowed = ["numpy"] if args[0] == "merge" else []
    assert result.stderr.splitlines()[-1] == str(allowed)


def test_a_run_from_start_to_end(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, some_items(tmp_path, 8))
    status, stdout, _ = call(*arguments(source, tmp_path / "out", vqgan), "--splits", "2")
    assert status == 0
    assert stdout.startswith(f"{tmp_path / 'out'}: 8 items -> 7 samples, 1 rejected; ")
    assert "       1  no conversations" in stdout
    assert call("merge", "--out_dir", str(tmp_path / "out")) == (0, stdout, "")


def test_too_many_rejects_give_status_1_and_common_reasons(vqgan: Path, tmp_path: Path) -> None:
    items: list[dict[str, Any]] = (
        [{}] * 7
        + [{"conversations": turns("<|image|>", "a"), "image": f"{n}.png"} for n in range(5)]
        + [{"conversations": turns("a", "b")}] * 8
    )
    source = write_items(tmp_path, items)
    status, stdout, stderr = call(*arguments(source, tmp_path / "out", vqgan))
    assert status == 1
    assert "       7  no conversations\n       5  no such image\n" in stdout
    shows = f"`unitoken rejects {tmp_path / 'out'}` shows why, and with --retry tries them again"
    assert stderr == f"error: 12 of 20 items were rejected (60.0%), max_reject_fraction is 0.01; {shows}\n"
    assert call(*arguments(source, tmp_path / "out", vqgan), "max_reject_fraction=0.7")[0] == 0


def test_a_run_without_samples_fails_and_can_be_corrected(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(
        tmp_path,
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3,
    )
    status, _, stderr = call(*arguments(source, tmp_path / "out", vqgan), "max_reject_fraction=1")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "none of the 3 items can be used; 3 times: " in stderr
    assert stderr.endswith(". adapter=messages reads 3 of them\n")
    other = [*arguments(source, tmp_path / "out", vqgan), "max_reject_fraction=1", "adapter=caption"]
    assert call(*other)[0] == 2
    assert call(*arguments(source, tmp_path / "out", vqgan), "adapter=messages")[0] == 0


def test_nothing_is_begun_if_the_first_200_items_are_unusable(vqgan: Path, tmp_path: Path) -> None:
    raw = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    source = write_items(tmp_path, [raw] * 200 + [good])
    status, _, stderr = call(*arguments(source, tmp_path / "out", vqgan))
    assert status == 2
    assert "none of the first 200 items can be used; 200 times: " in stderr
    assert stderr.endswith(". adapter=messages reads 200 of them\n")
    assert not (tmp_path / "out").exists()
    assert (
        call(
            *arguments(write_items(tmp_path, [raw] * 199 + [good]), tmp_path / "out", vqgan),
            "max_reject_fraction=1",
        )[0]
        == 0
    )


def test_missing_pictures_are_told_before_the_work(vqgan: Path, tmp_path: Path) -> None:
    item = {
        "conversations": [{"from": "human", "value": "<|image|>"}, {"from": "gpt", "value": "b"}],
        "image": "lost.png",
    }
    status, _, stderr = call(*arguments(write_items(tmp_path, [item] * 201), tmp_path / "out", vqgan))
    assert status == 2
    assert "items.json item 0: no such image: lost.png; names are relative to the folder of " in stderr


def test_missing_chunks_end_with_status_1(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, some_items(tmp_path, 4))
    assert (
        call(*arguments(source, tmp_path / "out", vqgan), "chunk_size=1", "--splits", "2", "--rank", "1")[0]
        == 0
    )
    status, _, stderr = call("merge", "--out_dir", str(tmp_path / "out"))
    assert status == 1
    assert (
        "missing 2 of 4 chunks: chunk-000000, chunk-000002. Give the same `run` command again (with --rank"
        in stderr
    )


@pytest.mark.parametrize(
    ("extra", "needed"),
    [
        (["vision.weight=x"], "unknown key 'vision.weight'; did you mean 'weights'?"),
        (["target_sise=x"], "did you mean 'target_size'?"),
        (
            ["vision.kind=emu9"],
            "on the command line: `vision.kind`: Input should be 'chameleon', 'emu3' or 'janus', "
            "found 'emu9'",
        ),
        (["vision.weights=/no/such"], "vision.weights: /no/such: no such file or folder"),
        (["tokenizer=/no/such"], "tokenizer: /no/such: no such folder"),
        (["target_size=17"], "target_size: expected a multiple of 8 pixels (2 latents) up to 792, found 17"),
        (["--config", "none.yaml"], "none.yaml: cannot read the configuration: No such file or directory"),
        (["--in_filename", "none.json"], "none.json: cannot read the input: No such file"),
        (["--splits", "2", "--rank", "2"], "--rank 2: expected a number below --splits 2"),
        (["nonsense"], "override 'nonsense': expected key=value"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    vqgan: Path, tmp_path: Path, extra: list[str], needed: str
) -> None:
    source = write_items(tmp_path, [{"conversations": turns("a", "b")}])
    status, stdout, stderr = call(*arguments(source, tmp_path / "out", vqgan), *extra)
    assert (status, stdout) == (2, "")
    assert needed in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_corrected_adapter_is_accepted_by_the_same_folder(vqgan: Path, tmp_path: Path) -> None:
    source, adapter = write_items(tmp_path, [{"conversations": turns("a", "b")}]), tmp_path / "mine.py"
    adapter.write_text("def mine(raw:\n")
    run = [*arguments(source, tmp_path / "out", vqgan), f"adapter={adapter}:mine"]
    status, _, stderr = call(*run)
    assert status == 2
    assert f"adapter: {adapter}: SyntaxError: " in stderr
    adapter.write_text("def mine(raw):\n    return raw\n")
    assert call(*run)[0] == 0


def test_later_commands_take_the_settings_of_the_run(vqgan: Path, tmp_path: Path) -> None:
    items = [{"conversations": turns("<|image|>", "a"), "image": "0.png"}, {"conversations": turns("a", "b")}]
    out = str(tmp_path / "out")
    assert call(*arguments(write_items(tmp_path, items), tmp_path / "out", vqgan))[0] == 0
    assert call("preview", out)[0] == 0
    picture(tmp_path / "0.png", 0)
    assert call("rejects", out, "--retry", "threads=1")[1].startswith(
        f"{out}: 2 items -> 2 samples, 0 rejected; "
    )
    status, _, stderr = call("rejects", out, "--retry", "target_size=24")
    assert status == 2
    assert (
        "target_size is 16 there and 24 now. Go on with the settings that it was begun with (settings.yaml"
        in stderr
    )


def test_a_folder_that_is_no_dataset_is_one_line(tmp_path: Path) -> None:
    status, _, stderr = call("preview", str(tmp_path))
    assert status == 2
    assert stderr.count("\n") == 1
    assert f"{tmp_path}: not a dataset folder: it has no manifest.json" in stderr
