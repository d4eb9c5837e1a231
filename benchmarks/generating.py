"""Measure how fast images are drawn, against transformers' own `generate` on the same exported model.

    python -m benchmarks.generating [--short] [--rounds 5]

A small Llama with random weights draws 16 x 16 latents for prompts of 24 tokens, with guidance 3 and the
grammar, and samples from all codes. transformers gets the same grammar (`ImageGrammar`) and its own guidance
(`guidance_scale` and the null prompt). Both draw in this process, in turns; each round starts with the other.
Figures are medians over the rounds, after one that is not counted; ratios are taken within a round.

passes_per_guided_token  Passes through the model for each token of a guided drawing, the prompt's included.
host_reads_per_token     How often the program waits for a value from the device, for each token.
kernels_per_layer        Operations that a layer dispatches to read one token, without views.
passes_per_code_speculative
                         Passes for each code of `--speculative` drawings of the demo's model, guidance 3, one
                         at a time; null before `make demo`.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_counts import starts_kernel
from demo.digits import REQUESTS, WORDS
from unitoken.common.config import load_config
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.generation import ImageGrammar
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.metadata import STAGE, ModelSizes, write_metadata
from unitoken.train.config import StageConfig
from unitoken.train.export.model import export_model
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import generate, load_model, null_prompt
from unitoken.train.generation.prompts import build_prompt
from unitoken.train.generation.sampling import Sampling
from unitoken.train.model.unitoken import UniToken, build_model

ROOT = Path(__file__).parent.parent
BATCHES = (1, 8)
DEMO_PIXELS = (16, 16)
SIZE, SHORT_SIZE = (16, 16), (8, 8)  # latents
GUIDANCE = 3.0
PROMPT_TOKENS = 24
TEXT_TOKENS, CODES = 1000, 8192
DECODER = {
    "qk_norm": "none",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")


# --- the model ------------------------------------------------------------------------------------


def export(folder: Path, vocabulary: Vocabulary) -> tuple[Path, StageConfig]:
    """Export a model with random weights."""
    decoder = json.dumps({**DECODER, "vocab_size": vocabulary.size})
    overrides = [f"model.decoder={decoder}", "codec=null", f"save.folder={folder / 'run'}"]
    config = load_config(StageConfig, ROOT / "yamls" / "demo" / "base.yaml", overrides)
    sizes = model_configs(config.model)
    model = build_model(*sizes, config.model)
    load_weights(model, {}, seed=0)
    run = folder / "run"
    run.mkdir()
    state = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state": {"model": state}}, run / "step-00000001.pt")
    (run / "latest").symlink_to("step-00000001.pt")
    write_metadata(run, config, ModelSizes(decoder=sizes[0], vision=None), vocabulary)
    export_model(str(run), folder / "model", "fp32")
    return folder / "model", config


def prompts(vocabulary: Vocabulary, count: int) -> list[Record]:
    """Make prompts of one turn without images."""
    no_spans = np.zeros((0, 2), np.uint32), np.zeros((0, 4), np.uint32)
    records = []
    for number in range(count):
        text = np.random.default_rng(number).integers(0, TEXT_TOKENS, PROMPT_TOKENS - 2)
        tokens = np.concatenate([[vocabulary.bos], text, [vocabulary.end_of_turn]]).astype(np.uint16)
        records.append(Record(f"prompt {number}", tokens, no_spans[0], no_spans[1], ()))
    return records


# --- both programs --------------------------------------------------------------------------------

Draw = Callable[[list[Record], int], list[list[int]]]


def ours(folder: Path, config: StageConfig, vocabulary: Vocabulary, size: tuple[int, int]) -> Draw:
    """Return our program: it draws for prompts, with a seed."""
    model = load_model(config.model, folder)

    def draw(records: list[Record], seed: int) -> list[list[int]]:
        sampling = Sampling(guidance=GUIDANCE, seed=seed)
        return generate(model, vocabulary, records, sampling, sizes=[size], drawing=True, batch=len(records))

    return draw


def theirs(folder: Path, vocabulary: Vocabulary, size: tuple[int, int]) -> Draw:
    """Return transformers' program."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    length = vocabulary.image.count(*size)

    def ids_of(records: list[Record]) -> torch.Tensor:
        return torch.from_numpy(np.stack([record.tokens for record in records]).astype(np.int64))

    def draw(records: list[Record], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        ids, null = ids_of(records), ids_of([null_prompt(record) for record in records])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            negative_prompt_ids=null,
            negative_prompt_attention_mask=torch.ones_like(null),
            guidance_scale=GUIDANCE,
            logits_processor=[ImageGrammar(vocabulary, [size], drawing=True)],
            do_sample=True,
            top_k=0,
            max_new_tokens=length,
            pad_token_id=0,
        )
        replies: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return replies

    return draw


# --- measuring ------------------------------------------------------------------------------------


