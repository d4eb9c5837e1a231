"""Count and measure what a training step costs.

    python -m benchmarks.training [--short] [--rounds 5]

counted   For each shipped stage at its real size, on tensors without memory and as one of 8 GPUs: FLOPs and
          how many are recomputed, bytes of elementwise work, kernels, waits of the CPU for the GPU, graph
          breaks, and recompilations over 20 batches of changing documents and pictures.
measured  On this CPU: our step, the reference's way (padded rows) and transformers' decoder on our packs, on
          the same documents and weights, at two sizes of the vocabulary: useful tokens a CPU second, and peak
          memory. These models are small; the ratios of FLOPs of the 7B model stand beside them.
trainer   What Composer and our callbacks add to a step, and how often they wait.
saving    How long a save stops training, and the first rank's memory, against whole files; see saving.py.

The programs take turns. Figures are medians over the rounds, ratios are taken within a round. The last line
is one JSON object; `elementwise_kb_token_layer` and the like are of the worst shipped stage. What is counted
has limits: above one of them the status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import stream_sides, training_sides
from benchmarks.simulated_step import LUMINA_7B, SIGLIP_SO400M, PeakBytes
from benchmarks.step_counts import StageCounts, count_stage, waits_for_device
from benchmarks.streaming import child, machine, show
from unitoken.common.config import load_config
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.reading.batch import num_tokens, split_batch, unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.train.accounting.fitting import Fit, Fitting, PackWork, choose, describe_fit
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig, VisionTowerConfig
from unitoken.train.model.activation_checkpointing import RecomputeMode
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import count_trained, freeze

ROOT = Path(__file__).parent.parent
QWEN3_06B = DecoderConfig(
    vocab_size=151936 + 16512,  # and Janus' codes and marks
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    qk_norm="rms",
    rope_theta=1e6,
    tie_word_embeddings=True,
)
SIGLIP_BASE = VisionTowerConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
)
SHIPPED = {  # by name: sizes, and views of a pack
    "stage1": (LUMINA_7B, SIGLIP_SO400M, 2),
    "stage2": (LUMINA_7B, SIGLIP_SO400M, 2),
    "stage1-anyres": (LUMINA_7B, SIGLIP_SO400M, 10),
    "stage2-anyres": (LUMINA_7B, SIGLIP_SO400M, 10),
    "open/stage1": (QWEN3_06B, SIGLIP_BASE, 2),
    "open/stage2": (QWEN3_06B, SIGLIP_BASE, 2),
}
RANKS = 8
GPU_BYTES = 80e9
TRAINER = "unitoken.train.distributed.composer_trainer"
# Of the worst shipped stage. Layers that are not compiled move 4,080 kB, and full recomputation is 24 % of
# the FLOPs; Composer waits six times a step, and our measures once.
LIMITS = {
    "elementwise_kb_token_layer": 1400,
    "recomputed_flops_share": 0.01,
    "kernels_layer": 200,
    "graph_breaks": 0,
    "recompilations": 0,
    "host_waits_step": 7,
    "host_waits_microbatch": 0,
}
# FLOPs of the reference's padded way over ours for the 7B model: of text, of text and images, of captions.
FLOP_RATIOS_7B = {"text": 4.65, "mix": 1.65, "captions": 1.14}


# --- counted --------------------------------------------------------------------------------------


def counted() -> dict[str, Any]:
    """Count a step of each shipped stage; return the worst."""
    stages: dict[str, StageCounts] = {}
    for name, (decoder, vision, views) in SHIPPED.items():
        config = load_config(StageConfig, ROOT / f"yamls/{name}.yaml")
        fit = as_on_gpus(config, decoder, vision, views)
        config = fit.settings_in(config)
        stages[name] = count_stage(config, decoder, vision, ranks=RANKS, views=views * fit.microbatch)
        counts = {key: round(value, 4) for key, value in asdict(stages[name]).items()}
        show(name, {"chosen": describe_fit(fit), "gb": round(fit.memory.total / 1e9, 1), **counts})
    compiled = [count_compilations(mode) for mode in ("none", "full", "selective")]
    show("compiled", {"graph breaks": [each[0] for each in compiled], "more": [each[1] for each in compiled]})
    return {
        "elementwise_kb_token_layer": round(
            max(each.compiled_elementwise_kb_token_layer for each in stages.values()), 1
        ),
        "elementwise_kb_token_layer_eager": round(
            max(each.eager_elementwise_kb_token_layer for each in stages.values()), 1
        ),
        "recomputed_flops_share": round(max(each.recomputed_flops_share for each in stages.values()), 4),
        "kernels_layer": max(each.kernels_layer for each in stages.values()),
        "graph_breaks": max(each[0] for each in compiled),
        "recompilations": max(each[1] for each in compiled),
    }


def as_on_gpus(config: StageConfig, decoder: DecoderConfig, vision: VisionTowerConfig, views: int) -> Fit:
    """Return what `auto` chooses on 8 GPUs of 80 GB, for full packs, half of them trained on."""
    length = config.data.packed_length
    work = PackWork(tokens=length, squares=length**2 / 2, targets=length / 2, views=views, most_views=views)
    model = build_model(decoder, vision, config.model)
    trained = freeze(model, config.trainable)
    fitting = Fitting(config, decoder, vision, trained, count_trained(model), RANKS, work)
    return choose(fitting, GPU_BYTES)


def count_compilations(recompute: RecomputeMode, batches: int = 20) -> tuple[int, int]:
    """Train a small compiled model; return the graph breaks, and the graphs beyond one of each kind of layer.

    The batches have other documents, features and numbers of pictures each time, and some have no picture.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    vocabulary = make_vocabulary(100)
    sizes = DecoderConfig(
        vocab_size=vocabulary.size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    # Torch 2.11 has no gradient of flex attention on a CPU.
    attention: Literal["flex", "sdpa"] = "flex" if torch.__version__ < "2.11" else "sdpa"
    settings = ModelConfig(decoder=sizes, vision=training_sides.VISION, dropout=0.05, attention=attention)
    network = build_model(sizes, training_sides.VISION, settings, recompute).to_empty(device="cpu").train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    network.compile_layers(backend="aot_eager")
    views = Views(training_sides.VISION.image_size, training_sides.VISION.patch_size)
    collate = Collate(512, views, "questions", vocabulary.separator, vocabulary.newline, compat=False)
    records = training_sides.documents(vocabulary, 100, seed=1)
    for number in range(batches):
        some = list(islice(records, 1 + number % 4))
        network(unpack(collate([some[:2], some[2:]]))).total.backward()
    graphs = counters["stats"]["unique_graphs"]
    if graphs < 2:
        raise RuntimeError("decoder and tower were not both compiled")
    return sum(counters["graph_break"].values()), graphs - 2


# --- measured -------------------------------------------------------------------------------------


def make_vocabulary(text_tokens: int) -> Vocabulary:
    """Make a vocabulary of so many texts' tokens, with the image tokens behind them."""
    names = {f"t{number}": number for number in range(text_tokens)}
    return Vocabulary.from_tokens(names, codebook_size=training_sides.CODES)


def measured(text_tokens: int, rounds: int) -> dict[str, Any]:
    """Let the programs take turns on the same documents."""
    vocabulary = make_vocabulary(text_tokens)
    sides = training_sides.build_sides(vocabulary)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first warms up and is not counted
        records = training_sides.documents(vocabulary, text_tokens, seed=number)
        packs = training_sides.fill_packs(records, training_sides.VISION.features)
        useful = int((sides["ours"].prepare(packs)["document_ids"] >= 0).sum())
        for name, side in sides.items():
            batch = side.prepare(packs)
            begun = time.process_time()
            side.step(batch)
            if number:
                rates[name].append(useful / (time.process_time() - begun))
    peaks = {}
    for name, side in sides.items():
        batch = side.prepare(packs)
        with PeakBytes() as peak:
            side.step(batch)
        peaks[name] = peak.most
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_cpu_s": {name: round(value) for name, value in medians.items()},
        "peak_mb": {name: round(value / 1e6) for name, value in peaks.items()},
        **{
            f"useful_ratio_vs_{other}": round(
                statistics.median(a / b for a, b in zip(rates["ours"], rates[other], strict=True)), 2
            )
            for other in ("padded", "transformers")
        },
        **{
            f"memory_ratio_vs_{other}": round(peaks[other] / peaks["ours"], 2)
            for other in ("padded", "transformers")
        },
    }


