"""A release: the sdist, and its wheel in an environment of its own, used from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.paths import ROOT
from support.tokenizing import TOKENIZER, some_items, write_items

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two minutes on a quiet machine


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("release")
    for name in tracked():
        if name.startswith("demo/assets/tokenizer/") or not name.startswith(("tests/", "demo/", "docs/")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "build", "--outdir", str(folder), str(folder / "source")]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def unitoken(release: Path) -> Path:
    """The command of a fresh environment that holds the built wheel, and sees this one's libraries."""
    (wheel,) = release.glob("*.whl")
    venv.create(release / "venv", with_pip=False, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(release / "venv")})
    # Paths in a .pth file bring the libraries, and not the import hook of our own editable install.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    Path(packages, "libraries.pth").write_text("\n".join(libraries) + "\n")
    install = [*PIP, "--python", str(release / "venv"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return release / "venv" / "bin" / "unitoken"


def tracked() -> list[str]:
    """The files of the repository that still exist."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


def call(command: Path, folder: Path, *arguments: Any) -> str:
    """Run the command in a folder, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(part) for part in (command, *arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_and_sdist_hold_all_modules(release: Path) -> None:
    outside = ("tests/", "demo/", "docs/", "benchmarks/", "examples/", "yamls/demo")
    modules = {
        name
        for name in tracked()
        if "/" in name and name.endswith((".py", ".yaml")) and not name.startswith(outside)
    }
    (wheel,) = release.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        assert modules <= {name.removeprefix("unitoken/") for name in opened.namelist()}
    (sdist,) = release.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        assert modules <= {name.partition("/")[2] for name in opened.getnames()}


def test_the_wheel_works_from_any_folder(unitoken: Path, vqgan: Path, tmp_path: Path) -> None:
    assert call(unitoken, tmp_path, "--version").startswith("unitoken-streaming ")
    where = "import unitoken.train.config as found; print(found.__file__)"
    place = call(unitoken.parent / "python", tmp_path, "-c", where)
    assert place.startswith(str(unitoken.parents[1]))
    call(unitoken, tmp_path, "init", "my")
    folder = tmp_path / "my"
    for name, file in (("photo-vqgan", "vqgan.safetensors"), ("text-tokenizer", "tokenizer.json")):
        assert (folder / "weights" / name / file).is_file()
    assert call(unitoken, folder, "schema", "stage") == (folder / "yamls/stage.schema.json").read_text()

    source = write_items(tmp_path, some_items(tmp_path, 8))
    settings = ["target_size=16", f"tokenizer={TOKENIZER}", f"vision.weights={vqgan}"]
    inputs = ["--in-filename", source, "--out-dir", "data/items"]
    assert "7 samples" in call(unitoken, folder, "tokenize", *inputs, *settings, "max_reject_fraction=1")
    call(unitoken, folder, "verify", "data/items")

    stage = {
        "name": "tiny",
        "model": {
            "decoder": {
                "vocab_size": 11008,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
            },
            "vision": None,
        },
        "trainable": ["model", "lm_head"],
        "optimizer": {"lr": 1e-3},
        "max_duration": "1ba",
        "data": {
            "streams": {"items": {"local": "data/items"}},
            "packed_length": 256,
            "global_batch": 1,
            "continuous": "none",
            "cache": "cache",
        },
        "precision": "fp32",
        "save": {"folder": "runs/tiny"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(stage))
    assert "items" in call(unitoken, folder, "plan", "tiny.yaml")
    call(unitoken, folder, "train", "tiny.yaml", "-n", "1")
    assert (folder / "runs/tiny/latest").exists()
