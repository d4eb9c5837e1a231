"""Speculative Jacobi decoding of an image's codes (Teng et al., arXiv:2410.01699): several codes in one pass.

The next codes are guessed. One pass gives the probabilities of each of them, as if the guesses before it were
right. From the first on, a guess is accepted with the probability min(1, p_now / p_guess), where p_guess is
what it was drawn by; in the place of the first that is not, a code is drawn from the normalised positive part
of p_now - p_guess. So every code has exactly the distribution that it has when drawn alone (speculative
sampling, Leviathan et al., arXiv:2211.17192). The guesses behind it are drawn anew from the probabilities of
this pass, which come closer to the final ones from pass to pass, as in a Jacobi iteration.

A place keeps the random numbers of its guesses from pass to pass, so that its guess changes only where its
probabilities do, and the guesses behind it are read after the same codes again. They stay independent of all
that decides about the codes before: a place that was verified is final, and its numbers are not used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unitoken.generation.grammar import Choices
from unitoken.train.generation.open_reply import LATEST, OpenReply
from unitoken.train.generation.sampling import RandomNumbers, pick

WINDOW = 16
"""The most codes that one pass verifies."""


def verify_guesses(
    now: Tensor, then: Tensor, guesses: Tensor, counts: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept guesses, and draw the first that is not accepted anew.

    Args:
        now: (S, C, K), the probabilities of the codes, given the guesses before each.
        then: (S, C, K), the probabilities by which the guesses were drawn.
        guesses: (S, C), codes.
        counts: (S,), how many of the C places of each row count.
        uniform: (S, C + 1), random numbers from 0 to 1.

    Returns:
        How many codes of each row are final (S,), at least one; and the codes (S, C).
    """
    window = guesses.shape[1]
    places = torch.arange(window, device=guesses.device)
    probability, guessed = (
        each.gather(2, guesses[:, :, None])[:, :, 0] for each in (now, then)
    )  # (S, C) each
    accepted = (uniform[:, :window] * guessed < probability) & (places < counts[:, None])
    right = accepted.long().cumprod(1).sum(1)  # (S,) accepted from the first on
    first_wrong = right.clamp(max=window - 1)[:, None, None].expand(-1, 1, now.shape[2])
    wanted = now.gather(1, first_wrong)[:, 0]  # (S, K)
    missing = (wanted - then.gather(1, first_wrong)[:, 0]).clamp(min=0)
    # Without any difference only rounding can have refused the guess.
    missing = torch.where(missing.sum(1, keepdim=True) > 0, missing, wanted)
    drawn = pick(missing, uniform[:, window:])  # (S, 1)
    codes = torch.where(places == right[:, None], drawn, guesses)
    return torch.minimum(right + 1, counts), codes


class CodeGuesses:
    """Guesses of the next codes in each slot.

    Args:
        slots: number of slots.
        codes: the ids of the codes.
    """

    def __init__(self, slots: int, codes: Choices) -> None:
        self._ids, device = codes.ids, codes.ids.device
        shape = slots, WINDOW, len(codes.ids)
        self._guesses = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        self._drawn_by = torch.zeros(shape, dtype=torch.float64, device=device)
        # Of an exponential distribution: the code where number / probability is least has that probability.
        self._numbers = torch.zeros(shape, device=device)

    def begin(self, slot: int, reply: OpenReply) -> None:
        """Guess the first codes of an image, all with the same probability."""
        reply.guessed = True
        self._drawn_by[slot] = 1 / len(self._ids)
        self._numbers[slot] = self._exponential(reply.numbers, WINDOW)
        self._guess([slot])

    def tokens(
        self, replies: Mapping[int, OpenReply], counts: Sequence[int], latest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lay out what the model reads: what it has not read of each reply, and guesses but for the last.

        Args:
            replies: by slot, those that draw codes.
            counts: how many codes to verify of each of them.
            latest: (slots,), what each slot chose last.

        Returns:
            The tokens (slots, T), and which of them the codes follow (slots, C). Other slots have zeros.
        """
        laid_out = [reply.with_guesses(count) for reply, count in zip(replies.values(), counts, strict=True)]
        shape = len(latest), max(len(tokens) for tokens, _ in laid_out)
        known = torch.zeros(shape, dtype=torch.int64)
        columns = torch.zeros(len(latest), max(counts), dtype=torch.int64)
        for slot, (tokens, before) in zip(replies, laid_out, strict=True):
            known[slot, : len(tokens)] = torch.tensor(tokens)
            columns[slot, : len(before)] = torch.tensor(before)
        known, columns = known.to(latest.device), columns.to(latest.device)
        unknown = torch.cat([latest[:, None], self._ids[self._guesses]], dim=1)  # (slots, 1 + WINDOW)
        chosen = unknown.gather(1, (LATEST - known).clamp(min=0))
        return torch.where(known < 0, chosen, known), columns

    def update(self, replies: Mapping[int, OpenReply], now: Tensor, counts: Sequence[int]) -> list[list[int]]:
        """Verify the guesses of some slots, and guess what follows. Waits for the device once.

        Args:
            replies: of S slots, by slot.
            now: (S, C, K), the probabilities of their next codes, given the guesses.
            counts: how many of the C places of each slot count.

        Returns:
            The ids of the codes that are final, of each slot.
        """
        slots, window = list(replies), now.shape[1]
        limits = torch.tensor(counts, device=now.device)
        uniform = torch.stack([reply.numbers.take(WINDOW + 1) for reply in replies.values()])
        # The same numbers for the same places, however many the other slots verify.
        uniform = torch.cat([uniform[:, :window], uniform[:, WINDOW:]], dim=1)
        drawn_by, guesses = self._drawn_by[slots, :window], self._guesses[slots, :window]
        final, codes = verify_guesses(now, drawn_by, guesses, limits, uniform)
        # What comes behind the window is guessed like its last code.
        places = torch.arange(WINDOW, device=now.device) + final[:, None]
        places = torch.minimum(places, limits[:, None] - 1)
        self._drawn_by[slots] = now.gather(1, places[:, :, None].expand(-1, -1, now.shape[2]))
        ids = []
        outcome = torch.cat([final[:, None], self._ids[codes]], dim=1).tolist()
        for (slot, reply), (count, *some) in zip(replies.items(), outcome, strict=True):
            ids.append(some[:count])
            fresh = self._exponential(reply.numbers, count)
            self._numbers[slot] = torch.cat([self._numbers[slot, count:], fresh])
        self._guess(slots)
        return ids

    def _exponential(self, numbers: RandomNumbers, places: int) -> Tensor:
        uniform = numbers.take(places * len(self._ids)).clamp(min=2**-25)  # 0 / 0 would be least
        return -(-uniform).log1p().view(places, -1)

    def _guess(self, slots: Sequence[int]) -> None:
        self._guesses[slots] = (self._numbers[slots] / self._drawn_by[slots]).argmin(-1)
