"""python -m unitoken.streaming_data: what is printed and written, and what is refused."""

import ast
import gc
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from support.small_datasets import (
    flip_byte,
    make_record,
    shard_paths,
    small_vocabulary,
    text_records,
    write_dataset,
)
from unitoken.dataset.manifest import load_manifest
from unitoken.dataset.mds_index import read_index
from unitoken.storage.folder import Folder
from unitoken.storage.open import open_store
from unitoken.storage.store import StoreError
from unitoken.streaming_data import sources
from unitoken.streaming_data.__main__ import app
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.tools.sweep import SweepRow, sweep_table

VOCABULARY = small_vocabulary()


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "text", text_records(300))
    write_dataset(tmp_path / "pictures", [make_record(f"p{n}", VOCABULARY, 5, 1) for n in range(80)])
    data = {
        "streams": {name: {"local": str(tmp_path / name), "proportion": 1} for name in ("text", "pictures")},
        "unit": "tokens", "packed_length": 1024, "global_batch": 1, "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump({"name": "any", "optimizer": {"lr": 1e-3}, "data": data}))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("file", ["stage.yaml", "data.yaml"])
def test_plan_prints_the_mixture_of_a_stage_or_of_its_data_alone(stage: Path, file: str) -> None:
    code, out = run("plan", stage.parent / file, "data.seed=3", "--image-size", "16", "--patch-size", "4")
    assert code == 0
    assert "of tokens" in out
    assert "50.0%" in out
    assert "packs" in out
    assert "sd of independent draws" in out
    assert max(map(len, out.splitlines())) <= 80


def test_plan_sweeps_lengths_and_marks_the_best(stage: Path) -> None:
    code, out = run("plan", stage, "--sweep-length")
    assert code == 0
    table = out[out.index("packed_length") :].splitlines()
    assert len(table) == 11
    assert table[-1].startswith("too few packs to compare: ")
    assert sum("<- best" in line for line in table) == 1
    short = table[1]  # 729 features and the tokens of a picture go into 1,024
    assert "1,024" in short
    assert "%" in short


def test_a_sweep_is_printed_where_the_settings_make_no_plan(stage: Path) -> None:
    code, out = run("plan", stage, "data.global_batch=4096", "--sweep-length")
    assert code == 2
    assert sum("<- best" in line for line in out.splitlines()) == 1
    assert re.search(r"; lower data.global_batch to at most \d+, or raise `repeat` or `epoch_samples`", out)


def test_plan_writes_its_page(stage: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    settings = ("data.global_batch=2", "max_duration=3ep")
    code, out = run("plan", stage, *settings, "--report", page)
    assert (code, out.splitlines()[-1]) == (0, str(page))
    text = page.read_text()
    assert "x 3 epochs" in text
    assert "Add <code>--sweep-length</code>" in text
    assert len(text) < 300_000
    code, out = run("plan", stage, *settings, "--report", tmp_path / "none" / "plan.html")
    assert (code, out.splitlines()[-1][:22]) == (2, "error: --report " + str(tmp_path)[:6])


def test_plan_warns_of_mixtures_that_are_likely_mistakes(stage: Path) -> None:
    assert "warning" not in run("plan", stage)[1]
    write_dataset(
        stage.parent / "drawn", [make_record(f"d{n}", VOCABULARY, 5, answer_images=1) for n in range(20)]
    )
    manifest = load_manifest(stage.parent / "drawn")
    changed = manifest.model_copy(update={"vision": manifest.vision.model_copy(update={"precision": "bf16"})})
    (stage.parent / "drawn" / "manifest.json").write_bytes(changed.dump())
    drawn = f"data.streams.drawn={{local: {stage.parent}/drawn, proportion: 1}}"
    warnings = [
        line
        for line in run("plan", stage, drawn, "data.streams.text.max_tokens=12")[1].splitlines()
        if "warning" in line
    ]
    assert len(warnings) == 2
    assert warnings[0].startswith(
        "warning: streams 'pictures' and 'drawn' have image codes of different tokenizers: precision "
    )
    assert warnings[1].startswith("warning: stream 'text': ")


def test_a_place_that_can_not_be_written_is_one_line(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "META.yaml").write_text("META: [{path: a/record.json, ratio: 1.0}]")
    for command in (
        ("convert-config", tmp_path / "META.yaml", "--out"),
        ("export-webdataset", tmp_path / "text"),
    ):
        code, out = run(*command, tmp_path / "META.yaml" / "x")
        assert code > 0
        assert re.fullmatch(r"error: \S*META.yaml/x: cannot be (created|written): Not a directory\n", out), (
            out
        )


def test_a_mistake_is_one_line_and_status_2(stage: Path, tmp_path: Path) -> None:
    code, out = run("plan", stage, "data.unit=bytes")
    assert (code, out.count("\n")) == (2, 1)
    code, out = run("plan", tmp_path / "none.yaml")
    assert code == 2
    assert "cannot read the configuration" in out


def test_the_references_data_file_becomes_streams(tmp_path: Path) -> None:
    meta = tmp_path / "META.yaml"
    meta.write_text(
        "META:\n- path: /data/llava/record.json\n- path: /data/mjv_10m/record.json\n"
        "  ratio: 0.333\n  type: default\n"
        "- path: other/llava/record.json\n  ratio: 1.0\n"
    )
    code, _ = run("convert-config", meta, "--out", tmp_path / "data.yaml", "--datasets", "s3://bucket/sets")
    assert code == 0
    text = (tmp_path / "data.yaml").read_text()
    data = yaml.safe_load(text)["data"]
    assert {name: stream.get("repeat") for name, stream in data["streams"].items()} == {
        "llava": None,
        "mjv_10m": 0.333,
        "llava_2": None,
    }
    assert "# /data/mjv_10m/record.json" in text
    config = DataConfig.model_validate(data)
    assert config.streams["llava_2"].remote == "s3://bucket/sets/llava_2"
    code, out = run("convert-config", meta, "--out", tmp_path / "data.yaml")
    assert code == 2
    assert "exists already" in out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("META: []", "at least 1 item"),
        ("META:\n- ratio: 1", "'META.0.path' is missing"),
        ("META:\n- path: a.json\n  ratoi: 1", "did you mean 'ratio'"),
        ("META:\n- path: a.json\n  ratio: -1", "greater than or equal to 0"),
        ("streams: {}", "unknown key 'streams'"),
    ],
)
def test_a_data_file_that_is_none_is_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "META.yaml").write_text(text)
    code, out = run("convert-config", tmp_path / "META.yaml")
    assert code == 2
    assert found in out


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from unitoken.streaming_data.__main__ import app; "
    code += "app(['--help'], standalone_mode=False); "
    code += "print({'torch', 'streaming', 'pyarrow', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "set()"
    assert all(command in out for command in ("plan", "convert-config", "export-webdataset"))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    records = [make_record(f"i/{n}.x", VOCABULARY, 3 + n % 7, n % 3, n % 2) for n in range(25)]
    return write_dataset(tmp_path / "mixed", records)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves its files open
