"""Questions are checked before the model reads them, and pictures are decoded within the project's limits."""

import io
from pathlib import Path

import pytest
from PIL import Image

from unitoken.codec.conversations import Turn
from unitoken.common.errors import ConfigError
from unitoken.train.chat import talk as talking
from unitoken.train.chat.talk import Talk, preview


def png(width: int = 4, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def test_replies_become_turns() -> None:
    talk = Talk()
    talk.take(talk.ask("Draw it: <|image|>", [b"one"]), ["Here:", b"two", "."])
    assert talk.turns == (Turn(("Draw it: ", ""), False), Turn(("Here:", "."), True))
    assert talk.pictures == (b"one", b"two")
    conversation = talk.ask("And?", [b"three"])
    assert conversation.turns[2] == Turn(("", " And?"), False)
    assert conversation.images == (b"one", b"two", b"three")


def test_a_reply_may_say_the_placeholder_itself() -> None:
    talk = Talk()
    talk.take(talk.ask("x", []), ["<|image|>"])
    assert talk.ask("y", []).images == ()
    assert talk.turns[1].segments == ("<|image|>",)


@pytest.mark.parametrize("reply", [[], [""], [" \n"]])
def test_without_a_reply_a_question_was_never_asked(reply: list[str | bytes]) -> None:
    talk = Talk()
    talk.take(talk.ask("x", []), reply)
    assert talk == Talk()


@pytest.mark.parametrize(
    ("text", "pictures", "message"),
    [
        ("", 0, "write a question first, or add a picture"),
        (" \n ", 0, "write a question first"),
        ("What is it? <|image|>", 0, "1 <|image|> in the text but 0 images"),
        ("<|image|> or <|image|>?", 1, "2 <|image|> in the text but 1 image"),
        ("x", 17, "17 pictures, a question may have 16 at most"),
        ("\ud800", 0, "not Unicode"),
    ],
)
def test_questions_that_can_not_be_asked(text: str, pictures: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Talk().ask(text, [png()] * pictures)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_upload_is_shown_as_a_small_png_of_its_pixels() -> None:
    with Image.open(io.BytesIO(preview(png(2000, 1000), "a.png"))) as image:
        assert image.format == "PNG"
        assert image.size == (512, 256)
        assert image.getpixel((5, 5)) == (9, 8, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png: "),
        (b"", "a.png: "),
        (png()[:40], "a.png: "),
    ],
)
def test_what_is_no_picture_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preview(content, "a.png")


def test_a_large_upload_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talking, "LARGEST_PICTURE", 10)
    monkeypatch.setattr(talking, "decoded", None)
    with pytest.raises(ConfigError, match="a picture may have 0 MB at most"):
        preview(png(), "a.png")


def test_a_bomb_of_pixels_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ConfigError, match=r"bomb\.png: "):
        preview((tmp_path / "bomb.png").read_bytes(), "bomb.png")
