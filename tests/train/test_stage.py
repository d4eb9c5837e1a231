"""Stages of training in this process, on one rank; test_ranks.py has several ranks."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import drawn
from support.checkpoints import all_tensors
from support.killing import KilledError, kill_at
from support.small_datasets import make_record, small_vocabulary, write_dataset
from support.stages import curve, evaluations, metrics, stage, write_data
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import load_manifest
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.reading.batch import unpack
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.locations import find_origin, latest_checkpoint, step_of
from unitoken.train.config import StageConfig
from unitoken.train.export.model import export_model
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, freeze, learning_rate, set_learning_rate
from unitoken.train.run import run_folder as checkpoints
from unitoken.train.stage import run_stage

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    write_data(folder / "data")
    return folder


def train(config: StageConfig) -> Path:
    run_stage(config, check_stage(config, 1))
    return Path(config.save.folder)


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.open_checkpoint(find_origin(str(run_folder))).load()


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    return train(stage(folder, f"save.folder={folder}/uninterrupted", "max_duration=2ep"))


def newest(run_folder: Path) -> Path:
    checkpoint = latest_checkpoint(run_folder)
    assert checkpoint is not None
    return checkpoint


def test_a_stage_learns_and_writes_a_line_per_step(uninterrupted: Path) -> None:
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert lines[0]["lr"] == 0.0
    assert lines[2]["lr"] > lines[-1]["lr"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + 1e-5 * line["z"], abs=1e-5)
        assert line["useful"] == line["tokens"] / (4 * 64)
    checkpoints_kept = {"latest", "step-00000016", "step-00000018"}
    about = {".lock", "stage.yaml", "model.json", "vocabulary.json", "pictures.json"}
    logs = {"metrics.jsonl", "starts.jsonl", "report.html"}
    assert {path.name for path in uninterrupted.iterdir()} == logs | checkpoints_kept | about
    assert latest_checkpoint(uninterrupted) == uninterrupted / "step-00000018"


@pytest.mark.parametrize(
    "step", [5, 9, 10, 11]
)  # resumed after step 4 and 8; 9 is the end of the epoch, 10 in the second
def test_a_killed_run_resumes_with_the_same_losses_bit_for_bit(
    step: int, folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: data position, random state, optimizer and learning rate are restored."""
    config = stage(folder, f"save.folder={tmp_path}", "max_duration=2ep")
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(KilledError):
            train(config)
    assert len(curve(tmp_path)) == step
    assert step_of(newest(tmp_path)) < step
    train(config)
    assert curve(tmp_path) == curve(uninterrupted)
    resumed = weights(tmp_path)
    for name, tensor in weights(uninterrupted).items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("interval", ["1ep", "3ba"])
