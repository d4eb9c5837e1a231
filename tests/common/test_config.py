"""Settings from YAML and overrides: every mistake is one line that names where it is and what is expected."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import Field, model_validator

from unitoken.common.config import Config, changed_names, describe_differences, flatten, load_config
from unitoken.common.errors import ConfigError

Write = Callable[[str], Path]


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
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Settings, path, overrides)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


def test_an_unknown_key_names_the_file_and_the_valid_keys(write: Write) -> None:
    path = write("vision: {kind: vq}\nstpes: 3\n")
    message = error_of(path)
    assert str(path) in message
    assert "'stpes'" in message
    assert "did you mean 'steps'" in message
    assert "vision, streams, lr, steps" in message


@pytest.mark.parametrize(
    "text", ["vision: {kind: vq, size: 3}", "vision: {kind: vq}\nstreams: {a: {kind: x, size: 3}}"]
)
def test_an_unknown_nested_key_names_the_valid_keys_there(write: Write, text: str) -> None:
    message = error_of(write(text))
    assert ".size'" in message
    assert message.endswith("Valid keys: kind, batch_size")


def test_a_misspelt_key_explains_the_missing_one(write: Write) -> None:
    message = error_of(write("vison: {kind: vq}"))
    assert "unknown key 'vison'" in message
    assert "(and 1 more)" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e5", 1e5), ("-2E+3", -2000.0), (".5e1", 5.0), ("1_0e1", 100.0), ("2", 2.0)],
)
def test_scientific_notation_is_a_number(write: Write, text: str, value: float) -> None:
    assert load_config(Settings, write(f"vision: {{kind: vq}}\nlr: {text}")).lr == value
    assert load_config(Settings, write("vision: {kind: vq}"), [f"lr={text}"]).lr == value


@pytest.mark.parametrize("text", ["e4", "3e", "run3e-4"])
def test_text_that_resembles_a_number_stays_text(write: Write, text: str) -> None:
    assert load_config(Settings, write(f"vision: {{kind: {text}}}")).vision.kind == text


def test_a_duplicate_key_is_an_error(write: Write) -> None:
    message = error_of(write("vision: {kind: a}\nsteps: 1\nvision: {kind: b}\n"))
    assert "'vision' is given twice" in message
    assert "line 3" in message


def test_a_mapping_may_be_merged_into_another_and_overridden(write: Write) -> None:
    """YAML's `<<`, also of a mapping that merges another; a duplicate key is still an error."""
    streams = "streams: {a: &a {kind: a, batch_size: 4}, b: &b {<<: *a, kind: b}}\n"
    settings = load_config(Settings, write(streams + "vision: {<<: *b, batch_size: 2}"))
    assert settings.vision == Vision(kind="b", batch_size=2)
    assert settings.streams == {"a": Vision(kind="a", batch_size=4), "b": Vision(kind="b", batch_size=4)}
    assert "'kind' is given twice" in error_of(write(streams + "vision: {<<: *b, kind: b, kind: c}"))


def test_a_list_as_a_key_is_one_line(write: Write) -> None:
    assert "found unhashable key" in error_of(write("vision: {[a]: b}"))


def test_overrides_win_over_the_file_at_any_depth(write: Write) -> None:
    settings = load_config(
        Settings,
        write("vision: {kind: a, batch_size: 4}"),
        ["vision.batch_size=2", "streams.new.kind=b", "steps=7"],
    )
    assert settings.vision == Vision(kind="a", batch_size=2)
    assert settings.streams == {"new": Vision(kind="b")}
    assert settings.steps == 7


def test_overrides_alone_are_enough() -> None:
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
def test_a_wrong_override_is_one_line_that_says_so(write: Write, override: str, found: str) -> None:
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
def test_a_wrong_file_is_one_line_that_names_it(write: Write, text: str, found: str) -> None:
    path = write(text)
    message = error_of(path)
    assert found in message
    assert str(path) in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "none.yaml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Vision(kind="a").kind = "b"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("batch_size", "data.global_batch"),
        ("max_steps", "max_duration"),
        ("seq_len", "data.packed_length"),
        ("output_dir", "save.folder"),
        ("weight_decay", "optimizer.weight_decay"),
        ("weight_deacy", "optimizer.weight_decay"),
        ("data.learning_rate", "optimizer.lr"),
        ("optimizer.weigth_decay", "weight_decay"),
        ("optimzer.lr", "optimizer"),
        ("data.streams.a.weight", "proportion"),
    ],
)
def test_names_of_other_frameworks_are_understood(key: str, meant: str) -> None:
    from unitoken.train.config import StageConfig

    shown = "optimzer" if key == "optimzer.lr" else key
    with pytest.raises(
        ConfigError, match=f"^on the command line: unknown key '{shown}'; did you mean '{meant}'"
    ):
        load_config(StageConfig, None, [f"{key}=1"])