def test_stock_webdataset_reads_an_export_with_its_own_decoders(tmp_path: Path, mixed: Path) -> None:
    import webdataset

    from unitoken.streaming_data.reading.shards import Shards

    code, out = run("export-webdataset", mixed, tmp_path / "tars", "--samples-per-tar", 10)
    assert (code, out) == (0, f"3 tars in {tmp_path / 'tars'}\n")
    tars = sorted(map(str, (tmp_path / "tars").glob("*.tar")))
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    shards = Shards("data", mixed, read_index(mixed), None, tmp_path / "stamps")
    records = [shards.record(shard, n) for shard, count in enumerate(shards.samples) for n in range(count)]
    assert len(found) == len(records) == 25
    for number, (sample, record) in enumerate(zip(found, records, strict=True)):
        assert sample["__key__"] == f"{number:09}"
        assert sample["tokens.npy"].dtype == record.tokens.dtype
        assert sample["tokens.npy"].tolist() == record.tokens.tolist()
        assert sample["json"]["id"] == record.id
        assert sample["json"]["target_spans"] == record.target_spans.tolist()
        assert sample["json"]["image_spans"] == record.image_spans.tolist()
        pictures = sorted(name for name in sample if name.endswith(".png"))
        assert pictures == [f"{n}.png" for n in range(len(record.images))]
        assert all(sample[name].size == (4, 4) for name in pictures)
    gc.collect()
    summary = json.loads((tmp_path / "tars" / "webdataset.json").read_text())
    assert summary["samples"] == 25


def test_an_export_repeats_its_bytes_and_needs_an_empty_place(tmp_path: Path, mixed: Path) -> None:
    for out in ("one", "two"):
        assert run("export-webdataset", mixed, tmp_path / out)[0] == 0
    assert (tmp_path / "one" / "000000.tar").read_bytes() == (tmp_path / "two" / "000000.tar").read_bytes()
    code, out = run("export-webdataset", mixed, tmp_path / "one")
    assert code == 2
    assert "found webdataset.json" in out
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "thesis.doc").write_bytes(b"")
    assert "found thesis.doc" in run("export-webdataset", mixed, tmp_path / "three")[1]


