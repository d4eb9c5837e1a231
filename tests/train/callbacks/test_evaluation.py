"""The loss on held-out samples, which does not affect training."""

from pathlib import Path

import pytest
import torch

from support.checkpoints import all_tensors
from support.paths import ROOT
from support.ranks import finish, start
from support.stages import curve, evaluations, metrics, stage, write_data, write_stage
from unitoken.common.errors import ConfigError
from unitoken.streaming_data.plan.lengths import is_held_out
from unitoken.streaming_data.reading.batch import num_targets, unpack
from unitoken.streaming_data.reading.loader import PackedLoader
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.config import StageConfig
from unitoken.train.model.unitoken import build_model
from unitoken.train.run import run_folder
from unitoken.train.stage import build_evaluation_loader, run_stage

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
TRAIN = ROOT / "train.py"
HELD_OUT = "data.streams.all.held_out=0.4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_data(folder / "data")
    return folder


def train(config: StageConfig) -> Path:
    run_stage(config, check_stage(config, 1))
    return Path(config.save.folder)


def loader_of(config: StageConfig) -> PackedLoader:
    loader = build_evaluation_loader(check_stage(config, 1))
    assert loader is not None
    return loader


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Path:
    return train(
        stage(folder, f"save.folder={folder}/evaluated", HELD_OUT, "eval.interval=2ba", "max_duration=2ep")
    )


def test_evaluation_does_not_change_training(folder: Path, evaluated: Path, tmp_path: Path) -> None:
    """With dropout: random state, data, counts, and weights are the same bit for bit."""
    plain = train(stage(folder, f"save.folder={tmp_path}", HELD_OUT, "max_duration=2ep"))
    assert curve(evaluated) == curve(plain)
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k} for line in metrics(run)]
        for run in (evaluated, plain)
    ]
    assert timeless[0] == timeless[1]
    files = [find_origin(str(run)) for run in (evaluated, plain)]
    states = [run_folder.read_state(file) for file in files]
    first, second = (all_tensors(file) for file in files)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert states[0]["dataset_state"] == states[1]["dataset_state"]
    assert str(states[0]["rng"]) == str(states[1]["rng"])
    assert torch.equal(states[0]["rng"][0]["torch"], states[1]["rng"][0]["torch"])
    for key in ("batch", "sample", "token", "epoch"):
        assert states[0]["timestamp"]["Timestamp"][key] == states[1]["timestamp"]["Timestamp"][key]


def test_it_runs_at_the_interval_and_at_the_end_on_the_same_data(evaluated: Path) -> None:
    found, last = evaluations(evaluated), len(metrics(evaluated))
    assert list(found) == sorted({*range(2, last + 1, 2), last})
    assert len({values["targets"] for values in found.values()}) == 1
    assert len({values["loss"] for values in found.values()}) == len(found)


def test_its_losses_are_those_on_all_held_out_batches(folder: Path, evaluated: Path) -> None:
    config = stage(folder, f"save.folder={folder}/evaluated", HELD_OUT, "eval.interval=2ba")
    sizes = check_stage(config, 1).sizes
    model = build_model(sizes.decoder, sizes.vision, config.model)
    source = run_folder.open_checkpoint(find_origin(str(evaluated)))
    load_weights(model, {part: source for part, _ in model.named_children()}, seed=0)
    total = targets = 0.0
    with torch.no_grad():
        for batch in map(unpack, loader_of(config)):
            count = int((batch["labels"][:, 1:] >= 0).sum())
            total, targets = total + model.eval()(batch).total.item() * count, targets + count
    last = list(evaluations(evaluated).values())[-1]
    assert (last["loss"], last["targets"]) == (pytest.approx(total / targets, abs=1e-5), targets)


