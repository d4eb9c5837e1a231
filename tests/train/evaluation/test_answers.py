"""Scores of answers, by cases computed by hand and by what must hold for any answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unitoken.codec.conversations import Conversation
from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.answers import (
    check_answers,
    normalized_text,
    says_yes,
    score_exact_match,
    score_vqa,
    score_yes_no,
)
from unitoken.train.evaluation.items import TaskItem
from unitoken.train.evaluation.vqa_answers import normalized_vqa_answer, vqa_accuracy

TEXTS = st.text(max_size=20)


def item(*answers: str) -> TaskItem:
    return TaskItem("prompts.json: item 0", {}, Conversation("x", (), ()), answers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A  Cat. ", "a cat"),
        ("“Straße”!", "strasse"),
        ("ﬁve", "five"),
        ("3.5", "3.5"),
        ("...", ""),
    ],
)
def test_text_is_normalized(text: str, expected: str) -> None:
    assert normalized_text(text) == expected


@given(TEXTS)
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalized_text(text)
    # A compatible character may become one that case folding changes once more, such as U+03F4.
    assert normalized_text(normalized_text(once)) == normalized_text(once)


def test_exact_match_takes_any_expected_answer() -> None:
    found = score_exact_match([item("two", "2"), item("two"), item("three")], ["2.", "Two", "thirteen"])
    assert found.scores == {"exact_match": pytest.approx(2 / 3)}
    assert found.of_replies == [True, True, False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two dogs", "2 dogs"),
        ("an apple a day", "apple day"),
        ("dont", "don't"),
        ("its 2:50 pm.", "its 2:50 pm"),
        ("100,978", "100978"),
        ("2.5", "2.5"),
        ("U.S.A.", "usa"),
        ("girl's", "girl's"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes, it is", "yes it is"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("none", "0"),
        ("twelve", "twelve"),
        ("well\nhello", "well hello"),
    ],
)
def test_answers_are_normalized_as_in_the_official_evaluation(text: str, expected: str) -> None:
    assert normalized_vqa_answer(text) == expected


@pytest.mark.parametrize(
    ("matches", "expected"),
    # One match of ten: left out once, so 9 of 10 subsets have it. Three: three subsets have only two.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_is_that_of_the_subsets_of_nine(matches: int, expected: float) -> None:
    annotators = ["Yes."] * matches + ["no"] * (10 - matches)
    assert vqa_accuracy("yes", annotators) == pytest.approx(expected)


@given(TEXTS, st.lists(TEXTS, min_size=4, max_size=10))
def test_vqa_accuracy_is_a_share_and_ignores_the_order(answer: str, annotators: list[str]) -> None:
    found = vqa_accuracy(answer, annotators)
    assert 0 <= found <= 1
    assert vqa_accuracy(answer, annotators[::-1]) == pytest.approx(found)
    assert vqa_accuracy(annotators[0], annotators) >= 1 / 3 * (len(annotators) - 1) / len(annotators) - 1e-9


def test_vqa_accuracies_are_averaged() -> None:
    found = score_vqa([item(*["red"] * 10), item(*["red"] * 1, *["blue"] * 9)], ["Red", "red"])
    assert found.scores == {"vqa_accuracy": pytest.approx((1 + 0.3) / 2)}


@pytest.mark.parametrize(
    ("reply", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("No, there is none", False),
        ("There is not. Yes", False),
        ("Yes. There is no dog", True),
        ("Nothing there", True),
        ("", True),
    ],
)
def test_yes_and_no_are_told_apart_as_in_pope(reply: str, yes: bool) -> None:
    assert says_yes(reply) is yes


def test_yes_no_scores_are_those_of_the_four_cases() -> None:
    """3 true yes, 1 false yes, 2 false no, 4 true no."""
    pairs = [("yes", "Yes")] * 3 + [("no", "yes")] + [("yes", "No")] * 2 + [("no", "no")] * 4
    found = score_yes_no([item(expected) for expected, _ in pairs], [reply for _, reply in pairs])
    assert found.scores == {
        "accuracy": pytest.approx(0.7),
        "precision": pytest.approx(3 / 4),
        "recall": pytest.approx(3 / 5),
        "f1": pytest.approx(2 / 3),
        "yes_ratio": pytest.approx(0.4),
    }
    assert score_yes_no([item("no")], ["no"]).scores["f1"] == 0


@pytest.mark.parametrize(
    ("metric", "answers", "message"),
    [
        ("exact_match", [], "exact_match needs `answer`; the item has 0 expected answers"),
        ("vqa_accuracy", ["a"] * 3, "needs answers of several people under `answers`, ten in VQA"),
        ("yes_no", ["maybe"], "yes_no expects the answer yes or no, found 'maybe'"),
    ],
)
def test_an_item_without_its_answers_is_named(metric: str, answers: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^prompts.json: item 0: .*{message}"):
        check_answers(metric, [item(*answers)])
