"""A run in a bucket goes on from its newest complete checkpoint, on any machine."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import write_checkpoint
from support.killing import KilledError, at_step, kill_at
from support.services import started, used
from support.stages import curve, stage, write_data
from unitoken.common.errors import ConfigError
from unitoken.storage.folder import Folder
from unitoken.storage.store import TransientStoreError
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.locations import INDEX, LOCK, latest_checkpoint
from unitoken.train.config import StageConfig
from unitoken.train.run import bucket as bucket_run
from unitoken.train.run.bucket import BucketRun, fetch_origin, working_folder
from unitoken.train.stage import run_stage

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
URL = "s3://bucket/run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket-run")
    write_data(folder / "data")
    return folder


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of a bucket's."""
    monkeypatch.setattr(bucket_run, "open_store", lambda url: Folder(tmp_path / "bucket"))
    return tmp_path / "bucket"


def fetched(tmp_path: Path) -> Path:
    BucketRun(URL, tmp_path / "work").fetch()
    return tmp_path / "work"


def head(step: int) -> dict[str, torch.Tensor]:
    return {"lm_head.weight": torch.full((3, 2), float(step))}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_machine_gets_the_newest_complete_checkpoint(bucket: Path, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(bucket, step, head(step), keep=9, ranks=2)
    (bucket / "step-00000015" / INDEX).unlink()
    (bucket / "latest").unlink()
    (bucket / "metrics.jsonl").write_text("{}\n")
    work = tmp_path / "work"
    write_checkpoint(work, 10, head(9), ranks=2)  # of the same size, of another run
    write_checkpoint(work, 20, head(20))  # which never came to the bucket
    (work / "model.json").touch()
    fetched(tmp_path)
    assert latest_checkpoint(work) == work / "step-00000010"
    files = {f"step-00000010/{name}" for name in names(bucket / "step-00000010")}
    assert names(work) == {"metrics.jsonl", LOCK, *files}
    for name in files:
        assert (work / name).read_bytes() == (bucket / name).read_bytes()


def test_a_damaged_checkpoint_of_a_bucket_is_passed_over(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        write_checkpoint(bucket, step, head(step), keep=9)
    (bucket / "step-00000010" / "00000-of-00001.safetensors").write_bytes(b"damaged")
    assert latest_checkpoint(fetched(tmp_path)) == tmp_path / "work" / "step-00000005"
    assert f"{URL}/step-00000010: damaged: the SHA-256 of 00000" in capsys.readouterr().err
    BucketRun(URL, tmp_path / "work").remove_unfinished("step-00000005")
    assert not (bucket / "step-00000010" / INDEX).exists(), "it would be taken for the newest again"
    (bucket / "step-00000005" / INDEX).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="there is no other to resume from: remove it to start again"):
        fetched(tmp_path)


def test_a_removed_run_begins_again(bucket: Path, tmp_path: Path) -> None:
    write_checkpoint(bucket, 5, head(5))
    work = fetched(tmp_path)
    shutil.rmtree(bucket)
    assert latest_checkpoint(fetched(tmp_path)) is None
    assert names(work) == {LOCK}


def train(config: StageConfig) -> Path:
    run_stage(config, check_stage(config, 1))
    return working_folder(config)


def resumes_on_another_machine(folder: Path, url: str, tmp_path: Path) -> Path:
    """Train into a bucket, killed after step 5; go on with another cache; return the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(KilledError):
            train(stage(folder, f"save.folder={url}", f"data.cache={tmp_path}/one"))
    work = train(stage(folder, f"save.folder={url}", f"data.cache={tmp_path}/other"))
    plain = train(stage(folder, f"save.folder={tmp_path}/plain"))
    assert curve(work) == curve(plain)
    return work


def test_a_run_goes_on_from_its_bucket(folder: Path, bucket: Path, tmp_path: Path) -> None:
    """Its losses are equal bit for bit; the bucket holds what a folder would, but the link."""
    work = resumes_on_another_machine(folder, URL, tmp_path)
    kept = {path.name for path in bucket.iterdir() if path.name.startswith("step-") and any(path.iterdir())}
    assert kept == {"step-00000008", "step-00000009"}
    small = {name for name in names(bucket) if not name.startswith("step-")}
    logs = {"metrics.jsonl", "starts.jsonl", "report.html"}
    assert small == logs | {"stage.yaml", "model.json", "vocabulary.json", "pictures.json"}
    assert (bucket / "metrics.jsonl").read_bytes() == (work / "metrics.jsonl").read_bytes()
    assert f"folder: {URL}" in (bucket / "stage.yaml").read_text()


def test_the_next_stage_starts_from_a_bucket(folder: Path, bucket: Path, tmp_path: Path) -> None:
    cache = f"data.cache={tmp_path}/c"
    train(stage(folder, f"save.folder={URL}", cache, "max_duration=2ba"))
    shutil.copytree(bucket, tmp_path / "copy")
    following = ["max_duration=2ba", "name=next"]
    runs = {
        name: train(stage(folder, f"save.folder={tmp_path}/{name}", f"init_from={origin}", cache, *following))
        for name, origin in (("from-url", URL), ("from-copy", tmp_path / "copy"))
    }
    assert curve(runs["from-url"]) == curve(runs["from-copy"])
    shutil.rmtree(bucket)
    with pytest.raises(ConfigError, match="no complete checkpoint in it; expected the URL of a run"):
        fetch_origin(URL, tmp_path / "c")


def test_a_slow_bucket_stops_no_step(
    folder: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, real = threading.Event(), Folder.upload

    def upload(self: Folder, path: Path, name: str) -> None:
        if name.startswith("step-00000002"):
            assert passed.wait(60), "the run did not go on"
        real(self, path, name)

    monkeypatch.setattr(Folder, "upload", upload)
    at_step(3, passed.set, monkeypatch)
    train(stage(folder, f"save.folder={URL}", f"data.cache={tmp_path}/c", "max_duration=4ba"))
    assert (bucket / "step-00000004" / INDEX).is_file()


def test_metrics_may_grow_while_they_are_sent(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, real = tmp_path / "work" / "metrics.jsonl", Folder.upload

    def upload(self: Folder, path: Path, name: str) -> None:
        with open(metrics, "a") as file:
            file.write("more")
        real(self, path, name)

    run = BucketRun(URL, tmp_path / "work")
    run.fetch()
    metrics.write_text("{}\n")
    monkeypatch.setattr(Folder, "upload", upload)
    run.send_small_files()
    assert (bucket / "metrics.jsonl").read_text() == "{}\n"
    assert names(bucket) == {"metrics.jsonl"}


def test_a_bucket_that_fails_is_a_one_line_error(
    folder: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload(*_: Any) -> None:
        raise TransientStoreError(f"{URL}/step-00000002: no answer (tried for 120 s)")

    monkeypatch.setattr(Folder, "upload", upload)
    message = rf"^step 2 could not be saved: {URL}/step-00000002: no answer \(tried for 120 s\)$"
    with pytest.raises(TransientStoreError, match=message):
        train(stage(folder, f"save.folder={URL}", f"data.cache={tmp_path}/c"))


@pytest.mark.cloud
@pytest.mark.slow
def test_a_run_goes_on_from_a_real_bucket(folder: Path, tmp_path: Path) -> None:
    with started("s3", tmp_path / "server") as service, used(service):
        resumes_on_another_machine(folder, service.url("run"), tmp_path)


@pytest.mark.parametrize("url", ["hf://datasets/me/run", "http://server/run"])
def test_a_url_that_nothing_can_be_written_to_is_refused(url: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"`save\.folder`: .*a URL that begins with s3://"):
        stage(folder, f"save.folder={url}")
