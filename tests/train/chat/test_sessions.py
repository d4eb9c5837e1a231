"""Pages in browsers: each has its own conversation, and keeps nothing that it does not show."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unitoken.codec.conversations import Conversation
from unitoken.common.errors import ConfigError
from unitoken.train.chat import sessions as chat_sessions
from unitoken.train.chat.sessions import Sessions, Shown
from unitoken.train.chat.speaker import ReplySoFar, State
from unitoken.train.chat.talk import ChatSettings, Part, Talk

SETTINGS = ChatSettings()


class Parrot:
    """Stands in for the model: gives the replies that it was told."""

    def __init__(self, *replies: tuple[tuple[Part, ...], State]) -> None:
        self.replies = replies

    def reply(
        self, talk: Talk, conversation: Conversation, settings: ChatSettings, stop: threading.Event
    ) -> Iterator[ReplySoFar]:
        if settings.seed < 0:
            raise ConfigError("seed: no")
        for parts, state in self.replies:
            yield ReplySoFar(parts, "stopped" if stop.is_set() else state)
        talk.take(conversation, self.replies[-1][0])


def pages(folder: Path, *replies: tuple[tuple[Part, ...], State]) -> Sessions:
    parrot: Any = Parrot(*replies)
    return Sessions(parrot, folder)


def texts(shown: Shown) -> list[tuple[str, list[str]]]:
    """The roles and texts of messages; pictures by the end of their names."""
    return [
        (message["role"], [part.get("text") or part["path"][-4:] for part in message["content"]])
        for message in shown.messages
    ]


def test_a_question_is_shown_at_once_and_its_reply_grows(tmp_path: Path) -> None:
    answers = pages(tmp_path, ((), "waiting"), (("a",), "growing"), (("a <b>", b"PNG"), "whole"))
    first, waiting, growing, last = answers.ask("page", "x < y", [], SETTINGS)
    assert texts(first) == [("user", ["x &lt; y"]), ("assistant", ["…"])]
    assert "another page" in waiting.remark
    assert texts(growing)[1] == ("assistant", ["a"])
    assert [shown.busy for shown in (first, waiting, growing, last)] == [True, True, True, False]
    assert texts(last)[1] == ("assistant", ["a &lt;b&gt;", ".png"])
    assert answers.session("page").messages == last.messages


def test_pages_do_not_see_each_other(tmp_path: Path) -> None:
    answers = pages(tmp_path, (("a",), "whole"))
    for name in ("one", "two", "one"):
        *_, last = answers.ask(name, "x", [], SETTINGS)
    assert len(last.messages) == 4
    assert len(answers.session("two").talk.turns) == 2


def test_a_refused_question_changes_nothing(tmp_path: Path) -> None:
    answers = pages(tmp_path, (("a",), "whole"))
    list(answers.ask("page", "x", [], SETTINGS))
    before = answers.session("page").messages
    *_, last = answers.ask("page", "y", [], SETTINGS._replace(seed=-1))
    assert last == Shown(before, "seed: no", failed=True)
    assert answers.session("page").messages == before


def test_one_question_at_a_time(tmp_path: Path) -> None:
    answers = pages(tmp_path, (("a",), "growing"), (("b",), "whole"))
    first = answers.ask("page", "x", [], SETTINGS)
    next(first)
    (second,) = answers.ask("page", "y", [], SETTINGS)
    assert second.failed
    assert "one question at a time" in second.remark
    list(first)
    assert len(list(answers.ask("page", "y", [], SETTINGS))) > 1


def test_a_stopped_reply_says_so(tmp_path: Path) -> None:
    answers = pages(tmp_path, (("a",), "growing"), (("b",), "whole"))
    replies = answers.ask("page", "x", [], SETTINGS)
    next(replies)
    answers.stop("page")
    assert all("Stopped" in shown.remark for shown in replies)


def test_a_new_conversation_ends_the_reply_of_the_old(tmp_path: Path) -> None:
    answers = pages(tmp_path, (("a",), "growing"), (("b",), "whole"))
    replies = answers.ask("page", "x", [], SETTINGS)
    next(replies)
    answers.begin_anew("page")
    assert list(replies) == [Shown([])]
    assert answers.session("page").talk == Talk()


def test_only_uploaded_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "page" / "link.png").symlink_to(tmp_path / "secret.png")
    answers = pages(tmp_path / "page", (("a",), "whole"))
    for name in ("secret.png", "page/../secret.png", "page/link.png", "page", "page/none.png"):
        (shown,) = answers.ask("page", "x", [str(tmp_path / name)], SETTINGS)
        assert shown.failed
        assert "no picture of that name was uploaded" in shown.remark


def test_pictures_in_the_making_are_removed_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = pages(tmp_path, *((((b"row%d" % n),), "growing") for n in range(5)), ((b"row4",), "stopped"))
    list(answers.ask("page", "x", [], SETTINGS))
    assert len(list(tmp_path.iterdir())) == 5, "they may still be fetched"
    monkeypatch.setattr(chat_sessions, "KEPT_SECONDS", -1.0)
    monkeypatch.setattr(answers._speaker, "replies", [((b"other",), "whole")])
    *_, last = answers.ask("page", "x", [], SETTINGS)
    kept = {part["path"] for message in last.messages for part in message["content"] if "path" in part}
    assert {str(path) for path in tmp_path.iterdir()} == kept


def test_old_pages_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sessions, "MOST_SESSIONS", 2)
    answers = pages(tmp_path, (("a",), "whole"))
    for name in ("one", "two", "one", "three"):
        list(answers.ask(name, "x", [], SETTINGS))
    assert len(answers.session("one").talk.turns) == 4
    assert not answers.session("two").talk.turns
