"""Makes tests/data/before, for tests/end_to_end/test_before.py: files written before the folders were moved.

It was run once, at commit f87c6d4, with that commit as the package `unitoken`:

    git worktree add /tmp/earlier f87c6d4
    mkdir /tmp/path && ln -s /tmp/earlier /tmp/path/unitoken
    PYTHONPATH=/tmp/path python tests/support/make_before.py /tmp/earlier tests/data/before

It calls commands only, so that it needs no module of either commit:

    items/           13 items and their pictures: questions, drawings, text, and one reject
    dataset/         the items tokenized
    stage.yaml       a small stage of training on a mixture of them
    plans/           the mixture's plan, as the stage saved it
    run/             the stage, killed after step 3 of 4: the checkpoint of step 2 and three lines of metrics
    metrics.jsonl    the four steps of an uninterrupted run
    model/           that run, exported
    answer/          the exported model's answer to a question about a picture
    drawing/         a picture that it drew
    machine.json     the processor, torch and threads, on which the last bits of a loss depend

Files name their input as /before/..., where the machine's own paths stood.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

SAMPLES_PER_KIND = 4
DATASET_SETTINGS = ["target_size=16", "chunk_size=5", "vision.precision=fp32", "max_reject_fraction=0.5"]
STAGE: dict[str, Any] = {
    "name": "before",
    "model": {
        "decoder": {
            "vocab_size": 583,  # of demo/assets
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "vision": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "dropout": 0.2,
    },
    "trainable": ["vit", "adapter", "model", "lm_head"],
    "optimizer": {"lr": 3e-3, "warmup": "1ba"},
    "max_duration": "4ba",
    "data": {
        "streams": {
            "questions": {"local": "dataset", "kinds": ["understanding"], "proportion": 0.5},
            "others": {"local": "dataset", "kinds": ["generation", "text"], "proportion": 0.5},
        },
        "packed_length": 64,
        "global_batch": 2,
        "cache": "cache",
    },
    "precision": "fp32",
    "save": {"folder": "run", "interval": "2ba", "keep": 2},
    "log": {"every": 100, "tensorboard": False},
}
QUESTION = ["--prompt", "What is this? <|image|>", "--image", "items/picture1.png", "--max-tokens", "24"]
DRAWING = ["--prompt", "Draw picture 2.", "--draw"]


def main(checkout: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "items").mkdir(parents=True)
    write_items(folder / "items")
    assets = checkout / "demo" / "assets"
    codec = [f"tokenizer={assets}/tokenizer", f"vision.weights={assets}/vqgan"]
    config = f"--config={checkout}/yamls/tokenize/digits.yaml"
    paths = ["--in_filename", "items/items.json", "--out_dir", "dataset"]
    call(folder, "-m", "unitoken.tokenize", "run", config, *paths, "--splits", "2", *codec, *DATASET_SETTINGS)
    for name in ("input.json", "settings.yaml"):
        replace_paths(folder / "dataset" / name, {folder: "/before", checkout: "/before/unitoken"})

    (folder / "stage.yaml").write_text(yaml.safe_dump(STAGE, sort_keys=False))
    call(folder, str(checkout / "train.py"), "stage.yaml")
    (folder / "cache" / "plans").rename(folder / "plans")
    shutil.rmtree(folder / "cache")
    call(folder, "-m", "unitoken.train", "export", "run", "model", "--dtype", "fp32")
    codec = [f"codec.{setting}" for setting in (*codec, "vision.precision=fp32")]
    for what, out in ((QUESTION, "answer"), (DRAWING, "drawing")):
        call(folder, "-m", "unitoken.train", "generate", "model", *what, "--out", out, *codec)

    shutil.copy(folder / "run" / "metrics.jsonl", folder)
    stop_half_way(folder / "run")
    (folder / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
    for leftover in (*folder.rglob(".lock"), *folder.rglob("lock"), *folder.rglob("request.json")):
        leftover.unlink()


def call(folder: Path, *command: str) -> None:
    subprocess.run(
        [sys.executable, *command], cwd=folder, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )


def write_items(folder: Path) -> None:
    items: list[dict[str, Any]] = []
    for n in range(SAMPLES_PER_KIND):
        picture, drawing = f"picture{n}.png", f"drawing{n}.png"
        colours = np.random.default_rng(n).integers(0, 256, (2, 4, 4, 3), np.uint8)
        for name, small in zip((picture, drawing), colours, strict=True):
            Image.fromarray(small).resize((20, 16), Image.Resampling.BICUBIC).save(folder / name)
        items += [
            {"id": f"text-{n}", "conversations": turns(f"How many is {n}?", f"It is {n}.")},
            {"conversations": turns("What is this? <|image|>", f"Picture {n}."), "image": picture},
            {
                "id": f"drawing-{n}",
                "conversations": turns(f"Draw picture {n}.", "<|image|>"),
                "image": [drawing],
            },
        ]
    items.insert(
        7, {"id": "reject", "conversations": turns("<|image|> and <|image|>?", "No."), "image": picture}
    )
    (folder / "items.json").write_text(json.dumps(items, indent=1))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def replace_paths(file: Path, names: dict[Path, str]) -> None:
    text = file.read_text()
    for path, name in names.items():
        text = text.replace(str(path.resolve()), name).replace(str(path), name)
    file.write_text(text)


def stop_half_way(run: Path) -> None:
    """Leave what a kill after step 3, before the next checkpoint, would have left."""
    shutil.rmtree(run / "step-00000004")
    (run / "latest").unlink()
    (run / "latest").symlink_to("step-00000002")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))


def machine() -> dict[str, object]:
    """What the last bits of a sum of floats depend on."""
    processor = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip(": \t")
    return {"torch": torch.__version__, "processor": processor, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