def test_every_held_out_sample_is_seen_once_and_never_trained_on(folder: Path) -> None:
    """For any proportions of the training streams; the rest that fills no global batch is left out."""
    config = stage(
        folder, HELD_OUT, "data.streams.all.proportion=1", "data.epoch_samples=20", "eval.interval=2ba"
    )
    loader = loader_of(config)
    plan, dataset = loader.dataset.plan, loader.dataset
    seen = [dataset[int(sample)].id for sample in plan.ids]
    held_out = {
        f"{kind}{n}"
        for kind, count in (("q", 60), ("a", 30))
        for n in range(count)
        if is_held_out(f"{kind}{n}", 0.4)
    }
    assert len(seen) == len(set(seen)) == len(held_out) - plan.report.dropped_samples
    assert set(seen) <= held_out
    assert plan.report.dropped_packs < config.data.global_batch


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_may_be_limited_to_some_batches(
    workers: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if a worker has read ahead."""
    overrides = [
        "eval={interval: 2ba, batches: 1}",
        "max_duration=5ba",
        "optimizer.lr=1e-9",
        f"data.workers={workers}",
    ]
    config = stage(folder, f"save.folder={tmp_path}", HELD_OUT, *overrides)
    first, *others = evaluations(train(config)).values()
    batch = next(iter(loader_of(stage(folder, HELD_OUT, "eval.interval=2ba"))))
    assert first["targets"] == num_targets(batch)
    assert others == [pytest.approx(first, abs=1e-4)] * 2
    assert "global batches held out, 1 of them each time" in capsys.readouterr().out


def test_other_streams_can_be_evaluated_on(folder: Path, tmp_path: Path) -> None:
    other = f"{{local: {folder}/data, kinds: [generation]}}"
    config = stage(
        folder,
        f"save.folder={tmp_path}",
        f"eval={{interval: 3ba, streams: {{drawn: {other}}}}}",
        "max_duration=3ba",
    )
    (found,) = evaluations(train(config)).values()
    assert {"loss_generation", "loss_image", "loss_text"} <= set(found)
    assert {"loss_understanding", "loss_text_only"}.isdisjoint(found)


def test_missing_or_too_little_data_is_an_early_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval: no stream of data.streams has `held_out`"):
        check_stage(stage(folder, "eval.interval=2ba"), 1)
    streams = f"{{a: {{local: {folder}/data, held_out: 0.1}}, b: {{local: {folder}/data}}}}"
    with pytest.raises(
        ConfigError,
        match=r"eval.streams: split: held_out needs `held_out` above 0 in every stream: 'b' has none",
    ):
        check_stage(stage(folder, f"eval.streams={streams}"), 1)
    few = stage(folder, "data.streams.all.held_out=0.02", "eval.interval=2ba")
    with pytest.raises(
        ConfigError,
        match=r"eval: \d+ samples make \d packs .* an epoch needs at least 4, .* raise `held_out`",
    ):
        loader_of(few)


@pytest.mark.slow
def test_two_ranks_evaluate_and_train_as_one(folder: Path, tmp_path: Path) -> None:
    """One rank has batches without images where the other has some. Checkpoints follow evaluations."""
    shape = [HELD_OUT, "model.dropout=0", "max_duration=4ba", "eval.interval=2ba", "microbatch=1"]
    assert finish(start(2, [TRAIN, write_stage(folder), f"save.folder={tmp_path}/two", *shape])) == [0, 0]
    one = train(stage(folder, f"save.folder={tmp_path}/one", *shape))
    assert dict(curve(tmp_path / "two")) == pytest.approx(dict(curve(one)), rel=1e-5)
    ours, theirs = evaluations(one), evaluations(tmp_path / "two")
    assert list(ours) == list(theirs) == [2, 4]
    for step, values in ours.items():
        assert theirs[step] == pytest.approx(values, rel=1e-5)
    # One rank goes on from two, and evaluates as if it had been alone.
    longer = [change if not change.startswith("max_duration") else "max_duration=6ba" for change in shape]
    longer.append("optimizer.schedule=constant")
    alone = train(stage(folder, f"save.folder={tmp_path}/one", *longer))
    after = train(stage(folder, f"save.folder={tmp_path}/two", *longer))
    assert evaluations(after)[6] == pytest.approx(evaluations(alone)[6], rel=1e-5)
    assert metrics(after)[-1]["tokens_seen"] == metrics(alone)[-1]["tokens_seen"]
    plain = [change for change in shape if not change.startswith("eval")]
    assert finish(start(2, [TRAIN, write_stage(folder), f"save.folder={tmp_path}/plain", *plain])) == [0, 0]
    assert curve(tmp_path / "plain") == curve(tmp_path / "two")[:4]
