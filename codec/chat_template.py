"""A tokenizer's chat template, read as what stands around each turn.

The template is a program; it is run on short conversations, and the text between their known parts is the
pattern. What can not be read in this way (a template that rewrites the text, or says other words in each
turn) is an error that names the conversation at which it shows.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any

from unitoken.common.errors import ConfigError, one_line
from unitoken.dataset.layout import ConversationPattern, TurnPattern

DATE = datetime.datetime(2024, 7, 26)
"""Templates that write today's date get this one, Llama 3's own: a dataset must not differ by the day."""
SPACE = " \t\n\r\x0b\x0c"
PADDING = ("\n \t", "\t \n")
"""Put around a text to see what the template strips."""
STRIPPED = {PADDING[0]: "", "": SPACE, " \t": "\n"}, {PADDING[1]: "", "": SPACE, "\t ": "\n"}
"""What is cut off at the left and at the right, by what is left of the padding."""

Message = dict[str, str]


MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template writes before text that a model generates."""
RENDERING = {"enable_thinking": False, "strftime_now": DATE.strftime}
"""What templates are run with. Thinking is off where they know it."""


def render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Render a conversation by the tokenizer's chat template."""
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **RENDERING
    )
    return text


def generated_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[bool] | None:
    """Return which tokens of a conversation the template marks as generated; None if it marks none."""
    if not tokenizer.is_fast or not MARK.search(tokenizer.chat_template):
        return None
    marked = tokenizer.apply_chat_template(
        list(messages), return_dict=True, return_assistant_tokens_mask=True, **RENDERING
    )["assistant_masks"]
    return [bool(mark) for mark in marked] if any(marked) else None


def read_chat_template(tokenizer: Any, trains_lead: bool = False) -> ConversationPattern:
    """Return what the tokenizer's chat template puts around turns.

    The text before the assistant's is not trained on, except for spaces and line ends, which may share a
    token with it. All that follows the assistant's text in the last turn is in `closing`.

    Args:
        tokenizer: a tokenizer of transformers.
        trains_lead: train on words that the template writes between the prompt and the answer (an empty
            thought), which otherwise belong to the prompt.

    Raises:
        ConfigError: the tokenizer has no template, or one that can not be split.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("layout: chat_template: the tokenizer has no chat template")
    probe = _Probe(tokenizer)
    before, middle, after = probe.split("one question and its answer", "ua")
    prompt = probe.split("a question and the prompt for its answer", "u", add_generation_prompt=True)[1]
    first, to_answer, between, to_other, again, to_last, end = probe.split("three questions", "uauaua")
    if (first, end) != (before, after) or to_answer != to_other or between != again or to_last != middle:
        raise probe.error("three questions", "its turns are not laid out alike")
    if not after.strip():
        raise probe.error("one question and its answer", "nothing ends the answer")
    if not between.startswith(after):
        raise probe.error("three questions", "an answer ends otherwise than at the end of a conversation")
    later = between[len(after) :]
    assistant = _assistant(to_answer, prompt, after, probe.stripped("uauaua", 1), trains_lead)
    last = _assistant(middle, prompt, after, probe.stripped("uauaua", 5), trains_lead)
    human_strip = probe.stripped("uauaua", 0)
    system = _system(probe, middle, after)
    return ConversationPattern(
        human=TurnPattern(opening=before, strip=human_strip),
        later_human=TurnPattern(opening=later, strip=human_strip),
        assistant=assistant,
        last_assistant=last,
        system=system[0] if system else None,
        human_after_system=system[1].model_copy(update={"strip": human_strip}) if system else None,
    )


def _assistant(
    opening: str, prompt: str, closing: str, strip: tuple[str, str], trains_lead: bool
) -> TurnPattern:
    lead = opening[len(prompt) :] if opening.startswith(prompt) else ""
    if lead.strip() and not trains_lead:
        lead = ""
    return TurnPattern(opening=opening[: len(opening) - len(lead)], lead=lead, closing=closing, strip=strip)


def _system(probe: _Probe, middle: str, after: str) -> tuple[TurnPattern, TurnPattern] | None:
    """Return the patterns of a system turn and of the human's after it; None for a template without it."""
    name = "a system turn"
    try:
        text = probe.rendered("sua")
    except ConfigError:
        return None  # templates without system turns raise an error
    if probe.words("sua")[0] not in text:
        return None  # or leave its text out
    before, between, to_answer, end = probe.split(name, "sua")
    if (to_answer, end) != (middle, after):
        raise probe.error(name, "the turns after it are laid out otherwise than without it")
    return TurnPattern(opening=before, strip=probe.stripped("sua", 0)), TurnPattern(opening=between)


class _Probe:
    """Conversations of words that no template holds."""

    ROLES = {"s": "system", "u": "user", "a": "assistant"}  # noqa: RUF012

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def words(self, roles: str) -> list[str]:
        """Return the text of each turn."""
        return [f"quux{role}{'abcdefg'[number]}zyx" for number, role in enumerate(roles)]

    def rendered(
        self, roles: str, add_generation_prompt: bool = False, pad: Callable[[str], str] = lambda word: word
    ) -> str:
        """Render a conversation. Raises ConfigError if the template does."""
        words = self.words(roles)
        messages = [
            {"role": self.ROLES[role], "content": pad(word)} for role, word in zip(roles, words, strict=True)
        ]
        try:
            return render(self._tokenizer, messages, add_generation_prompt)
        except Exception as error:  # jinja's errors, and whatever the template raises
            raise self.error(
                f"turns of {', '.join(self.ROLES[role] for role in roles)}", one_line(error, 200)
            ) from None

    def split(self, name: str, roles: str, add_generation_prompt: bool = False) -> list[str]:
        """Return the texts around the turns of a conversation, one more than turns."""
        text, parts = self.rendered(roles, add_generation_prompt), []
        for word in self.words(roles):
            if text.count(word) != 1:
                raise self.error(name, f"a turn's text is there {text.count(word)} times")
            part, _, text = text.partition(word)
            parts.append(part)
        return [*parts, text]

    def stripped(self, roles: str, turn: int) -> tuple[str, str]:
        """Return the characters that the template strips off a turn's text, at the left and at the right."""
        word = self.words(roles)[turn]
        plain = self.rendered(roles)
        padded = self.rendered(
            roles, pad=lambda text: f"{PADDING[0]}{text}{PADDING[1]}" if text == word else text
        )
        left, right = plain.split(word), padded.split(word)
        name = f"a {self.ROLES[roles[turn]]}'s text between spaces"
        if len(right) != 2 or not right[0].startswith(left[0]) or not right[1].endswith(left[1]):
            raise self.error(name, "the text around it changes")
        begin, end = right[0][len(left[0]) :], right[1][: len(right[1]) - len(left[1])]
        if begin not in STRIPPED[0] or end not in STRIPPED[1]:
            raise self.error(name, f"{PADDING[0]!r} and {PADDING[1]!r} become {begin!r} and {end!r}")
        return STRIPPED[0][begin], STRIPPED[1][end]

    def error(self, name: str, problem: str) -> ConfigError:
        """Return the error about a template that can not be split."""
        return ConfigError(f"layout: chat_template: the template can not be split at {name}: {problem}")
