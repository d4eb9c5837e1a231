"""The settings under `data:`: which are refused, and in which forms values may be written."""

from pathlib import Path
from typing import Any

import pydantic
import pytest

from support.small_datasets import data_config
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.streaming_data.settings import DataConfig


@pytest.mark.parametrize(
    ("streams", "others", "found"),
    [
        (
            {"a": {"local": "x", "proportion": 1}, "b": {"local": "y", "repeat": 2}},
            {},
            r"'a' has it, 'b' \(repeat\) not",
        ),
        (
            {"a": {"local": "x", "proportion": 1}, "b": {"local": "y"}},
            {},
            r"'a' has it, 'b' \(no weight\) not",
        ),
        ({"a": {"local": "x", "choose": 1, "repeat": 2}}, {}, "repeat and choose"),
        ({"a": {"local": "x", "proportion": 0}}, {}, "proportions of all streams are 0"),
        ({"a": {"local": "x", "repeat": -1}}, {}, "greater than or equal to 0"),
        ({"a": {"repeat": 1}}, {}, "needs `local` or `remote`"),
        (
            {"a": {"local": "x", "choose": 5}},
            {"epoch_samples": 10},
            r"epoch_samples does not go with .* choose: 'a' \(choose\)",
        ),
        (
            {"a": {"local": "x", "repeat": 5}},
            {"epoch_tokens": 10},
            r"epoch_tokens does not go with .* choose: 'a' \(repeat\)",
        ),
        (
            {"a": {"local": "x"}},
            {"epoch_tokens": 10, "epoch_samples": 10},
            "one of epoch_samples and epoch_tokens",
        ),
        ({"a": {"local": "x"}}, {"unit": "bytes"}, "'samples', 'tokens' or 'target_tokens'"),
        (
            {"a": {"local": "x"}},
            {"split": "held_out"},
            "split: held_out needs `held_out` above 0 in every stream: 'a' has none",
        ),
        ({"a": {"local": "x", "held_out": 1}}, {}, "less than 1"),
        ({"a": {"local": "x", "kinds": ["txt"]}}, {}, "'understanding', 'generation' or 'text'"),
        ({"a": {"local": "x", "kinds": []}}, {}, "at least 1 item"),
        (
            {"a": {"local": "x", "endpoint": "http://h"}},
            {},
            "`endpoint` is for a `remote` that begins with s3://, found None",
        ),
        ({"a": {"local": "x"}}, {"cache_limit": "much"}, "valid integer"),
        ({"a": {"local": "x"}}, {"over_long": "truncate"}, "'reject' or 'truncate_text'"),
        ({}, {}, "at least 1 item"),
        (
            {"a": {"local": "x", "cache_limit": "1gb"}},
            {},
            "cache_limit",
        ),  # upstream's deletes local-only data
    ],
)
def test_a_mixture_that_contradicts_itself_is_refused(
    tmp_path: Path, streams: dict[str, Any], others: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        data_config(tmp_path, streams, **others)


def test_a_misspelt_key_names_the_file_and_the_valid_keys(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("streams: {a: {local: x, propotion: 1}}\npacked_length: 64\nglobal_batch: 4\n")
    with pytest.raises(
        ConfigError,
        match=r"data.yaml: unknown key 'streams.a.propotion'; did you mean 'proportion'\?.*choose",
    ):
        load_config(DataConfig, path)


def test_the_cache_follows_the_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_config(tmp_path, {"a": {"local": "x"}}, cache=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_folder == tmp_path / "unitoken"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert config.cache_folder == tmp_path / "home" / ".cache" / "unitoken"


def test_sizes_are_written_as_people_write_them(tmp_path: Path) -> None:
    limits = [
        data_config(tmp_path, {"a": {"local": "x"}}, cache_limit=value).cache_limit
        for value in ("2gb", "1.5 MB", 1000)
    ]
    assert limits == [2 << 30, 3 << 19, 1000]


def test_a_batch_may_be_given_in_tokens() -> None:
    settings = {"streams": {"a": {"local": "x"}}, "packed_length": 64}
    assert DataConfig.model_validate({**settings, "global_batch": "512tok"}).global_batch == 8
    for batch, message in (
        ("500tok", "500tok is not a whole number of packs of packed_length: 64"),
        ("32tok", "32tok is not a whole number"),
        ("tok", "global_batch"),
    ):
        with pytest.raises(pydantic.ValidationError, match=message):
            DataConfig.model_validate({**settings, "global_batch": batch})
    del settings["packed_length"]
    with pytest.raises(pydantic.ValidationError, match="packed_length"):  # and no KeyError
        DataConfig.model_validate({**settings, "global_batch": "512tok"})