def test_a_batch_size_of_a_tokenization_is_the_image_tokenizers() -> None:
    from unitoken.tokenize.config import TokenizeConfig

    with pytest.raises(ConfigError, match=r"unknown key 'batch_size'; did you mean 'vision\.batch_size'"):
        load_config(TokenizeConfig, None, ["batch_size=1"])


@pytest.mark.parametrize(
    "text", ["optimizer:\n  lr:1e-4\n", "optimizer:\n  lr:1e-4\n  warmup: 1ba\n", "optimizer:lr: 3\n"]
)
def test_a_colon_without_a_space_is_explained(text: str, tmp_path: Path) -> None:
    from unitoken.train.config import StageConfig

    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"c\.yaml: .*(YAML needs a space after the colon|not readable as YAML)"
    ):
        load_config(StageConfig, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "needed"),
    [("max_duration=10", "10ep, 1000ba or 1000000tok"), ("save.interval=10", "1ep or 1000ba")],
)
def test_an_error_about_a_missing_unit_lists_the_units(override: str, needed: str) -> None:
    from unitoken.train.config import StageConfig

    key = override.partition("=")[0]
    message = f"on the command line: `{key}`: expected a number and its unit, as {needed}, found 10"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(StageConfig, "yamls/demo/stage1.yaml", [override])


ALMOST_YAML = {
    "date": "a: 2024-99-99",
    "time": "a: 2024-01-01T99:99:99",
    "int": "a: !!int x",
    "float": "a: !!float x",
    "bool": "a: !!bool x",
    "brackets": "a: " + "[" * 3000,
    "braces": "{" * 3000,
    "digits": "a: " + "9" * 5000,
    "escape": 'a: "\\U99999999"',
    "python": "a: !!python/object/apply:os.system [ls]",
    "tag": "a: !foo x",
    "nul": "a: \0",
    "tab": "a:\n\tb: 1",
    "anchor": "a: *b",
    "twice": "a: 1\na: 2",
    "merge": "&a {<<: *a}",
    "list": "[1]",
    "text": "hello",
    "key": "? [1, 2]\n: 3",
}


@pytest.mark.parametrize("name", ALMOST_YAML)
def test_broken_yaml_is_one_line(name: str, tmp_path: Path) -> None:
    from unitoken.tokenize.config import TokenizeConfig

    (tmp_path / "c.yaml").write_text(ALMOST_YAML[name])
    for path, overrides in (
        (tmp_path / "c.yaml", []),
        (None, [f"tokenizer={ALMOST_YAML[name].removeprefix('a: ')}"]),
    ):
        if path is None and name in ("twice", "list", "text", "key", "merge"):
            continue  # valid as the value of an override
        with pytest.raises(ConfigError) as error:
            load_config(TokenizeConfig, path, overrides)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600


OUT_OF_BOUNDS = (
    "max_duration=1000000000000ep",
    "optimizer.lr=1e308",
    "optimizer.lr=.nan",
    "optimizer.lr=-1",
    "optimizer.lr=.inf",
    "seed=" + "9" * 30,
    "data.seed=" + "9" * 30,
    "data.packed_length=1000000000000",
    "data.workers=1000000000",
    "name=''",
    "save.folder=''",
    "init_from=''",
    "optimizer.betas=[0.9,1.5]",
    "microbatch=0",
    "save.interval=0ba",
    "data.window=0",
    "data.streams.all.local=''",
    "data.streams.all.repeat=1e300",
    "optimizer.eps=0",
    "log.every=-1",
    "data.timeout=.inf",
    "model.decoder.rope_theta=0",
    "model.decoder.hidden_size=1000000000000",
    "optimizer.warmup=1e9ep",
    "data.cache=''",
)


@pytest.mark.parametrize("override", OUT_OF_BOUNDS)
def test_numbers_and_names_have_bounds(override: str, tmp_path: Path) -> None:
    from support.stages import stage

    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=re.escape(key.rpartition(".")[2])) as error:
        stage(tmp_path, override)
    assert str(error.value).startswith("on the command line: ")


def test_flatten_gives_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_a_missing_name_counts_as_none() -> None:
    assert changed_names({"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 4}) == ["b", "d"]


def test_differences_name_the_setting_and_both_values() -> None:
    old = {"seed": 0, "data": {"window": 8, "unit": "tokens"}}
    new = {"seed": 1, "data": {"unit": "tokens"}, "name": "x"}
    expected = "seed: 0, now 1; data.window: 8, now nothing; name: nothing, now x"
    assert describe_differences(old, new) == expected
    assert describe_differences(old, new, ["seed", "data.unit"]) == "seed: 0, now 1"
    assert describe_differences(old, old) == ""
