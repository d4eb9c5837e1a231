"""One model that replies to many talks, one question at a time: text and rows of pictures as they come."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from unitoken.codec.conversations import Conversation
from unitoken.common.cli import notify
from unitoken.common.errors import ConfigError, one_line
from unitoken.train.chat.growing_reply import GrowingReply
from unitoken.train.chat.talk import ChatSettings, Part, Talk
from unitoken.train.generation.loaded_model import LoadedModel
from unitoken.train.generation.sampling import Sampling

WAIT_SECONDS = 0.2
"""Between two looks at whether a question that waits for the model was taken back."""


State = Literal["waiting", "growing", "whole", "cut", "stopped"]


class ReplySoFar(NamedTuple):
    """A reply as far as it goes.

    Attributes:
        parts: texts and pictures, in order.
        state: "waiting" while the model replies to others, then "growing"; last "whole", "stopped", or "cut"
            if the most tokens of a reply ended it.
    """

    parts: tuple[Part, ...]
    state: State = "growing"

    @property
    def is_last(self) -> bool:
        """Whether nothing more comes."""
        return self.state not in ("waiting", "growing")


class _Stopped(Exception):  # noqa: N818
    """Ends a reply."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids = ids


class Speaker:
    """A model behind one lock."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._lock = model, threading.Lock()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) in pixels of the data's pictures; empty if the model can not draw."""
        return self._model.found.sizes

    def reply(
        self, talk: Talk, conversation: Conversation, settings: ChatSettings, stop: threading.Event
    ) -> Iterator[ReplySoFar]:
        """Yield the reply to a conversation as it grows, last as a whole; then it is a turn of `talk`.

        Waits while the model replies to others.

        Args:
            talk: goes on behind the reply.
            conversation: what `talk.ask` returned.
            settings: of the reply.
            stop: ends the reply when it is set.

        Raises:
            ConfigError: the settings are wrong, the conversation is too long, or the GPU has no memory left.
        """
        settings.check()
        results: queue.SimpleQueue[ReplySoFar | Exception | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                self._work(talk, conversation, settings, stop, results.put)
            except Exception as error:  # whatever it is, the page must hear of it
                results.put(error)
            results.put(None)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (result := results.get()) is not None:
                if isinstance(result, Exception):
                    raise _as_one_line(result)
                if result.is_last or results.empty():  # older ones are overtaken
                    yield result
        finally:
            stop.set()

    def _work(
        self,
        talk: Talk,
        conversation: Conversation,
        settings: ChatSettings,
        stop: threading.Event,
        show: Callable[[ReplySoFar], None],
    ) -> None:
        while not self._lock.acquire(timeout=WAIT_SECONDS):
            if stop.is_set():
                return show(ReplySoFar((), "stopped"))
            show(ReplySoFar((), "waiting"))
        try:
            last, kept = self._generate(conversation, settings, stop, show)
        finally:
            self._lock.release()
        talk.take(conversation, kept)
        return show(last)

    def _generate(
        self,
        conversation: Conversation,
        settings: ChatSettings,
        stop: threading.Event,
        show: Callable[[ReplySoFar], None],
    ) -> tuple[ReplySoFar, list[Part]]:
        """Return the last state of the reply, and its parts that are finished."""
        dialogue, drawing = self._model.dialogue, settings.kind == "picture"
        sizes = settings.sizes(self.sizes)
        limit = self._limit(conversation, sizes, settings)
        latents = [dialogue.latents(size) for size in sizes]
        growing = GrowingReply(dialogue, latents)

        def watch(place: int, ids: Callable[[], list[int]]) -> None:  # noqa: ARG001
            if stop.is_set():
                raise _Stopped(ids())
            if growing.is_due():
                show(ReplySoFar(tuple(growing.parts(ids()))))

        sampling = Sampling(
            settings.temperature,
            int(settings.top_k_text) or None,
            int(settings.top_k_image) or None,
            settings.guidance,
            int(settings.seed),
        )
        try:
            (ids,) = self._model.generate(
                [conversation], sampling, sizes=sizes, drawing=drawing, max_tokens=[limit], watch=watch
            )
        except _Stopped as stopped:
            shown, kept = growing.parts(stopped.ids), growing.parts(stopped.ids, unfinished=False)
            return ReplySoFar(tuple(shown), "stopped"), kept
        parts, cut = growing.parts(ids), not drawing and len(ids) >= limit
        return ReplySoFar(tuple(parts), "cut" if cut else "whole"), parts

    def _limit(
        self, conversation: Conversation, sizes: Sequence[tuple[int, int]], settings: ChatSettings
    ) -> int:
        """Return the most tokens of the reply. Raises ConfigError if the conversation leaves no room."""
        try:
            (length,) = self._model.check_lengths([conversation], sizes, settings.kind == "picture")
        except ConfigError as error:
            cure = "; begin a new conversation" if len(conversation.turns) > 1 else ""
            raise ConfigError(f"{error}{cure}") from None
        return min(int(settings.max_tokens), self._model.found.config.data.packed_length - length)


def _as_one_line(error: Exception) -> ConfigError:
    """Return what the page says of an error; a bug's traceback is printed in the terminal."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return ConfigError("the GPU has too little memory for this: give less tokens, or smaller pictures")
    notify("".join(traceback.format_exception(error)))
    return ConfigError(f"internal error: {one_line(error)}; the terminal shows where")
