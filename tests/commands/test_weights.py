"""`unitoken weights`, with a hub made of folders: what is fetched, and what happens when the hub fails."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from unitoken.commands.app import app

QWEN = "Qwen/Qwen3-0.6B"
JANUS = "deepseek-community/Janus-Pro-1B"
SIGLIP = "google/siglip-base-patch16-224"
INDEX = {
    "weight_map": {
        "lm_head.weight": "a.safetensors",
        "model.vqmodel.quantize.embedding.weight": "b.safetensors",
    }
}
FILES = {
    QWEN: ["config.json", "model.safetensors", "merges.txt", "tokenizer.json", "model.bin", "modeling.py"],
    JANUS: [
        "config.json",
        "model.safetensors.index.json",
        "a.safetensors",
        "b.safetensors",
        "tokenizer.json",
    ],
    SIGLIP: ["config.json", "model.safetensors", "flax_model.msgpack"],
}


class Hub:
    """Serves FILES; every file holds its name, or an index. `fails_at` is a file that it does not give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.fails_at = ""
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def model_info(self, name: str) -> SimpleNamespace:
        files = FILES.get(name, ["config.json", "model.safetensors"])
        return SimpleNamespace(sha="1234", siblings=[SimpleNamespace(rfilename=file) for file in files])

    def download(self, name: str, file: str, revision: str, local_dir: Path) -> str:
        assert revision == "1234"
        self.asked.append(f"{name}/{file}")
        if self.asked[-1] == self.fails_at:
            raise ConnectionError("no route to the hub\nand a hint")
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / file).write_text(json.dumps(INDEX) if "index" in file else file)
        return str(local_dir / file)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["weights", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_open_weights_are_tensors_and_settings_only(hub: Hub, tmp_path: Path) -> None:
    status, out, error = call("open", "--out", tmp_path / "w")
    assert (status, error) == (0, "")
    assert [line.split(": ")[0] for line in out.splitlines()] == [
        f"{tmp_path}/w/{name}" for name in ("Qwen3-0.6B", "Janus-Pro-1B", "siglip-base-patch16-224")
    ]
    assert content(tmp_path / "w") == [
        "Janus-Pro-1B/b.safetensors",
        "Janus-Pro-1B/config.json",
        "Janus-Pro-1B/model.safetensors.index.json",
        "Qwen3-0.6B/config.json",
        "Qwen3-0.6B/merges.txt",
        "Qwen3-0.6B/model.safetensors",
        "Qwen3-0.6B/tokenizer.json",
        "siglip-base-patch16-224/config.json",
        "siglip-base-patch16-224/model.safetensors",
    ]


def test_chameleons_weights_end_with_what_meta_gives(hub: Hub, tmp_path: Path) -> None:
    status, out, _ = call("chameleon", "--out", tmp_path)
    assert status == 0
    assert out.splitlines()[-1].endswith("unitoken convert-vqgan FOLDER weights/vqgan")
    assert len(out.splitlines()) == 3


def test_a_hub_that_fails_is_one_line_and_the_rest_stays(hub: Hub, tmp_path: Path) -> None:
    hub.fails_at = f"{JANUS}/b.safetensors"
    status, out, error = call("--out", tmp_path)
    assert (status, out.count("\n")) == (1, 1)
    assert error == (
        f"error: {JANUS}: can not be fetched: no route to the hub and a hint; "
        "the same command goes on from here\n"
    )
    assert (tmp_path / "Qwen3-0.6B" / "model.safetensors").is_file()
    hub.fails_at = ""
    assert call("--out", tmp_path)[0] == 0


def test_no_network_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError(f"{name}: no network")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=offline))
    status, _, error = call("--out", tmp_path)
    assert (status, error.count("\n")) == (1, 1)
    assert hub.asked == []
    assert call("other")[0] == 2
