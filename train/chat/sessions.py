"""The conversations of all pages in browsers: what they send, and what they show. Without gradio.

A conversation stays in this process, by the session of its page. What a browser sends is a question and the
settings, never a history that could name other files.
"""

from __future__ import annotations

import hashlib
import html
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unitoken.common.errors import ConfigError
from unitoken.train.chat.speaker import Speaker
from unitoken.train.chat.talk import LARGEST_PICTURE, ChatSettings, Part, Talk, preview

MOST_SESSIONS = 64
"""Conversations that are remembered; a new page forgets the oldest."""
KEPT_SECONDS = 10.0
"""How long a picture in the making can be fetched after it was shown."""
REMARKS = {
    "waiting": "Waiting: the model replies to another page.",
    "growing": "",
    "whole": "",
    "stopped": "Stopped. What was finished stays in the conversation.",
    "cut": "Cut off at the most tokens of a reply.",
}

Message = dict[str, Any]


class Shown(NamedTuple):
    """What a page shows.

    Attributes:
        messages: the conversation, as gradio's Chatbot takes it.
        remark: one line below; an error if `failed`.
        failed: the question was refused, and is to be kept for another try.
        busy: a reply is still growing.
    """

    messages: list[Message]
    remark: str = ""
    failed: bool = False
    busy: bool = False


class Session:
    """A page in a browser: its conversation, and the messages that show it."""

    def __init__(self) -> None:
        self.talk = Talk()
        self.messages: list[Message] = []
        self.stop = threading.Event()
        self.asking = threading.Lock()  # held while a reply grows
        self.forgotten = False


class PictureFolder:
    """The one folder that pages read from and write to.

    Args:
        folder: an empty one, in which uploads arrive, too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._growing: dict[Path, float] = {}  # pictures in the making, and when they were shown
        self._lock = threading.Lock()

    def read(self, file: Path) -> bytes:
        """Read an uploaded picture. Raises ConfigError for a file that is elsewhere or too large."""
        if not file.resolve().is_relative_to(self._folder.resolve()) or not file.is_file():
            raise ConfigError(f"{file.name}: no picture of that name was uploaded")
        if file.stat().st_size > LARGEST_PICTURE:
            raise ConfigError(f"{file.name}: a picture may have {LARGEST_PICTURE / 1e6:.0f} MB at most")
        return file.read_bytes()

    def write(self, picture: bytes, growing: bool) -> Path:
        """Write a PNG; one in the making is removed some time later."""
        path = self._folder / f"{hashlib.sha256(picture).hexdigest()[:32]}.png"
        now = time.monotonic()
        with self._lock:
            if not path.is_file():
                path.write_bytes(picture)
                if growing:
                    self._growing[path] = now
            if not growing:
                self._growing.pop(path, None)
            for old in [old for old, written in self._growing.items() if now - written > KEPT_SECONDS]:
                if old != path:
                    del self._growing[old]
                    old.unlink(missing_ok=True)
        return path


class Sessions:
    """Answers what pages send.

    Args:
        speaker: the model.
        folder: of uploaded and generated pictures.
    """

    def __init__(self, speaker: Speaker, folder: Path) -> None:
        self._speaker, self._pictures = speaker, PictureFolder(folder)
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._sessions_lock = threading.Lock()

    def session(self, name: str | None) -> Session:
        """Return the session of a page; a new one if it is not known."""
        with self._sessions_lock:
            session = self._sessions.setdefault(name or "", Session())
            self._sessions.move_to_end(name or "")
            while len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return session

    def ask(
        self, name: str | None, text: str, files: Sequence[str], settings: ChatSettings
    ) -> Iterator[Shown]:
        """Yield what a page shows of a question and of its reply, as it grows.

        Args:
            name: of the page's session.
            text: the question.
            files: paths of uploaded pictures.
            settings: of the reply.
        """
        session = self.session(name)
        if not session.asking.acquire(blocking=False):
            yield Shown(
                session.messages, "one question at a time: wait for the reply, or stop it", failed=True
            )
            return
        try:
            yield from self._ask(session, text, [Path(file) for file in files], settings)
        except ConfigError as error:
            yield Shown(session.messages, str(error), failed=True)
        finally:
            session.asking.release()

    def _ask(
        self, session: Session, text: str, files: Sequence[Path], settings: ChatSettings
    ) -> Iterator[Shown]:
        pictures = [self._pictures.read(file) for file in files]
        previews = [preview(picture, file.name) for picture, file in zip(pictures, files, strict=True)]
        conversation = session.talk.ask(text, pictures)
        session.stop = stop = threading.Event()
        asked = [*session.messages, self._message("user", [*previews, *([text] if text.strip() else [])])]
        yield Shown([*asked, self._message("assistant", [])], busy=True)
        for reply in self._speaker.reply(session.talk, conversation, settings, stop):
            if session.forgotten:
                yield Shown([])
                return
            growing = not reply.is_last
            messages = [*asked, self._message("assistant", reply.parts, growing)]
            if not growing:
                session.messages = messages
            yield Shown(messages, REMARKS[reply.state], busy=growing)

    def stop(self, name: str | None) -> None:
        """End the reply that a page waits for."""
        self.session(name).stop.set()

    def begin_anew(self, name: str | None) -> None:
        """Forget a conversation, and end its reply."""
        with self._sessions_lock:
            forgotten = self._sessions.pop(name or "", None)
        if forgotten is not None:
            forgotten.forgotten = True
            forgotten.stop.set()

    def _message(self, role: str, parts: Sequence[Part], growing: bool = False) -> Message:
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, bytes):
                path = self._pictures.write(part, growing)
                content.append({"path": str(path), "alt_text": "picture"})
            elif part:
                # Chatbot takes even plain text for HTML.
                content.append({"type": "text", "text": html.escape(part, quote=False)})
        return {"role": role, "content": content or [{"type": "text", "text": "…"}]}