def test_a_killed_export_continues_with_its_current_tar(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("export-webdataset", mixed, tmp_path / "out", "--samples-per-tar", 10)
    upload, uploaded = Folder.upload, []

    def dies_at_the_second(self: Folder, path: Path, name: str) -> None:
        uploaded.append(name)
        if len(uploaded) == 2:
            raise StoreError("the disk is full")
        upload(self, path, name)

    monkeypatch.setattr(Folder, "upload", dies_at_the_second)
    assert run(*command) == (1, "error: the disk is full\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000000.tar",
        "webdataset.begun.json",
    ]
    code, out = run(*command[:-1], 5)  # other tars would lie beside the first
    assert code == 2
    assert "this export begun, found webdataset.begun.json" in out
    first = (tmp_path / "out" / "000000.tar").stat()
    assert run(*command)[0] == 0
    assert uploaded[2:] == ["000001.tar", "000002.tar", "vocabulary.json"]  # others are written
    assert (tmp_path / "out" / "000000.tar").stat() == first
    assert run(*command[:2], tmp_path / "whole", *command[3:])[0] == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert sorted(files) == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
        "README.md",
        "vocabulary.json",
        "webdataset.json",
    ]


def test_tars_that_are_not_an_export_are_left_alone(tmp_path: Path, mixed: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.tar").write_bytes(b"mine")
    code, out = run("export-webdataset", mixed, tmp_path / "out")
    assert code == 2
    assert "found 000000.tar" in out
    assert (tmp_path / "out" / "000000.tar").read_bytes() == b"mine"
    assert run("export-webdataset", mixed, mixed)[0] == 2


def test_pictures_are_called_by_what_they_are(tmp_path: Path) -> None:
    record = make_record("a", VOCABULARY, 4, 7)
    kinds = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]
    pictures = []
    for kind in kinds:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, kind)
        pictures.append(buffer.getvalue())
    record.images = (*pictures, b"")  # one that was not kept
    write_dataset(tmp_path / "data", [record])
    assert run("export-webdataset", tmp_path / "data", tmp_path / "out")[0] == 0
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        names = tar.getnames()
        assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in tar)
        members = [tar.extractfile(name) for name in names[2:]]
        assert [member.read() for member in members if member is not None] == pictures
    endings = ["jpg", "png", "gif", "bmp", "tif", "webp"]
    assert names == [
        "000000000.json",
        "000000000.tokens.npy",
        *(f"000000000.{n}.{e}" for n, e in enumerate(endings)),
    ]


def test_an_export_of_what_is_no_dataset_or_damaged_is_one_line(tmp_path: Path, mixed: Path) -> None:
    code, out = run("export-webdataset", tmp_path / "none", tmp_path / "out")
    assert (code, out.count("\n")) == (2, 1)
    flip_byte(shard_paths(mixed)[0])
    code, out = run("export-webdataset", mixed, tmp_path / "out")
    assert (code, out.count("\n")) == (1, 1)
    assert "corrupt" in out
    assert not (tmp_path / "out" / "webdataset.json").exists()


def test_a_remote_dataset_is_exported_from_its_store(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sources,
        "open_store",
        lambda url, *args: open_store(str(mixed) if url == "s3://bucket/mixed" else url),
    )
    assert run("export-webdataset", "s3://bucket/mixed", tmp_path / "remote")[0] == 0
    assert run("export-webdataset", mixed, tmp_path / "local")[0] == 0
    assert (tmp_path / "remote" / "000000.tar").read_bytes() == (
        tmp_path / "local" / "000000.tar"
    ).read_bytes()


def test_names_and_ratios_survive_whatever_is_in_them(tmp_path: Path) -> None:
    """Paths as in the reference's own files, and worse ones."""
    paths = [
        "/home/meta_data/pretokenization/records_ureader_1.1m/record.json",
        "/home/meta_data/pretokenization/records_en_synthdog@col1_200k/record.json",
        "path/to/record1.json",
        "s3://bucket/3d, {scans}/train.jsonl",
        "/data/../x # y: z/record.json",
    ]
    (tmp_path / "META.yaml").write_text(
        yaml.safe_dump({"META": [{"path": p, "ratio": 1 / 3, "type": "image"} for p in paths]})
    )
    code, out = run("convert-config", tmp_path / "META.yaml", "--datasets", "my, {data}")
    assert code == 0
    config = DataConfig.model_validate(yaml.safe_load(out)["data"])
    assert list(config.streams) == [
        "records_ureader_1_1m",
        "records_en_synthdog_col1_200k",
        "record1",
        "d_3d_scans",
        "x_y_z",
    ]
    assert [s.local for s in config.streams.values()] == [f"my, {{data}}/{name}" for name in config.streams]
    assert {s.repeat for s in config.streams.values()} == {1 / 3}
    assert out.count("its type 'image' has no equivalent") == 5
    assert "tokenize" in out
    assert "migrate" in out


