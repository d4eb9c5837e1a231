"""A page's replies are those of `generate`, grow from update to update, and can be stopped."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from support.talking import last_reply, speaker_of, write_talking_run
from unitoken.common.errors import ConfigError
from unitoken.train.__main__ import app
from unitoken.train.chat import growing_reply
from unitoken.train.chat.growing_reply import GrowingReply, OpenPicture, split_growing_reply
from unitoken.train.chat.speaker import ReplySoFar, Speaker
from unitoken.train.chat.talk import ChatSettings, Talk
from unitoken.train.export.model import export_model

pytestmark = pytest.mark.filterwarnings("ignore")

DRAWING = ChatSettings("picture", guidance=2.0, seed=5)
SHORT = ChatSettings("text", max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_run(tmp_path_factory.mktemp("talking"))


@pytest.fixture(scope="module")
def speaker(run: Path) -> Speaker:
    return speaker_of(run)


@pytest.fixture
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show every token and every row."""
    monkeypatch.setattr(growing_reply, "TEXT_SECONDS", 0.0)
    monkeypatch.setattr(growing_reply, "PICTURE_SECONDS", 0.0)
    monkeypatch.setattr(growing_reply, "DECODING_SHARE", 1e9)


def generated(model: Path, out: Path, items: list[dict[str, object]], *options: object) -> list[Path]:
    """The files of `generate` for some items."""
    (out.parent / f"{out.name}.json").write_text(json.dumps(items))
    arguments = [model, "--prompts", out.parent / f"{out.name}.json", "--out", out, *options]
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return sorted(out.glob("0000*"))


def test_a_drawing_equals_that_of_generate(run: Path, speaker: Speaker, tmp_path: Path) -> None:
    (drawn,) = last_reply(speaker, Talk(), "Draw a two.", DRAWING).parts
    options = ["--draw", "--seed", 5, "--guidance", 2]
    (expected,) = generated(run, tmp_path / "out", [{"prompt": "Draw a two."}], *options)
    assert drawn == expected.read_bytes()


def test_an_exported_model_replies_as_its_run(run: Path, speaker: Speaker, tmp_path: Path) -> None:
    export_model(str(run), tmp_path / "model", "fp32")
    exported = speaker_of(tmp_path / "model")
    assert last_reply(exported, Talk(), "Draw a two.", DRAWING) == last_reply(
        speaker, Talk(), "Draw a two.", DRAWING
    )


def test_a_second_turn_equals_that_of_generate(run: Path, speaker: Speaker, tmp_path: Path) -> None:
    """With a picture in the question, and the drawing of the first reply before it."""
    talk, red = Talk(), run.parent / "red.png"
    (drawn,) = last_reply(speaker, talk, "Draw a two.", DRAWING).parts
    free = ChatSettings("free", max_tokens=12, seed=3)
    reply = last_reply(speaker, talk, "What is it?", free, red.read_bytes())
    assert isinstance(drawn, bytes)
    (tmp_path / "drawn.png").write_bytes(drawn)
    turns = [
        {"from": "human", "value": "Draw a two."},
        {"from": "gpt", "value": "<|image|>"},
        {"from": "human", "value": "<|image|> What is it?"},
    ]
    item: dict[str, object] = {"conversations": turns, "image": ["drawn.png", str(red)]}
    *pictures, text = generated(run, tmp_path / "out", [item], "--max-tokens", 12, "--seed", 3)
    shown = "".join(part if isinstance(part, str) else "<|image|>" for part in reply.parts)
    assert f"{shown}\n" == text.read_text()
    assert [part for part in reply.parts if isinstance(part, bytes)] == [p.read_bytes() for p in pictures]
    assert len(talk.turns) == 4
    assert talk.turns[3].trained


@pytest.mark.usefixtures("look_always")
def test_pictures_appear_row_by_row(speaker: Speaker) -> None:
    talk = Talk()
    replies = speaker.reply(talk, talk.ask("Draw a two.", []), DRAWING, threading.Event())
    pictures = [np.asarray(opened(reply)) for reply in replies if reply.parts]
    assert {picture.shape[:2] for picture in pictures} == {(16, 32)}
    growing = [picture for picture in pictures if picture.shape[2] == 4]
    rows = [int((picture[:, 0, 3] == 255).sum()) for picture in growing]
    assert rows == sorted(rows)
    assert set(rows) <= {4, 8, 12, 16}
    assert rows[0] < 16, "not all at once"
    assert pictures[-1].shape[2] == 3, "the whole picture last"


def opened(reply: ReplySoFar) -> Image.Image:
    (picture,) = reply.parts
    assert isinstance(picture, bytes)
    return Image.open(io.BytesIO(picture))


@pytest.mark.usefixtures("look_always")
def test_text_appears_token_by_token(speaker: Speaker) -> None:
    talk = Talk()
    replies = speaker.reply(talk, talk.ask("What is it?", []), SHORT, threading.Event())
    texts = ["".join(map(str, reply.parts)) for reply in replies]
    assert len(texts) > 2
    assert len(texts[0]) < len(texts[-1])


