"""Measure the tokenizer: our worker against the reference's loop, on the same pictures and weights.

    python -m benchmarks.tokenizing [--full] [--short] [--rounds 5] [--source-items 10000000]

The baseline is UniToken's `pretokenize` as a loop: each image is opened, cropped, encoded alone and
pickled, one after the other in one process. It uses our crop and our codes, and nothing else of our code.
It has as many of torch's threads as our worker (one on a CPU); `baseline_2_threads_images_per_s` is the
same with two. Our worker is one process too; `splits_2` are two of them, as one would run on a machine with
two cores. Both programs load their models first and then take turns. Figures are medians over the rounds;
ratios are taken within a round, and their spread is given.

small       The demo's VQGAN at 16 pixels, handwritten digits: overhead dominates.
golden_512  A VQGAN of 2 million parameters at 512 pixels, photographs: arithmetic dominates.
full_*      (--full, on a GPU) Chameleon's size with random weights at 512 pixels, in each precision.

`share_of_encoder_rate` is our rate from files to files over that of the image tokenizer alone, with batches
of the same size. `code_agreement` and `psnr` (of the pictures that the float32 decoder makes of the codes)
compare each precision in batches with float32 and one picture at a time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import source_memory
from benchmarks.sides import Setting, baseline, ours
from demo.digits import picture
from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.dataset import images
from unitoken.tokenize.config import TokenizeConfig

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden" / "assets"
DEMO = ROOT / "demo" / "assets"
PRECISIONS = ("fp32", "tf32", "bf16")
COMPARED = {"small": 512, "golden_512": 8}  # pictures, for the precisions
LOSSLESS = 99.0  # decibels: JSON has no infinity
FULL_SIZE = """
model:
  params:
    embed_dim: 256
    n_embed: 8192
    ddconfig: {z_channels: 256, resolution: 512, ch: 128, ch_mult: [1, 1, 2, 2, 4], num_res_blocks: 2}
"""


# --- settings -------------------------------------------------------------------------------------


def small(folder: Path, device: str) -> Setting:
    """Handwritten digits at 16 pixels with the demo's tokenizers."""
    from sklearn.datasets import load_digits

    digits = load_digits().images
    source = write_items(folder, [picture(digit) for digit in digits], "png", items=4000)
    settings = config(DEMO / "tokenizer", DEMO / "vqgan", 16, 64, "fp32")
    return Setting("small", settings, source, device, items=4000, baseline_items=500)


def golden_512(folder: Path, device: str) -> Setting:
    """Photographs at 512 pixels with the tokenizers of the tests' golden files."""
    source = write_items(folder, photographs(16), "jpg", items=24)
    settings = config(GOLDEN / "tokenizer", GOLDEN / "vqgan", 512, 8, "fp32")
    return Setting("golden_512", settings, source, device, items=24, baseline_items=8)


def full(folder: Path, precision: str, weights: Path) -> Setting:
    """Photographs at 512 pixels with a VQGAN of Chameleon's size, on a GPU."""
    items, baseline_items = {"fp32": (1500, 100), "tf32": (4000, 200), "bf16": (6000, 200)}[precision]
    source = write_items(folder, photographs(64), "jpg", items)
    settings = config(GOLDEN / "tokenizer", weights, 512, 32, precision)
    return Setting(f"full_{precision}", settings, source, "cuda", items, baseline_items)


def config(tokenizer: Path, weights: Path, size: int, batch_size: int, precision: str) -> TokenizeConfig:
    """Make the settings of a tokenization."""
    vision = ImageTokenizerConfig.model_validate(
        {"weights": str(weights), "batch_size": batch_size, "precision": precision}
    )
    return TokenizeConfig(
        tokenizer=str(tokenizer), vision=vision, target_size=size, chunk_size=max(200, 8 * batch_size)
    )


def photographs(count: int) -> list[Image.Image]:
    """Cut parts from four real photographs, 768 x 576 each."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(photo) for photo in load_sample_images().images]
    whole += [
        Image.open(path).convert("RGB")
        for path in (GOLDEN / "images" / "d01_rgb.jpg", GOLDEN / "images" / "d10_large.jpg")
    ]
    rng = np.random.default_rng(0)
    parts = []
    for number in range(count):
        photo = whole[number % len(whole)]
        width, height = (round(side * rng.uniform(0.6, 1)) for side in photo.size)
        left, upper = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
        part = photo.crop((left, upper, left + width, upper + height))
        parts.append(part.resize((768, 576), Image.Resampling.BICUBIC))
    return parts


def write_items(folder: Path, pictures: list[Image.Image], suffix: str, items: int) -> Path:
    """Write items.json and the pictures, which the items use in turns."""
    folder.mkdir()
    for number, image in enumerate(pictures):
        image.save(folder / f"{number}.{suffix}", quality=90)
    content = []
    for number in range(items):
        question = {"from": "human", "value": "<|image|> What is this?"}
        answer = {"from": "gpt", "value": f"This is number {number} of the pictures, in a few words."}
        image_name = f"{number % len(pictures)}.{suffix}"
        content.append({"conversations": [question, answer], "image": [image_name]})
    source = folder / "items.json"
    source.write_text(json.dumps(content))
    return source


def random_weights(folder: Path) -> Path:
    """Write a VQGAN of Chameleon's size with random weights."""
    from safetensors.torch import save_file

    from unitoken.codec.image_tokenizer.chameleon import VQGAN, meta_name
    from unitoken.codec.image_tokenizer.files import read_parameters

    folder.mkdir()
    (folder / "vqgan.yaml").write_text(FULL_SIZE)
    torch.manual_seed(0)
    model = VQGAN(read_parameters(folder / "vqgan.yaml"))
    state = {meta_name(name, 5): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "vqgan.safetensors")
    return folder