def test_the_best_length_is_no_short_one_that_leaves_samples_out() -> None:
    rows = [
        SweepRow(1024, 0.999, 900, 0.4, 900),
        SweepRow(2048, 0.9, 0, 1.0, 800),
        SweepRow(4096, 0.97, 0, 1.0, 400),
        SweepRow(8192, 0.9703, 0, 1.0, 200),
    ]
    text = sweep_table([*rows, SweepRow(16384, 0.0, 0, 0.0, problem="each is longer")])
    assert [line.split()[0] for line in text.splitlines() if "<- best" in line] == ["4,096"]
    assert "16,384       -  each is longer" in text


def test_the_towers_size_is_that_of_the_stages_model(stage: Path, tmp_path: Path) -> None:
    """729 features of views of 384 pixels would not fit into packs of 512; 16 of the stage's own do."""
    settings = yaml.safe_load(stage.read_text())
    settings["data"]["packed_length"] = 512
    stage.write_text(yaml.safe_dump(settings))
    assert run("plan", stage)[0] == 2
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text('{"vision_config": {"image_size": 16, "patch_size": 4}}')
    for vision in ({"image_size": 16, "patch_size": 4}, str(tmp_path / "tower")):
        stage.write_text(yaml.safe_dump({**settings, "model": {"decoder": "somewhere", "vision": vision}}))
        assert run("plan", stage)[0] == 0
        assert run("simulate", stage, "--nodes", "1", "--ranks-per-node", "1", "--batch-seconds", "1")[0] == 0
    stage.write_text(yaml.safe_dump({**settings, "model": {"vision": "google/siglip-so400m-patch14-384"}}))
    code, out = run("plan", stage)
    assert code == 2
    assert "not on this machine; assuming views of 384 pixels with patches of 14" in out
    assert "17 tokens + 730 features of 1 picture" in out


def test_proportions_that_are_no_shares_of_1_are_said_as_shares(stage: Path) -> None:
    code, out = run("plan", stage, "data.streams.text.proportion=0.7", "data.streams.pictures.proportion=0.7")
    assert code == 0
    assert "the proportions sum to 1.4 and not to 1: the shares are " in out
    assert "sum to" not in run("plan", stage, "data.streams.text.proportion=3")[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.packed_lenght=3",
            "on the command line: unknown key 'data.packed_lenght'; did you mean 'packed_length'?",
        ),
        ("data.seq_len=3", "on the command line: unknown key 'data.seq_len'"),
    ],
)
def test_a_typo_on_the_command_line_is_not_blamed_on_the_file(stage: Path, override: str, words: str) -> None:
    code, out = run("plan", stage, override)
    assert code == 2
    assert words in out


LOAD = """
import sys
import datasets
rows = datasets.load_dataset(sys.argv[1])["train"]
pictures = ("0.png", "1.png")
print([(r["json"]["id"], r["tokens.npy"], r["json"]["image_spans"],
        sum(r[n] is not None for n in pictures)) for r in rows])
"""


def test_hugging_faces_datasets_loads_a_mixed_export_whole(tmp_path: Path) -> None:
    """It takes the columns from the first samples, which have no pictures here: the card names them."""
    records = [make_record(f"t{n}", VOCABULARY, 6) for n in range(12)]
    records += [make_record(f"q{n}", VOCABULARY, 6, question_images=1 + n % 2) for n in range(8)]
    write_dataset(tmp_path / "data", records)
    assert run("export-webdataset", tmp_path / "data", tmp_path / "out", "--samples-per-tar", 10)[0] == 0
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    program = [sys.executable, "-c", LOAD, str(tmp_path / "out")]
    found = subprocess.run(program, capture_output=True, text=True, env=offline, check=True)
    rows = ast.literal_eval(found.stdout.splitlines()[-1])
    assert rows == [(r.id, r.tokens.tolist(), r.image_spans.tolist(), len(r.images)) for r in records]