# --- trainer --------------------------------------------------------------------------------------


class WaitCounter(TorchDispatchMode):
    """Counts operations after which the CPU would wait for a GPU."""

    waits = 0
    pauses = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += not self.pauses and waits_for_device(func, args)
        return func(*args, **(kwargs or {}))

    def paused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which works on tensors of the CPU where there is a GPU, without its waits."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.pauses += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.pauses -= 1

        return call


def trainer_here(folder: str) -> dict[str, float]:
    """Measure what a step takes besides model and optimizer, and count its waits, in a child process."""
    root = Path(folder)
    stream_sides.write_all(root, 2000)

    run_small_stage(root, 2, 4)  # warms up
    few, _ = run_small_stage(root, 10, 4)
    many, rest_ms = run_small_stage(root, 50, 4)
    few_split, _ = run_small_stage(root, 10, 1)
    many_split, _ = run_small_stage(root, 50, 1)
    a_step = (many - few) / 40
    return {
        "composer_ms_step": rest_ms,
        "host_waits_step": a_step,
        "host_waits_microbatch": ((many_split - few_split) / 40 - a_step) / 3,
    }


def run_small_stage(root: Path, steps: int, microbatch: int) -> tuple[int, float]:
    """Return the waits, and the milliseconds a step outside of the model's and the optimizer's work."""
    from unitoken.train.check import check_stage
    from unitoken.train.stage import run_stage

    name = f"run-{steps}-{microbatch}"
    config = StageConfig.model_validate({
        "name": name,
        "model": {"decoder": SMALL | {"vocab_size": stream_sides.vocabulary().size}},
        "trainable": ["model", "lm_head"],
        "optimizer": {"lr": 1e-4},
        "max_duration": f"{steps}ba",
        "data": {
            "streams": {"text": {"local": str(root / "mds"), }},
            "packed_length": 256,
            "global_batch": 4,
            "over_long": "truncate_text",
            "continuous": "none",
            "cache": str(root / "cache"),
        },
        "microbatch": microbatch,
        "precision": "fp32",
        "save": {"folder": str(root / "runs" / name), "interval": "10000ba"},
        "log": {"every": 10, "tensorboard": False},
    })  # fmt: skip
    work, counter = Stopwatch(), WaitCounter()  # type: ignore[no-untyped-call]
    adam = importlib.import_module("torch.optim.adam")  # hidden in torch.optim by the function
    with (
        patch.object(UniToken, "forward", work.timed(UniToken.forward)),
        patch.object(torch.Tensor, "backward", work.timed(torch.Tensor.backward)),
        patch.object(adam, "adam", work.timed(adam.adam)),
        # In which Composer calls the model, so only its end is of use.
        patch.object(torch.optim.AdamW, "step", work.ends_step(torch.optim.AdamW.step)),
        patch(f"{TRAINER}.split_batch", counter.paused(split_batch)),
        patch(f"{TRAINER}.num_tokens", counter.paused(num_tokens)),
        counter,
    ):
        run_stage(config, check_stage(config, 1))
    return counter.waits, work.median_rest_ms()


