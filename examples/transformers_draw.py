"""Draw with transformers' own `generate`: an exported model and a prompt -> a PNG.

    python examples/transformers_draw.py out/model "Draw a cat." cat.png

Of this project it takes `ImageGrammar`, by which only valid images are drawn, and the image tokenizer, which
makes a picture of the codes. The model is loaded as any other of transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ChameleonForConditionalGeneration

from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.generation import ImageGrammar
from unitoken.train.checkpoint.metadata import read_stage


def load_model(folder: Path) -> Any:
    """Load the model with the class of its family, in the precision in which it was exported."""
    if AutoConfig.from_pretrained(folder).model_type != "chameleon":
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = ChameleonForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    # Transformers gives every image code of a Chameleon the lowest logit, so that it only writes.
    model.model.vocabulary_mapping.image_tokens = []
    return model


def encode_prompt(text: str, tokenizer: Any, vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    """Return a human's turn and the opening of the reply: by the chat template, or as the layout has them."""
    if tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        layout = vocabulary.conversation
        before, after = (
            "".join(
                piece if isinstance(piece, str) else tokenizer.convert_ids_to_tokens(piece)
                for piece in pieces
            )
            for pieces in (layout.human.opening, layout.last_assistant.opening)
        )
        encoded = tokenizer(f"{before}{text}{after}", add_special_tokens=False, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def draw(
    folder: Path, prompt: str, size: tuple[int, int], *, sample: bool = True, seed: int = 0
) -> list[int]:
    """Return the ids of one image.

    Args:
        folder: the exported model.
        prompt: what the human says.
        size: height and width in latents.
        sample: draw codes by their probability; otherwise take the likeliest.
        seed: of the random numbers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder).to(device)
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    inputs = {name: ids.to(device) for name, ids in encode_prompt(prompt, tokenizer, vocabulary).items()}
    torch.manual_seed(seed)
    ids = model.generate(
        **inputs,
        logits_processor=[ImageGrammar(vocabulary, [size], drawing=True)],
        max_new_tokens=vocabulary.image.count(*size) + 1,  # and the end of the turn
        do_sample=sample,
        top_k=0 if sample else None,
    )
    reply = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return [int(token) for token in reply[: vocabulary.image.count(*size)]]


def main(arguments: list[str] | None = None) -> None:
    """Draw the image that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("prompt", help="as `Draw a cat.`")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest codes")
    parser.add_argument("--vision", default=None, help="the image tokenizer; default: that of stage.yaml")
    given = parser.parse_args(arguments)
    stage = read_stage(given.folder)
    config = stage.codec.vision if stage is not None and stage.codec is not None else None
    if given.vision is not None:
        kind = config.kind if config is not None else "chameleon"
        config = ImageTokenizerConfig(kind=kind, weights=given.vision)
    if config is None:
        parser.error("the model's stage names no image tokenizer: give --vision")
    vision = load_vision(config)
    height, width = (side // vision.downsampling for side in given.size)
    ids = draw(given.folder, given.prompt, (height, width), sample=not given.greedy, seed=given.seed)
    codes = Vocabulary.load(given.folder / "vocabulary.json").image_codes(np.array(ids))
    Image.fromarray(vision.decode(codes[None])[0]).save(given.out)


if __name__ == "__main__":
    main()
