"""Answers as the official VQA evaluation compares them (visualqa.org/evaluation.html; Antol et al., 2015).

Lower case, without articles and most punctuation, with digits for number words and an apostrophe in every
contraction. Its rules are kept as its program has them, odd ones included, so that accuracies compare.
"""

from __future__ import annotations

import re

ARTICLES = ("a", "an", "the")
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # all but those of decimals

_NEGATED = (
    *("ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "might", "must", "need"),
    *("ought", "sha", "should", "was", "were", "wo", "would"),
)
_HAVING = ("could", "might", "must", "not", "should", "they", "we", "what", "where", "who", "would", "you")
_PEOPLE = ("he", "it", "she", "somebody", "someone", "something", "there", "they", "we", "who", "you")
_WITH_D = ("he", "how", "it", "someone", "there", "they", "where", "who", "you")
_WITH_S = ("he", "how", "somebody", "someone", "that", "there", "what", "when", "where", "who", "why")
_WITH_LL = (
    *("how", "it", "somebody", "someone", "something", "they", "what", "who", "why", "you"),
)  # not "i", "he", "she", "we": ill, hell, shell and well are words
_WITH_RE = ("there", "they", "what", "why", "you")


def _contractions() -> dict[str, str]:
    """Return the spellings without some of their apostrophes, and the right ones."""
    found = {f"{word}nt": f"{word}n't" for word in _NEGATED}
    for ending, words in (
        ("ve", _HAVING),
        ("d", _WITH_D),
        ("s", _WITH_S),
        ("ll", _WITH_LL),
        ("re", _WITH_RE),
    ):
        found |= {f"{word}{ending}": f"{word}'{ending}" for word in words}
    for word in _PEOPLE:
        found |= {f"{word}d've": f"{word}'d've", f"{word}'dve": f"{word}'d've"}
    for word in ("could", "had", "might", "should", "would"):
        found |= {f"{word}nt've": f"{word}n't've", f"{word}n'tve": f"{word}n't've"}
    found |= {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    found |= {"yall'll": "y'all'll", "y'allll": "y'all'll", "yall'd've": "y'all'd've"}
    found |= {"somebody'd": "somebodyd"}  # as the official program has it
    return found | {"y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}


CONTRACTIONS = _contractions()


def normalized_vqa_answer(text: str) -> str:
    """Return an answer in the form in which answers are compared."""
    text = _without_punctuation(" ".join(text.split()))
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Remove punctuation, or replace it by a space where none stands beside it.

    Where a comma stands between digits, all punctuation of the answer is removed.
    """
    removed = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if removed or beside_space else " ")
    return _PERIOD.sub("", result)


def vqa_accuracy(answer: str, annotators: list[str]) -> float:
    """Return the accuracy of an answer: min(matches / 3, 1), averaged over all subsets that leave one out.

    Args:
        answer: the model's.
        annotators: the answers of people, ten in VQA.
    """
    expected = [normalized_vqa_answer(text) for text in annotators]
    given = normalized_vqa_answer(answer)
    matches = expected.count(given)
    scores = [min((matches - (text == given)) / 3, 1.0) for text in expected]
    return sum(scores) / len(scores)
