"""Valid images from transformers' own `generate`.

    model = AutoModelForCausalLM.from_pretrained("out/model")
    grammar = ImageGrammar.from_folder("out/model", sizes=[(32, 32)], drawing=True)
    ids = model.generate(**inputs, logits_processor=[grammar], max_new_tokens=1200)

The grammar is that of `unitoken generate`. Each row is followed on its own, from the end of the prompt, so
prompts may be padded at the left, and beams may change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LogitsProcessor

from unitoken.dataset.manifest import VOCABULARY
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.generation.grammar import IMAGE, TEXT, Grammar, ReplyPlace

END = ReplyPlace(None, 1)  # the image is drawn: the turn ends
OVER = ReplyPlace(None, 2)  # behind the end of the turn, where `generate` pads


class ImageGrammar(LogitsProcessor):  # type: ignore[misc]
    """Masks the tokens that can not come next: codes in text, text in images, images of other sizes.

    One object may serve any number of calls of `generate`, one after the other. Beams whose tokens the
    grammar does not allow, of which beam search keeps some with a probability of 0, are left alone.

    Args:
        vocabulary: of the model.
        sizes: the (height, width) in latents that an image may have; empty: replies are text only.
        drawing: a reply is one image and the end of the turn. Otherwise the model begins images itself.

    Raises:
        ValueError: a size has no tokens, or there is none for drawings.
    """

    def __init__(
        self, vocabulary: Vocabulary, sizes: Sequence[tuple[int, int]], drawing: bool = False
    ) -> None:
        if drawing and not sizes:
            raise ValueError("sizes: a drawing needs at least one (height, width) in latents")
        self._grammar = Grammar(vocabulary, sizes, torch.device("cpu"))
        self._vocabulary, self._drawing = vocabulary, drawing
        self._end = torch.tensor([vocabulary.end_of_turn])
        # The places of the rows in the latest step, by all ids before. Rows of the next step continue these;
        # where they do not, another call of `generate` has begun.
        self._places: dict[bytes, ReplyPlace] = {}
        self._masks: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    @classmethod
    def from_folder(
        cls, folder: str | Path, sizes: Sequence[tuple[int, int]], drawing: bool = False
    ) -> ImageGrammar:
        """Read the vocabulary of an exported model.

        Args:
            folder: the exported folder.
            sizes: as in the constructor.
            drawing: as in the constructor.

        Raises:
            ConfigError: the folder has no vocabulary.json.
            ValueError: as the constructor.
        """
        return cls(Vocabulary.load(Path(folder) / VOCABULARY), sizes, drawing)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (R, V) with -inf for the tokens that can not follow the ids (R, L)."""
        rows = input_ids.cpu().numpy()
        before = [self._places.get(row[:-1].tobytes()) for row in rows]
        places = [
            self._after(place, int(row[-1])) if place is not None else (IMAGE if self._drawing else TEXT)
            for row, place in zip(rows, before, strict=True)
        ]
        if any(place is None for place in before):  # the first step behind a prompt
            places = [IMAGE if self._drawing else TEXT] * len(rows)
        self._places = {row.tobytes(): place for row, place in zip(rows, places, strict=True)}
        masks = torch.stack([self._mask(place, scores) for place in places])
        return scores.masked_fill(masks, float("-inf"))

    def _after(self, place: ReplyPlace, token: int) -> ReplyPlace:
        if place == OVER or token not in self._allowed(place):
            return OVER
        if place == END or (place == TEXT and token == self._vocabulary.end_of_turn):
            return OVER
        following = self._grammar.after(place, token)
        return END if self._drawing and following == TEXT else following

    def _allowed(self, place: ReplyPlace) -> torch.Tensor:
        return self._end if place == END else self._grammar.choices(place).ids

    def _mask(self, place: ReplyPlace, scores: torch.Tensor) -> torch.Tensor:
        """Return which of the ids (V,) can not come next, on the device of the scores."""
        if place == OVER:
            return torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        ids = self._allowed(place)
        key = (id(ids), scores.shape[-1], scores.device)  # the grammar keeps the tensors
        if key not in self._masks:
            mask = torch.ones(scores.shape[-1], dtype=torch.bool)
            mask[ids] = False
            self._masks[key] = mask.to(scores.device)
        return self._masks[key]