def test_a_run_saved_at_the_end_of_an_epoch_resumes_in_the_next(
    interval: str, folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage(folder, f"save.folder={tmp_path}", "max_duration=2ep", f"save.interval={interval}")
    with monkeypatch.context() as patch:
        kill_at(11, patch)
        with pytest.raises(KilledError):
            train(config)
    assert step_of(newest(tmp_path)) == 9
    state = checkpoints.read_state(newest(tmp_path))["timestamp"]["Timestamp"]
    assert (state["epoch"], state["batch_in_epoch"]) == (
        1,
        0,
    )  # not 9 of 9: the rest of an epoch that is over
    train(config)
    assert curve(tmp_path) == curve(uninterrupted)


@pytest.mark.parametrize("evaluated_on", ["held-out", "other"])
def test_a_stage_opens_each_dataset_once(
    evaluated_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an evaluation, samples and an export, each of which needs something of the datasets."""
    opened: list[tuple[str, Path]] = []

    def counted(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def count(folder: Path) -> Any:
            opened.append((read.__name__, folder))
            return read(folder)

        return count

    for read in (load_manifest, read_index):
        for name, module in list(sys.modules.items()):
            if name.startswith("unitoken.") and getattr(module, read.__name__, None) is read:
                monkeypatch.setattr(module, read.__name__, counted(read))
    datasets = [drawn.write_data(tmp_path / "data")]
    overrides = ["data.streams.all.held_out=0.4", "eval.interval=2ba"]
    if evaluated_on == "other":
        datasets.append(drawn.write_data(tmp_path / "other"))
        overrides = [f"eval={{interval: 2ba, streams: {{other: {{local: {tmp_path}/other}}}}}}"]
    samples = "samples={interval: 2ba, draw: [Draw a two.], size: [16, 16]}"
    export = f"save.export={tmp_path}/model"
    train(drawn.drawing_stage(tmp_path, "max_duration=2ba", samples, export, *overrides))
    assert (tmp_path / "run" / "samples" / "step-00000002" / "0.png").is_file()
    assert list(evaluations(tmp_path / "run")) == [2]
    assert (tmp_path / "model" / "config.json").is_file()
    expected = [(name, folder) for name in ("load_manifest", "read_index") for folder in datasets]
    assert sorted(opened) == sorted(expected)


@pytest.mark.parametrize("compat", [None, "unitoken"])
def test_a_stage_with_anyres_learns(compat: str | None, folder: Path, tmp_path: Path) -> None:
    """A picture of 4 x 4 pixels has 4 features as one view, and 10 with its tiles."""
    lines = {}
    for anyres in (False, True):
        config = stage(
            folder,
            f"save.folder={tmp_path}/{anyres}",
            f"data.anyres={anyres}",
            "data.packed_length=80",
            compat=compat,
        )  # fmt: skip
        lines[anyres] = metrics(train(config))
    assert lines[True][-1]["loss"] < lines[True][0]["loss"] - 0.1
    assert sum(line["tokens"] for line in lines[True]) > sum(line["tokens"] for line in lines[False])


def test_a_checkpoint_holds_float32_weights_and_moments(uninterrupted: Path) -> None:
    """The reference resumed from weights rounded to bfloat16 under float32 moments (bug 24)."""
    tensors = all_tensors(newest(uninterrupted))
    assert {name.partition("/")[0] for name in tensors} == {"model", "exp_avg", "exp_avg_sq"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    trained = [tensor for name, tensor in tensors.items() if "vit.embeddings" not in name]
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained)


def test_a_finished_stage_is_not_changed(
    folder: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}
    train(stage(folder, f"save.folder={uninterrupted}", "max_duration=2ep"))
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}


def test_a_duration_in_tokens_is_the_same_when_resumed(
    folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's tokens give the number of steps, which is the same for any number of ranks."""
    tokens = sum(line["tokens"] for line in metrics(uninterrupted)[:9])  # of an epoch
    config = stage(
        folder,
        f"save.folder={tmp_path}",
        f"max_duration={tokens * 14 // 9}tok",
        f"optimizer.warmup={tokens}tok",
    )
    with monkeypatch.context() as patch:
        kill_at(11, patch)
        with pytest.raises(KilledError):
            train(config)
    train(config)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in metrics(uninterrupted)[:14]]
    assert lines[8]["lr"] == pytest.approx(3e-3 * 8 / 9)
    assert lines[9]["lr"] == max(line["lr"] for line in lines) == pytest.approx(3e-3)


def test_the_loss_does_not_depend_on_the_microbatch(folder: Path, tmp_path: Path) -> None:
    """Microbatches hold different numbers of supervised tokens: a mean of their means would differ."""
    overrides = ["model.dropout=0", "max_duration=4ba"]
    curves = [
        curve(train(stage(folder, f"save.folder={tmp_path}/{size}", f"microbatch={size}", *overrides)))
        for size in (1, 3, 4)
    ]
    for other in curves[1:]:
        assert [loss for _, loss in other] == pytest.approx([loss for _, loss in curves[0]], abs=1e-5)
    reference = stage(
        folder, f"save.folder={tmp_path}/c", *overrides, "compat=unitoken", "data.continuous=all"
    )
    plain = stage(folder, f"save.folder={tmp_path}/p", *overrides, "data.continuous=all")
    means = [curve(train(config))[0][1] for config in (reference, plain)]
    assert (
        abs(means[0] - means[1]) > 1e-4
    )  # compat: the mean of the microbatches' means (and separators trained on)


def test_batches_without_anything_to_train_on_are_steps(tmp_path: Path) -> None:
    """Composer would divide by their supervised tokens; `over_long: truncate_text` may leave none."""
    vocabulary = small_vocabulary()
    at_the_end = np.array([[100, 101]], np.uint32)
    silent = [replace(make_record(f"s{n}", vocabulary, 100), target_spans=at_the_end) for n in range(12)]
    write_dataset(tmp_path / "data", [*silent, make_record("one", vocabulary, 50)], vocabulary)
    losses = [
        loss
        for _, loss in curve(train(stage(tmp_path, "data.global_batch=1", "data.over_long=truncate_text")))
    ]
    assert sorted(loss > 0 for loss in losses) == [False] * 12 + [True]


def test_a_stage_equals_a_plain_training_loop(folder: Path, tmp_path: Path) -> None:
    """Learning rates of two groups, clipping and microbatches, against a loop that is written out here."""
    config = stage(
        folder,
        *(f"save.folder={tmp_path}/run", "model.dropout=0", "max_duration=6ba", "microbatch=2"),
        *("optimizer.clip_norm=0.3", "optimizer.lr_scales={vit: 0.5}", "optimizer.min_lr=1e-3"),
    )
    resolved = check_stage(config, 1)
    trained = weights(train(config))

    loader = build_loader(
        config.data, views=Views(8, 4), vocabulary=resolved.vocabulary, batch_packs=4, compat=False
    )
    model = build_model(resolved.sizes.decoder, resolved.sizes.vision, config.model)
    freeze(model, config.trainable)
    load_weights(model, {}, config.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, config.optimizer)
    clipped = 0
    for step, (batch, line) in enumerate(zip(loader, metrics(tmp_path / "run"), strict=False)):
        set_learning_rate(optimizer, learning_rate(step / 9, config.optimizer, 0.1, 6 / 9))
        loss = model.train()(unpack(batch)).total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        clipped += int(norm > 0.3)
        assert (loss.item(), norm.item()) == pytest.approx((line["loss"], line["grad_norm"]), rel=1e-5)
        assert line["lr"] == optimizer.param_groups[-1]["lr"] == 2 * optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
    assert clipped == 6
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_each_stage_starts_from_the_weights_of_the_one_before(folder: Path, tmp_path: Path) -> None:
    base = stage(
        folder,
        *(f"save.folder={tmp_path}/base", "name=base", "max_duration=3ba", "trainable=[model, lm_head]"),
        *("model.vision=null", "data.continuous=none"),
    )
    one = stage(
        folder,
        f"save.folder={tmp_path}/one",
        "name=one",
        f"init_from={tmp_path}/base",
        "max_duration=3ba",
        "trainable=[vit, adapter]",
    )
    two = stage(
        folder, f"save.folder={tmp_path}/two", "name=two", f"init_from={tmp_path}/one", "max_duration=3ba"
    )
    after = [weights(train(config)) for config in (base, one, two)]
    for name, tensor in after[1].items():
        if name.split(".")[0] in ("model", "lm_head"):
            assert torch.equal(tensor, after[0][name]), f"{name} was frozen in Stage I"
        elif not name.startswith("vit.embeddings"):
            assert not torch.equal(tensor, after[2][name]), f"{name} trains in Stage II"
        else:
            assert torch.equal(tensor, after[2][name]), f"{name} never trains"
    assert not torch.equal(after[1]["lm_head.weight"], after[2]["lm_head.weight"])


def test_starting_from_an_unfinished_stage_is_reported(
    folder: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["name=next", "max_duration=1ba", "model.decoder.rope_theta=500"]
    shutil.copy(uninterrupted / "model.json", tmp_path)
    for step, unfinished in ((16, "step 16 of 18 of that stage"), (18, None)):
        origin = Path(shutil.copytree(uninterrupted / f"step-000000{step}", tmp_path / f"after-{step}"))
        train(stage(folder, *changes, f"save.folder={tmp_path}/{step}", f"init_from={origin}"))
        output = capsys.readouterr()
        assert output.err == (
            f"warning: init_from: {origin}: its model and this stage's have rope_theta 10000.0 and 500.0\n"
        )
        lines = [line for line in output.out.splitlines() if f"init_from: {origin}" in line]
        assert lines == ([f"init_from: {origin}: {unfinished}"] if unfinished else [])


def test_a_resumed_stage_keeps_its_trained_tower(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's Stage I put the pretrained SigLIP back whenever it resumed (bug 23)."""
    config = stage(folder, f"save.folder={tmp_path}", "max_duration=6ba", "trainable=[vit, adapter]")
    with monkeypatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(KilledError):
            train(config)
    saved = weights(tmp_path)
    seen: dict[str, torch.Tensor] = {}

    def forward(self: UniToken, batch: Any, real: Any = UniToken.forward) -> Any:
        if not seen:
            seen.update({name: parameter.detach().clone() for name, parameter in self.named_parameters()})
        return real(self, batch)

    monkeypatch.setattr(UniToken, "forward", forward)
    again = stage(
        folder,
        f"save.folder={tmp_path}",
        "max_duration=6ba",
        "trainable=[vit, adapter]",
        "init_from=/not/needed/any/more",
    )
    train(again)
    assert saved.keys() == seen.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, seen[name]), name


def test_a_chain_of_stages_never_loses_trained_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage I, export, init_from, Stage II, export; both are killed and resumed. Bug 23 lost the tower.

    Each stage starts with the exact weights at the end of the one before, also if it was killed and resumed.
    """
    starts: list[dict[str, torch.Tensor]] = []  # the weights at the first forward pass of each

    def forward(self: UniToken, batch: Any, real: Any = UniToken.forward) -> Any:
        if not starts[-1]:
            starts[-1].update(
                {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
            )
        return real(self, batch)

    def start(config: StageConfig) -> dict[str, torch.Tensor]:
        starts.append({})
        return weights(train(config))

    def killed_then_resumed(config: StageConfig) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patch:
            kill_at(5, patch)
            with pytest.raises(KilledError):
                start(config)
        saved = weights(Path(config.save.folder))  # of step 4
        trained = start(config)
        for name, tensor in saved.items():
            assert torch.equal(tensor, starts[-1][name]), f"{name} was lost when {config.name} resumed"
        return trained

    monkeypatch.setattr(UniToken, "forward", forward)
    common = (folder, "max_duration=6ba")
    one = stage(*common, f"save.folder={tmp_path}/one", "name=one", "trainable=[vit, adapter]")
    after_one = killed_then_resumed(one)
    export_model(str(tmp_path / "one"), tmp_path / "exported", "fp32")
    two = stage(*common, f"save.folder={tmp_path}/two", "name=two", f"init_from={tmp_path}/exported")
    after_two = killed_then_resumed(two)
    began = starts[-2]
    for name, tensor in after_one.items():
        assert torch.equal(tensor, began[name]), f"{name} was lost between the stages"
        if name.startswith(("vit.encoder", "adapter", "model", "lm_head")):
            assert not torch.equal(tensor, after_two[name]), f"{name} trains in Stage II"
    export_model(str(tmp_path / "two"), tmp_path / "exported", "fp32")  # in the place of the first
    again = checkpoints.open_weights(find_origin(str(tmp_path / "exported"))).load()
    for name, tensor in after_two.items():
        assert torch.equal(
            tensor if tensor.shape == again[name].shape else tensor.expand_as(again[name]), again[name]
        ), name


def test_warnings_about_the_mixture_are_printed(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unitoken.train.check.other_codes", lambda sources: ["two tokenizers"])
    monkeypatch.setattr(
        "unitoken.streaming_data.plan.report.PlanReport.warnings", lambda report: ["too long"]
    )
    train(stage(folder, f"save.folder={uninterrupted}", "max_duration=2ep"))
    assert capsys.readouterr().err == "warning: two tokenizers\nwarning: too long\n"


def test_a_stage_exports_at_its_end_even_after_a_kill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage(
        folder, f"save.folder={tmp_path}/run", "max_duration=2ba", f"save.export={tmp_path}/run/model"
    )

    def killed(*args: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(
            "unitoken.train.export.model._write_json", killed
        )  # its weights are on the disk, half of it is not
        with pytest.raises(KilledError):
            train(config)
    assert not (tmp_path / "run/model").exists()
    train(config)
    output = capsys.readouterr().out
    assert "finished" in output
    assert "exported to" in output
    source = checkpoints.open_weights(find_origin(str(tmp_path / "run/model")))
    assert torch.equal(
        source.load()["lm_head.weight"], weights(tmp_path / "run")["lm_head.weight"].bfloat16().float()
    )
    train(config)
    assert "exported to" not in capsys.readouterr().out
    train(config.model_copy(update={"max_duration": "4ba"}))  # longer: a newer model in its place
    assert "exported to" in capsys.readouterr().out
    exported = checkpoints.open_weights(tmp_path / "run/model").load()
    assert torch.equal(
        weights(tmp_path / "run")["lm_head.weight"].bfloat16().float(), exported["lm_head.weight"]
    )


def test_a_finished_run_of_other_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    """After a small trial the real run would end, and Stage II would start from the trial's weights."""
    settings = [f"save.folder={tmp_path}/run", "max_duration=1ba"]
    run_folder = train(stage(folder, *settings))
    train(
        stage(folder, *settings, "microbatch=2", "log.every=7", f"data.cache={tmp_path}")
    )  # nothing that weights depend on
    other = stage(folder, *settings, "optimizer.lr=5e-4", "seed=7")
    with pytest.raises(
        ConfigError,
        match=r"run: finished with other settings: optimizer\.lr 0\.003, now 0\.0005; seed 0, now 7\. Ch",
    ):
        train(other)
    assert "lr: 0.003" in (run_folder / "stage.yaml").read_text()


def test_a_deterministic_stage_uses_deterministic_kernels_only(folder: Path, tmp_path: Path) -> None:
    try:
        fixed = train(
            stage(folder, f"save.folder={tmp_path}/fixed", "max_duration=3ba", "deterministic=true")
        )
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert curve(fixed) == curve(train(stage(folder, f"save.folder={tmp_path}/plain", "max_duration=3ba")))


def test_a_wrong_name_is_found_before_weights_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unitoken.train.stage.load_weights", lambda *_: pytest.fail("it loaded weights"))
    for override in ("optimizer.lr_scales={model.layers.9: 0.1}", "trainable=[model.layers.9]"):
        with pytest.raises(ConfigError, match=r"'model\.layers\.9' names no parameter"):
            train(stage(folder, f"save.folder={tmp_path}", override))


HOLDER = """
import sys, time
from pathlib import Path
from unitoken.common.files import exclusive_lock

with exclusive_lock(Path(sys.argv[1], ".lock"), "never"):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_folder_is_locked_by_a_live_run_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage(folder, f"save.folder={tmp_path}", "max_duration=1ba")
    other = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(
            ConfigError, match=rf"^save\.folder: {tmp_path}: another run is at work in it and holds \.lock$"
        ):
            train(config)
        with monkeypatch.context() as patch:  # a file system without locks
            patch.setattr(
                "fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available"))
            )
            train(config)
    finally:
        other.kill()
        other.communicate()
    train(config.model_copy(update={"max_duration": "2ba"}))
    assert len(curve(tmp_path)) == 2


def test_a_copied_run_without_its_link_goes_on(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")  # follows links
    train(stage(folder, f"save.folder={tmp_path}/run", "max_duration=19ba"))
    assert curve(tmp_path / "run")[:18] == curve(uninterrupted)
    assert len(curve(tmp_path / "run")) == 19


def test_a_resumed_run_uses_the_current_optimizer_settings(
    folder: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """It once used those in the checkpoint silently, and a new entry of `lr_scales` was a KeyError."""
    changed = ["optimizer.weight_decay=0.5", "optimizer.betas=[0.8, 0.9]", "optimizer.eps=1e-3"]
    found = {}
    for name, overrides in {
        "changed": [*changed, "optimizer.lr_scales={vit: 0.5, adapter: 0.1}"],
        "same": [],
    }.items():
        run_folder = shutil.copytree(uninterrupted, tmp_path / name, symlinks=True)
        train(stage(folder, f"save.folder={run_folder}", "max_duration=19ba", *overrides))
        found[name] = checkpoints.read_state(newest(run_folder))["optimizer"]
    groups = {(group["name"], group["weight_decay"]): group for group in found["changed"]["param_groups"]}
    assert set(groups) == {(name, decay) for name in ("vit", "adapter", "rest") for decay in (0.5, 0.0)}
    assert {(group["betas"], group["eps"]) for group in groups.values()} == {((0.8, 0.9), 1e-3)}
    assert {name: group["lr_scale"] for (name, _), group in groups.items()} == {
        "vit": 0.5,
        "adapter": 0.1,
        "rest": 1.0,
    }
    assert groups["vit", 0.5]["lr"] == 0.5 * groups["rest", 0.5]["lr"] > 0
    assert {(group["betas"], group["eps"]) for group in found["same"]["param_groups"]} == {
        ((0.9, 0.95), 1e-8)
    }
    assert found["changed"]["numbers"] == found["same"]["numbers"]  # no moment is lost


def test_another_runs_export_of_the_same_step_is_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training again with another seed the folder once kept the earlier model silently."""
    config = stage(folder, f"save.folder={tmp_path}/run", "max_duration=2ba", f"save.export={tmp_path}/model")

    def head(seed: int) -> torch.Tensor:
        train(config.model_copy(update={"seed": seed}))
        exported = checkpoints.open_weights(tmp_path / "model").load()["lm_head.weight"]
        assert torch.equal(exported, weights(tmp_path / "run")["lm_head.weight"].bfloat16().float())
        shutil.rmtree(tmp_path / "run")
        return exported

    first = head(seed=0)
    assert not torch.equal(first, head(seed=1))
    with monkeypatch.context() as patch:  # killed between its last checkpoint and the export
        patch.setattr("unitoken.train.stage.export_at_end", lambda *_: None)
        train(config)
    assert torch.equal(first, head(seed=0))


def test_a_folder_of_another_stage_is_refused(folder: Path, uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match="give each stage a folder of its own"):
        train(stage(folder, f"save.folder={uninterrupted}", "max_duration=3ep", "name=other"))
    smaller = stage(
        folder, f"save.folder={uninterrupted}", "max_duration=3ep", "model.decoder.hidden_size=16"
    )
    with pytest.raises(
        ConfigError, match="another architecture: its decoder and this stage's have hidden_size 32 and 16"
    ):
        train(smaller)
    (uninterrupted / "model.json").rename(uninterrupted / "away")  # a run of before there was one
    with pytest.raises(ConfigError, match="tensors do not fit"):
        train(smaller)
    (uninterrupted / "away").rename(uninterrupted / "model.json")


def test_resuming_with_another_plan_is_refused(folder: Path, uninterrupted: Path) -> None:
    about = (uninterrupted / "stage.yaml").read_bytes()
    with pytest.raises(ConfigError, match="seed: 0, now 1"):
        train(stage(folder, f"save.folder={uninterrupted}", "max_duration=3ep", "data.seed=1"))
    assert (uninterrupted / "stage.yaml").read_bytes() == about  # still what was trained


def test_float8_on_an_older_gpu_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"model.float8: needs GPUs of compute capability 8\.9 or more"):
        train(stage(folder, f"save.folder={tmp_path}", "precision=bf16", "model.float8=true"))


def test_bfloat16_without_a_gpu_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="precision: bf16 needs a GPU"):
        train(stage(folder, f"save.folder={tmp_path}", "precision=bf16"))
