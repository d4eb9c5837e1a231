"""Scores of answers: a model's texts against the expected ones."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.config import AnswerMetric
from unitoken.train.evaluation.items import TaskItem
from unitoken.train.evaluation.vqa_answers import vqa_accuracy

FEWEST_ANNOTATORS = 4
"""With fewer answers no answer of a model has a VQA accuracy of 1."""


class MetricScores(NamedTuple):
    """What a metric says about a task's replies.

    Attributes:
        scores: over all replies, by name.
        of_replies: of each reply.
    """

    scores: dict[str, float]
    of_replies: list[Any]


def normalized_text(text: str) -> str:
    """Return a text in the form in which exact match compares.

    Case, compatible characters, runs of white space, and punctuation at the ends make no difference.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    first, end = 0, len(text)
    while first < end and _is_mark(text[first]):
        first += 1
    while first < end and _is_mark(text[end - 1]):
        end -= 1
    return text[first:end]


def _is_mark(character: str) -> bool:
    return character == " " or unicodedata.category(character).startswith("P")


def score_exact_match(items: Sequence[TaskItem], replies: Sequence[str]) -> MetricScores:
    """Return the share of replies that are one of the expected answers."""
    right = [
        normalized_text(reply) in {normalized_text(answer) for answer in item.answers}
        for item, reply in zip(items, replies, strict=True)
    ]
    return MetricScores({"exact_match": sum(right) / len(right)}, right)


def score_vqa(items: Sequence[TaskItem], replies: Sequence[str]) -> MetricScores:
    """Return the mean VQA accuracy."""
    scores = [vqa_accuracy(reply, list(item.answers)) for item, reply in zip(items, replies, strict=True)]
    return MetricScores({"vqa_accuracy": sum(scores) / len(scores)}, scores)


def says_yes(reply: str) -> bool:
    """Return whether a reply is a yes: POPE counts one whose first sentence has no `no` or `not` as a yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score_yes_no(items: Sequence[TaskItem], replies: Sequence[str]) -> MetricScores:
    """Return POPE's scores of yes and no (Li et al., arXiv:2305.10355); a ratio without any case is 0."""
    pairs = [
        (normalized_text(item.answers[0]) == "yes", says_yes(reply))
        for item, reply in zip(items, replies, strict=True)
    ]
    right_yes = pairs.count((True, True))
    said_yes = right_yes + pairs.count((False, True))
    expected_yes = right_yes + pairs.count((True, False))
    precision, recall = _ratio(right_yes, said_yes), _ratio(right_yes, expected_yes)
    right = [expected == said for expected, said in pairs]
    scores = {
        "accuracy": sum(right) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": said_yes / len(pairs),
    }
    return MetricScores(scores, right)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


ANSWER_SCORES: dict[AnswerMetric, Callable[[Sequence[TaskItem], Sequence[str]], MetricScores]] = {
    "exact_match": score_exact_match,
    "vqa_accuracy": score_vqa,
    "yes_no": score_yes_no,
}


def check_answers(metric: str, items: Sequence[TaskItem]) -> None:
    """Raise ConfigError for an item that has not the expected answers that a metric compares with."""
    fewest = {"exact_match": 1, "classifier": 1, "yes_no": 1, "vqa_accuracy": FEWEST_ANNOTATORS}.get(
        metric, 0
    )
    for item in items:
        if len(item.answers) < fewest:
            several = "answers of several people under `answers`, ten in VQA" if fewest > 1 else "`answer`"
            raise ConfigError(
                f"{item.name}: {metric} needs {several}; the item has {len(item.answers)} expected answers"
            )
        if metric == "yes_no" and normalized_text(item.answers[0]) not in ("yes", "no"):
            raise ConfigError(f"{item.name}: yes_no expects the answer yes or no, found '{item.answers[0]}'")