def rates(programs: dict[str, Draw], vocabulary: Vocabulary, size: tuple[int, int], rounds: int) -> Any:
    """Measure the tokens per second of both programs at each batch size."""
    figures: dict[str, Any] = {}
    for batch in BATCHES:
        records, tokens = prompts(vocabulary, batch), batch * vocabulary.image.count(*size)
        measured: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(rounds + 1):
            for name in sorted(programs, reverse=bool(number % 2)):
                begun = time.perf_counter()
                replies = programs[name](records, number)
                measured[name].append(tokens / (time.perf_counter() - begun))
                if any(vocabulary.image_codes(np.array(reply)).shape != size for reply in replies):
                    raise RuntimeError(f"{name} drew another size than {size}")
        counted = {name: values[1:] for name, values in measured.items()}
        ratios = [a / b for a, b in zip(counted["ours"], counted["transformers"], strict=True)]
        for name, values in counted.items():
            figures[f"{name}_tokens_per_s_{batch}"] = round(statistics.median(values), 1)
        figures[f"ratio_vs_transformers_{batch}"] = round(statistics.median(ratios), 2)
        figures[f"ratio_spread_{batch}"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return figures


class LayerKernels(TorchDispatchMode):
    """Counts the operations inside of layers that read one token; see `starts_kernel`."""

    def __init__(self, layers: torch.nn.ModuleList) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.calls = 0
        self._inside = False
        for layer in layers:
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def _enter(self, layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: ARG002 - torch's signature
        self._inside = inputs[0].shape[1] == 1
        self.calls += self._inside

    def _leave(self, *_: Any) -> None:
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += self._inside and starts_kernel(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_calls(owner: Any, names: tuple[str, ...]) -> Iterator[list[str]]:
    """Give a list to which each call of the methods of a class adds the method's name."""
    calls: list[str] = []
    real = {name: getattr(owner, name) for name in names}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(owner, name, watched(name))
    try:
        yield calls
    finally:
        for name, method in real.items():
            setattr(owner, name, method)


def counts(
    folder: Path, config: StageConfig, vocabulary: Vocabulary, size: tuple[int, int]
) -> dict[str, Any]:
    """Count passes, host reads and kernels of one guided drawing."""
    model, records = load_model(config.model, folder), prompts(vocabulary, 1)
    sampling, tokens = Sampling(guidance=GUIDANCE), vocabulary.image.count(*size)

    def draw() -> None:
        generate(model, vocabulary, records, sampling, sizes=[size], drawing=True)

    with counted_calls(UniToken, ("predict",)) as passes:
        draw()
    with counted_calls(torch.Tensor, READS) as reads:
        draw()
    with LayerKernels(model.model.layers) as kernels:
        draw()
    return {
        "passes_per_guided_token": round(len(passes) / tokens, 3),
        "host_reads_per_token": round(len(reads) / tokens, 3),
        "kernels_per_layer": round(kernels.kernels / kernels.calls, 1),
    }


def speculative(run: Path) -> dict[str, Any]:
    """Count the passes of speculative drawings of the ten digits, and compare the time with plain ones."""
    if not (run / "latest").exists():
        print(f"{run.relative_to(ROOT)}: no checkpoint: run `make demo` first")
        return {"passes_per_code_speculative": None}
    stage = load_config(StageConfig, run / STAGE)
    if stage.codec is None:
        raise RuntimeError(f"{run}: the demo's stage names no tokenizers")
    dialogue, model = Dialogue(stage.codec), load_model(stage.model, run)
    requests = dialogue.encode([build_prompt(REQUESTS[0].format(word)) for word in WORDS], [DEMO_PIXELS])
    size = dialogue.latents(DEMO_PIXELS)
    seconds: dict[bool, float] = {}
    for guesses in (False, True):
        sampling = Sampling(temperature=0.8, guidance=GUIDANCE, speculative=guesses)
        begun = time.perf_counter()
        with counted_calls(UniToken, ("predict",)) as passes:
            generate(model, dialogue.vocabulary, requests, sampling, sizes=[size], drawing=True, batch=1)
        seconds[guesses] = time.perf_counter() - begun
    return {
        "passes_per_code_speculative": round(len(passes) / (len(requests) * size[0] * size[1]), 3),
        "speculative_time_ratio": round(seconds[True] / seconds[False], 2),
    }


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="one round of 8 x 8 latents, for CI")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rounds, size = (1, SHORT_SIZE) if arguments.short else (arguments.rounds, SIZE)
    warnings.simplefilter("ignore")  # of transformers, about its own options
    vocabulary = Vocabulary.from_tokens({f"t{number}": number for number in range(TEXT_TOKENS)}, CODES)
    with tempfile.TemporaryDirectory() as folder:
        model, config = export(Path(folder), vocabulary)
        programs = {
            "ours": ours(model, config, vocabulary, size),
            "transformers": theirs(model, vocabulary, size),
        }
        figures = rates(programs, vocabulary, size, rounds) | counts(model, config, vocabulary, size)
    figures |= speculative(ROOT / "demo" / "out" / "runs" / "stage2")
    machine = {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "latents": list(size),
        "rounds": rounds,
    }
    print(json.dumps({**machine, **figures}))


if __name__ == "__main__":
    main()