def test_decoding_of_rows_takes_a_fifth_of_the_time_at_most(speaker: Speaker) -> None:
    dialogue, now = speaker._model.dialogue, [0.0]
    growing = GrowingReply(dialogue, [(16, 8)], clock=lambda: now[0])
    block = dialogue.vocabulary.image_block(np.zeros((16, 8), np.int64)).tolist()
    decode, decoded = dialogue.vision.decode, []

    def slow(codes: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        now[0] += 0.5
        decoded.append(codes.shape)
        return decode(codes)

    dialogue.vision.decode = slow  # type: ignore[method-assign]
    try:
        for length in range(1, len(block)):
            now[0] += 0.1
            growing.parts(block[:length])
    finally:
        dialogue.vision.decode = decode  # type: ignore[method-assign]
    drawing = 0.1 * (len(block) - 1)
    assert 2 <= len(decoded) <= 1 + drawing / (0.5 / growing_reply.DECODING_SHARE)
    assert all(shape[1] < 16 for shape in decoded), "only the rows that are there"


def test_a_reply_in_the_making_is_split_at_every_token(speaker: Speaker) -> None:
    vocabulary = speaker._model.dialogue.vocabulary
    codes = np.arange(32).reshape(4, 8)
    text = speaker._model.dialogue.tokenizer.encode("a two", add_special_tokens=False)
    reply = [*text, *vocabulary.image_block(codes).tolist(), *text]
    for length in range(len(reply) + 1):
        for part in split_growing_reply(vocabulary, reply[:length], [(2, 2), (4, 8)]):
            if isinstance(part, OpenPicture):
                assert (part.codes == codes[: len(part.codes)]).all()
                assert part.height == 4
    whole = split_growing_reply(vocabulary, reply, [(2, 2), (4, 8)])
    assert [type(part) for part in whole] == [list, np.ndarray, list]


def test_a_stopped_drawing_is_no_turn(speaker: Speaker) -> None:
    talk, stop = Talk(), threading.Event()
    stop.set()
    (last,) = speaker.reply(talk, talk.ask("Draw a two.", []), DRAWING, stop)
    assert last.state == "stopped"
    assert talk == Talk()


class StopAt(threading.Event):
    """Is set when it was asked so many times, which the model does once per token."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.left = token

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_a_stopped_text_is_kept_as_far_as_it_goes(speaker: Speaker) -> None:
    talk = Talk()
    likeliest = ChatSettings("text", max_tokens=150, temperature=0)
    *_, last = speaker.reply(talk, talk.ask("What is it?", []), likeliest, StopAt(9))
    assert last.state == "stopped"
    (text,) = last.parts
    assert text
    assert talk.turns[1].segments == (text,)


@pytest.mark.usefixtures("look_always")
def test_a_drawing_that_is_stopped_shows_its_rows(speaker: Speaker) -> None:
    talk = Talk()
    *_, last = speaker.reply(talk, talk.ask("Draw a two.", []), DRAWING, StopAt(20))
    assert np.asarray(opened(last))[:, 0, 3].tolist() == [255] * 8 + [0] * 8
    assert talk == Talk()


def test_a_reader_that_leaves_frees_the_model(speaker: Speaker) -> None:
    talk, stop = Talk(), threading.Event()
    replies = speaker.reply(talk, talk.ask("x", []), ChatSettings("text", max_tokens=150), stop)
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert stop.is_set()
    assert last_reply(speaker, Talk(), "Draw a two.", DRAWING).state == "whole"


def test_two_questions_at_once_wait_for_each_other(speaker: Speaker) -> None:
    alone = last_reply(speaker, Talk(), "Draw a two.", DRAWING)
    found: list[ReplySoFar] = []
    threads = [
        threading.Thread(target=lambda: found.append(last_reply(speaker, Talk(), "Draw a two.", DRAWING)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 3


def refusal(ask: Callable[[], Iterator[ReplySoFar]]) -> str:
    with pytest.raises(ConfigError) as error:
        list(ask())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "33x16"}, "each side must be a multiple of 8"),
        ({"size": "large"}, "expected pixels across x down"),
        ({"temperature": None}, "temperature: expected a number from 0 on, found None"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed: expected a number from 0 on, found -1"),
        ({"max_tokens": 0.5}, "max tokens: expected a number from 1 on"),
    ],
)
def test_a_wrong_setting_is_refused(speaker: Speaker, changes: dict[str, object], message: str) -> None:
    talk, chosen = Talk(), DRAWING._replace(**changes)  # type: ignore[arg-type]
    assert message in refusal(lambda: speaker.reply(talk, talk.ask("x", []), chosen, threading.Event()))
    assert talk == Talk()


def test_a_conversation_that_is_too_long_says_what_to_do(speaker: Speaker) -> None:
    talk = Talk()
    last_reply(speaker, talk, "What is it?", SHORT)
    error = refusal(lambda: speaker.reply(talk, talk.ask("x" * 400, []), SHORT, threading.Event()))
    assert "exceed data.packed_length (200)" in error
    assert error.endswith("begin a new conversation")


def test_an_unexpected_error_is_one_line_and_frees_the_model(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    talk = Talk()
    with monkeypatch.context() as patch:
        patch.setattr(speaker._model, "generate", broken)
        error = refusal(lambda: speaker.reply(talk, talk.ask("x", []), SHORT, threading.Event()))
    assert "internal error: first line" in error
    assert "in broken" in capsys.readouterr().err, "the traceback is in the terminal"
    assert last_reply(speaker, talk, "x", SHORT).parts