class Stopwatch:
    """Adds up the seconds that functions take, step by step."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps: list[tuple[float, float]] = []  # the time at its end, and `_seconds` then

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with the time that it takes added up."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - begun

        return call

    def ends_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with whose end a step ends."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._steps.append((time.perf_counter(), self._seconds))
            return result

        return call

    def median_rest_ms(self) -> float:
        """Return the median milliseconds of a step in which none of the functions ran."""
        rest = [ended - seconds for ended, seconds in self._steps]
        return round(1e3 * statistics.median(b - a for a, b in pairwise(rest)), 1)


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def trainer() -> dict[str, Any]:
    """Run `trainer_here` in a process of its own, as Composer changes torch's settings."""
    with tempfile.TemporaryDirectory() as folder:
        return child("benchmarks.training", "--child", folder)


def saving(short: bool) -> dict[str, Any]:
    """Return the ratios of a save in the background to a whole file."""
    figures = child("benchmarks.saving", *(["--hidden", "384", "--layers", "4"] if short else []))
    return {key: figures[key] for key in ("save_stall_ratio", "save_peak_ratio")}


def main() -> None:
    """Parse the command line, and run the benchmark or its child."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="five minutes, for CI: one round")
    parser.add_argument("--rounds", type=int, help="default 5; 1 with --short")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(trainer_here(arguments.child)))
        return
    rounds = arguments.rounds or (1 if arguments.short else 5)
    small, large = (show(f"vocabulary of {size}", measured(size, rounds)) for size in (8_000, 64_000))
    figures = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        **counted(),
        **show("trainer", trainer()),
        **show("saving", saving(arguments.short)),
        **{key: value for key, value in large.items() if "ratio" in key},
        **{f"{key}_small_vocabulary": value for key, value in small.items() if "ratio" in key},
        "flop_ratios_7b_vs_padded": FLOP_RATIOS_7B,
    }
    above = [f"{key} {figures[key]}, limit {limit}" for key, limit in LIMITS.items() if figures[key] > limit]
    if above:
        print(f"error: {'; '.join(above)}", file=sys.stderr)
    print(json.dumps(figures))
    sys.exit(1 if above else 0)


if __name__ == "__main__":
    main()
