"""Datasets that the reference tokenized are converted into ours."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset

from support.tokenizing import TOKENIZER, content, png
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import Manifest, load_vocabulary
from unitoken.dataset.record import Record
from unitoken.tokenize.checks.verify import verify
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.merge import merge
from unitoken.tokenize.migrate import Migration, migrate
from unitoken.tokenize.plain_pickle import MAX_BYTES

BOS, START, END, NEWLINE, GRID_1, TURN = 0, 8197, 8196, 8803, 8805, 8710
BLOCK = [START, GRID_1, GRID_1, 4, 5, NEWLINE, 6, 7, NEWLINE, END]  # 2 x 2 latents
TEXT = [BOS, 9300, TURN, 9400, 9401, TURN]


def settings(**changes: Any) -> TokenizeConfig:
    fields = {"tokenizer": str(TOKENIZER), "vision": {"weights": "none"}, "target_size": 32, "chunk_size": 2}
    return TokenizeConfig.model_validate(fields | changes)


def item(tokens: list[int], trained: int, **others: Any) -> dict[str, Any]:
    """Make an item of the reference whose last `trained` tokens are trained on."""
    labels = [-100] * (len(tokens) - trained) + tokens[len(tokens) - trained :]
    return {"token": tokens, "label": labels, "id": 0, "raw_image": [], **others}


def dataset(folder: Path, values: list[Any]) -> Path:
    """Write what the reference leaves: a pickle for each value (bytes as they are), and their list."""
    entries = []
    for number, value in enumerate(values):
        file = folder / f"{number}.pkl"
        file.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
        length = (
            len(value["token"]) if isinstance(value, dict) and isinstance(value.get("token"), list) else 0
        )
        entries.append({"file": str(file), "len": length, "id": number})
    (folder / "record.json").write_text(json.dumps(entries))
    return folder / "record.json"


def run(record: Path, out: Path, config: TokenizeConfig | None = None, **others: Any) -> Manifest:
    migrate(record, str(out), config or settings(), **others)
    manifest = merge(str(out))
    assert verify(str(out)) == []
    return manifest


def reasons(out: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines()]


def records(out: Path) -> list[Record]:
    return [
        Record.from_mds(sample) for sample in StreamingDataset(local=str(out), batch_size=1, shuffle=False)
    ]


def test_recorded_output_of_the_reference_is_kept_exactly(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = json.loads((golden / "dev" / "A_pretokenize_cli.json").read_text())
    files = {
        Path(name).name: value for name, value in recorded["output_files"].items() if name.endswith(".pkl")
    }
    for name, value in files.items():
        (tmp_path / name).write_bytes(pickle.dumps(value))
    entries = [
        {**line, "file": str(tmp_path / Path(line["file"]).name)} for line in recorded["concat_record"]
    ]
    (tmp_path / "record.json").write_text(json.dumps(entries))
    monkeypatch.chdir(golden / "assets")  # relative names of images start at the current folder
    manifest = run(tmp_path / "record.json", tmp_path / "out", settings(target_size=512))

    assert (manifest.items, manifest.rejected, manifest.images) == (4, 0, 3)
    assert (manifest.adapter, manifest.compat, manifest.vision.weights) == (
        "record.json",
        "unitoken",
        "unknown",
    )
    assert load_vocabulary(tmp_path / "out").image_ids[0] == 4
    for record, value in zip(records(tmp_path / "out"), files.values(), strict=True):
        assert record.id == str(value["id"])
        assert record.tokens.tolist() == value["token"]
        assert record.labels().tolist() == value["label"]
        names = value["raw_image"] if isinstance(value["raw_image"], list) else [value["raw_image"]]
        assert record.images == tuple(Path(name).read_bytes() for name in names)
        assert [span[2:].tolist() for span in record.image_spans] == [[32, 32]] * len(names)


def test_a_stopped_migration_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = dataset(tmp_path, [item(TEXT, 3)] * 7)
    run(record, tmp_path / "whole")
    written = Migration.write_chunk

    def stop(self: Any, chunk: Any, report: Any) -> None:
        if chunk.name == "chunk-000002":
            raise KeyboardInterrupt
        written(self, chunk, report)

    monkeypatch.setattr(Migration, "write_chunk", stop)
    with pytest.raises(KeyboardInterrupt):
        migrate(record, str(tmp_path / "out"), settings())
    monkeypatch.undo()
    before = (tmp_path / "out" / "chunk-000001").stat().st_ino
    run(record, tmp_path / "out")
    assert (tmp_path / "out" / "chunk-000001").stat().st_ino == before
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    record = dataset(tmp_path, [item(TEXT, 3)])
    run(record, tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"adapter is 'record.json' there and 'record.json without images' now"
    ):
        migrate(record, str(tmp_path / "out"), settings(), without_images=True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (item(TEXT, 0), "nothing to train on: all labels are masked"),
        (
            {**item(TEXT, 3), "label": [1] * 6},
            "bad labels: expected -100 or the token itself at each of 6 places",
        ),
        ({**item(TEXT, 3), "label": TEXT[:5]}, "bad labels: "),
        ({**item(TEXT, 3), "label": None}, "bad labels: "),
        (item([BOS, 70000, TURN], 2), "bad tokens: expected some from 0 to 11007"),
        (item([BOS, -1, TURN], 2), "bad tokens: "),
        (item([BOS, 1 << 70, TURN], 1), "bad tokens: "),
        ({**item(TEXT, 3), "token": [1.5] * 6}, "bad tokens: expected a list of whole numbers"),
        ({**item(TEXT, 3), "token": [[[1] * 9] * 9] * 6}, "bad tokens: expected a list of whole numbers"),
        ({**item(TEXT, 3), "token": []}, "bad tokens: "),
        ({"token": "x"}, "bad pickle: "),
        ([1, 2], "bad pickle: "),
        (item([BOS, *BLOCK[:-1], TURN], 1), "broken image: 1 starts and 0 ends of an image"),
        (
            item([BOS, *BLOCK[:5], 9999, *BLOCK[6:], TURN], 1),
            "broken image: at token 1: an image block with a token that",
        ),
        (item([BOS, *BLOCK[:3], END, TURN], 1), "broken image: at token 1: "),
        (item([BOS, START, END, TURN], 1), "broken image: at token 1: "),
        (item([BOS, *BLOCK, TURN], 1), "no originals: 1 images in the tokens, 'raw_image' is []"),
        (item([BOS, *BLOCK, TURN], 1, raw_image=[3]), "no originals: "),
        (item([BOS, *BLOCK, TURN], 1, raw_image="none.png"), "no such image: none.png"),
        (b"", "not a plain pickle: "),
        (pickle.dumps(item(TEXT, 3))[:-20], "not a plain pickle: "),
        (b"]e.", "not a plain pickle: "),  # each allowed, together nonsense
        (pickle.dumps({"token": np.arange(3)}), "not a plain pickle: "),
    ],
)
def test_a_bad_item_is_one_reject(tmp_path: Path, value: Any, reason: str) -> None:
    record = dataset(tmp_path, [item(TEXT, 3), value, item(TEXT, 3)])
    manifest = run(record, tmp_path / "out")
    assert (manifest.items, manifest.samples, manifest.rejected) == (3, 2, 1)
    assert reasons(tmp_path / "out")[0].startswith(reason)


def test_bad_lines_of_the_record_are_rejects(tmp_path: Path) -> None:
    record = dataset(tmp_path, [item(TEXT, 3)] * 2)
    good, other = json.loads(record.read_text())
    (tmp_path / "large.pkl").touch()
    with open(tmp_path / "large.pkl", "r+b") as file:
        file.truncate(MAX_BYTES + 1)
    bad = [
        3,
        {"len": 6},
        {"file": "none.pkl"},
        {"file": str(tmp_path)},
        {**other, "len": 7},
        {"file": str(tmp_path / "large.pkl")},
    ]
    record.write_text(json.dumps([good, *bad]))
    assert run(record, tmp_path / "out").rejected == len(bad)
    kinds = [reason.partition(": ")[0] for reason in reasons(tmp_path / "out")]
    assert kinds == [
        "bad record",
        "bad record",
        "no such pickle",
        "no such pickle",
        "length differs",
        "pickle too large",
    ]


def test_an_image_of_another_size_than_the_settings_is_a_reject(tmp_path: Path) -> None:
    record = dataset(tmp_path, [item([BOS, *BLOCK, TURN], 1)])
    run(record, tmp_path / "out", settings(target_size=64))
    assert reasons(tmp_path / "out") == [
        "image of another size: 2 x 2 latents, which target_size and crop do not make"
    ]


def test_without_images_for_datasets_that_have_none(tmp_path: Path) -> None:
    lumina = item([BOS, 9300, TURN, *BLOCK, TURN], 11)
    del lumina["raw_image"]
    record = dataset(tmp_path, [lumina])
    assert run(record, tmp_path / "out", without_images=True).images == 1
    assert records(tmp_path / "out")[0].images == (b"",)
    assert run(record, tmp_path / "with").rejected == 1


def test_relative_names_of_images_start_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.png").write_bytes(png())
    (tmp_path / "here" / "b.png").write_bytes(b"<html>")
    record = dataset(
        tmp_path, [item([BOS, *BLOCK, TURN], 1, raw_image=[name]) for name in ("a.png", "b.png")]
    )
    monkeypatch.chdir(tmp_path / "here")
    run(record, tmp_path / "out")
    assert records(tmp_path / "out")[0].images == (png(),)
    assert reasons(tmp_path / "out")[0].startswith("unusable image: b.png: not an image")


def test_a_tokenizer_without_image_codes_is_refused(tmp_path: Path) -> None:
    other = str(TOKENIZER.parent / "tokenizer_llama_style")
    with pytest.raises(
        ConfigError, match="expected the tokenizer of the dataset, found no image codes in it"
    ):
        migrate(dataset(tmp_path, [item(TEXT, 3)]), str(tmp_path / "out"), settings(tokenizer=other))
    assert not (tmp_path / "out").exists()
