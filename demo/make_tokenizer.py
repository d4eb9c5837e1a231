"""Makes demo/assets/tokenizer: a byte-level BPE of 350 tokens over the demo's own sentences.

    python -m demo.make_tokenizer

It knows nothing of images: what an image vocabulary needs is appended behind its last id (`Vocabulary.from_tokens`).
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.digits import QUESTIONS, REQUESTS, SAID, WORDS

FOLDER = Path(__file__).parent / "assets" / "tokenizer"


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentences = [question.replace("<|image|>", "") for question in QUESTIONS]
    sentences += [request.format(word) for request in REQUESTS + SAID for word in WORDS] + list(WORDS) * 3
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
