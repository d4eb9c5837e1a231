"""Make demo/assets/tokenizer: a byte-level BPE tokenizer of 350 tokens, trained on the demo's own sentences.

    python -m demo.make_tokenizer

It is for text only, and also the quickstart's: the tokens for images are appended after its last id
(`Vocabulary.from_tokens`).
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.digits import QUESTIONS, REQUESTS, STATEMENTS, WORDS

FOLDER = Path(__file__).parent / "assets" / "tokenizer"


def main() -> None:
    """Train the tokenizer and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentences = [question.replace("<|image|>", "") for question in QUESTIONS]
    sentences += [request.format(word) for request in REQUESTS + STATEMENTS for word in WORDS] + list(
        WORDS
    ) * 3
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
