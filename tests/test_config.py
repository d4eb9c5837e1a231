from pathlib import Path

import pytest
from pydantic import Field, model_validator

from unitoken.streaming_data.config import Config, ConfigError, load_config, one_line_errors


class Vision(Config):
    kind: str
    batch_size: int = 8


class Settings(Config):
    vision: Vision
    streams: dict[str, Vision] = Field(default_factory=dict)
    lr: float = 0.1
    steps: int = 1

    @model_validator(mode="after")
    def _positive(self) -> "Settings":
        if self.steps < 0:
            raise ValueError("steps is negative")
        return self


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def error_of(path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Settings, path, overrides)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


def test_an_unknown_key_names_the_file_the_key_and_the_valid_keys(write):
    path = write("vision: {kind: vq}\nstpes: 3\n")
    message = error_of(path)
    assert str(path) in message
    assert "'stpes'" in message
    assert "did you mean 'steps'" in message
    assert "vision, streams, lr, steps" in message


@pytest.mark.parametrize("text", ["vision: {kind: vq, size: 3}", "vision: {kind: vq}\nstreams: {a: {kind: x, size: 3}}"])
def test_an_unknown_key_further_down_names_the_keys_that_are_valid_there(write, text):
    message = error_of(write(text))
    assert ".size'" in message
    assert message.endswith("Valid keys: kind, batch_size")


def test_a_misspelt_key_explains_the_missing_one(write):
    message = error_of(write("vison: {kind: vq}"))
    assert "unknown key 'vison'" in message
    assert "(and 1 more)" in message


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1e5", 1e5), ("-2E+3", -2000.0), (".5e1", 5.0), ("1_0e1", 100.0), ("2", 2.0)]
)
def test_scientific_notation_is_a_number(write, text, value):
    assert load_config(Settings, write(f"vision: {{kind: vq}}\nlr: {text}")).lr == value
    assert load_config(Settings, write("vision: {kind: vq}"), [f"lr={text}"]).lr == value


@pytest.mark.parametrize("text", ["e4", "3e", "run3e-4"])
def test_text_that_resembles_a_number_stays_text(write, text):
    assert load_config(Settings, write(f"vision: {{kind: {text}}}")).vision.kind == text


def test_a_key_given_twice_is_refused(write):
    message = error_of(write("vision: {kind: a}\nsteps: 1\nvision: {kind: b}\n"))
    assert "'vision' is given twice" in message
    assert "line 3" in message


def test_a_mapping_may_be_merged_into_another_and_overridden(write):
    """YAML's `<<`, also of what was merged itself; a key given twice is still refused."""
    streams = "streams: {a: &a {kind: a, batch_size: 4}, b: &b {<<: *a, kind: b}}\n"
    settings = load_config(Settings, write(streams + "vision: {<<: *b, batch_size: 2}"))
    assert settings.vision == Vision(kind="b", batch_size=2)
    assert settings.streams == {"a": Vision(kind="a", batch_size=4), "b": Vision(kind="b", batch_size=4)}
    assert "'kind' is given twice" in error_of(write(streams + "vision: {<<: *b, kind: b, kind: c}"))


def test_a_list_as_a_key_is_one_line(write):
    assert "found unhashable key" in error_of(write("vision: {[a]: b}"))


def test_overrides_win_over_the_file_at_any_depth(write):
    settings = load_config(
        Settings, write("vision: {kind: a, batch_size: 4}"), ["vision.batch_size=2", "streams.new.kind=b", "steps=7"]
    )
    assert settings.vision == Vision(kind="a", batch_size=2)
    assert settings.streams == {"new": Vision(kind="b")}
    assert settings.steps == 7


def test_overrides_alone_are_enough():
    assert load_config(Settings, None, ["vision.kind=a"]).vision.kind == "a"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("vision..kind=3", "expected key=value"),
        ("steps.more=3", "'steps' is 5, it has no keys of its own"),
        ("stpes=3", "unknown key 'stpes'"),
        ("vision.knid=3", "unknown key 'vision.knid'"),
        ("steps=[", "not readable as YAML"),
        ("steps=many", "`steps`"),
        ("steps=-1", "steps is negative"),
    ],
)
def test_a_wrong_override_is_one_line_that_says_so(write, override, found):
    assert found in error_of(write("vision: {kind: a}\nsteps: 5\n"), override)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, 2]", "expected a mapping of keys, found list"),
        ("a: b: c", "not readable as YAML"),
        ("", "the key 'vision' is missing"),
        ("vision: {kind: 3}", "`vision.kind`: Input should be a valid string, found 3"),
        ("vision: {kind: a}\nlr: .nan", "`lr`"),
        ("vision: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(write, text, found):
    path = write(text)
    message = error_of(path)
    assert found in message
    assert str(path) in message


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in error_of(tmp_path / "none.yaml")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Vision(kind="a").kind = "b"


def test_command_lines_print_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise ConfigError("a: b")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a: b\n"