# --- measuring ------------------------------------------------------------------------------------


@contextmanager
def process(target: Any, setting: Setting) -> Iterator[Connection]:
    """Run `target` in a process of its own, and give the connection to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=target, args=(there, setting), daemon=True)
    child.start()
    there.close()
    try:
        yield here
        here.send(None)
        child.join()
    finally:
        child.terminate()


def ask(connection: Connection, task: Any) -> Any:
    """Send a request, and wait for the answer."""
    connection.send(task)
    return connection.recv()


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """Measure both programs in turns.

    Returns:
        The medians over the rounds; a round before them, to warm up, is not counted.
    """
    measured: list[dict[str, Any]] = []
    with (
        process(ours, setting) as first,
        process(ours, setting) as second,
        process(baseline, setting) as reference,
    ):
        for _ in range(rounds + 1):
            figures = ask(first, ("worker", 0, 1))
            figures["encoder_images_per_s"] = ask(first, ("encoder",))
            figures["baseline_images_per_s"] = ask(reference, (1, setting.baseline_items))
            figures["ratio_vs_baseline"] = figures["images_per_s"] / figures["baseline_images_per_s"]
            figures["share_of_encoder_rate"] = figures["images_per_s"] / figures["encoder_images_per_s"]
            if setting.device == "cpu":
                figures["baseline_2_threads_images_per_s"] = ask(reference, (2, setting.baseline_items // 4))
                for rank, connection in enumerate((first, second)):
                    connection.send(("worker", rank, 2))
                both = sum(connection.recv()["images_per_s"] for connection in (first, second))
                figures |= {
                    "splits_2_images_per_s": both,
                    "splits_2_ratio": both / figures["baseline_images_per_s"],
                }
            measured.append(figures)
    counted = measured[1:]
    result = {key: median([figures[key] for figures in counted]) for key in counted[0]}
    ratios = [figures["ratio_vs_baseline"] for figures in counted]
    return {**result, "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)]}


def median(values: list[Any]) -> Any:
    """Take the median of numbers, or of each entry of dicts."""
    if isinstance(values[0], dict):
        return {key: median([value[key] for value in values]) for key in values[0]}
    return round(statistics.median(values), 3)


def precisions(setting: Setting, count: int) -> dict[str, dict[str, float]]:
    """Compare the codes of each precision, in batches, with those of float32, one picture at a time."""
    vision_config, size = setting.config.vision, setting.config.target_size
    files = sorted(path for path in setting.source.parent.iterdir() if path.suffix != ".json")[:count]
    pictures = [images.tokenizer_pixels(images.decode(path.read_bytes()), (size, size)) for path in files]

    def codec(precision: str) -> Any:
        return load_vision(vision_config.model_copy(update={"precision": precision}), setting.device)

    exact = codec("fp32")
    expected = np.concatenate([exact.encode([one]) for one in pictures])
    shown = np.concatenate([exact.decode(one[None]) for one in expected]).astype(float)
    result: dict[str, dict[str, float]] = {"code_agreement": {}, "psnr": {}}
    for precision in PRECISIONS:
        vision = codec(precision)
        starts = range(0, len(pictures), vision_config.batch_size)
        codes = np.concatenate(
            [vision.encode(pictures[start : start + vision_config.batch_size]) for start in starts]
        )
        error = np.mean((np.concatenate([exact.decode(one[None]) for one in codes]) - shown) ** 2)
        result["code_agreement"][precision] = round(float((codes == expected).mean()), 4)
        result["psnr"][precision] = round(float(10 * np.log10(255**2 / error)), 2) if error else LOSSLESS
    return result


def main() -> None:
    """Parse the command line, measure every setting and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="Chameleon's size, on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--source-items",
        type=int,
        default=10_000_000,
        help="items of the input whose memory is measured; 0: do not",
    )
    parser.add_argument(
        "--short", action="store_true", help="one round of the small setting: does it run at all"
    )
    arguments = parser.parse_args()
    if arguments.short:
        arguments.rounds, arguments.source_items = 1, 100_000
    if arguments.full and not torch.cuda.is_available():
        parser.error("--full needs a GPU")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.full:
            weights = random_weights(Path(temporary, "weights"))
            settings = [full(Path(temporary, precision), precision, weights) for precision in PRECISIONS]
        else:
            settings = [small(Path(temporary, "small"), "cpu")]
            settings += [] if arguments.short else [golden_512(Path(temporary, "golden"), "cpu")]
        for setting in settings:
            results[setting.name] = measure(setting, arguments.rounds) | precisions(
                setting, COMPARED.get(setting.name, 64)
            )
            print(setting.name, json.dumps(results[setting.name], indent=1), flush=True)
    headline = results["full_tf32"] if arguments.full else results["small"]
    share = results[settings[-1].name]["share_of_encoder_rate"]  # of the setting with the most arithmetic
    report = headline | {"share_of_encoder_rate": share, "settings": results}
    if arguments.source_items:
        report |= source_memory.measure(arguments.source_items)
    device = (
        torch.cuda.get_device_name() if arguments.full else f"{platform.machine()}, {os.cpu_count()} CPUs"
    )
    print(json.dumps(report | {"device": device, "date": datetime.date.today().isoformat()}))


if __name__ == "__main__":
    main()
