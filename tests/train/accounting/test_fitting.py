"""`auto` and `unitoken plan-memory` choose the fastest settings that fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulated_step import LUMINA_7B, SIGLIP_SO400M, peak_bytes
from support.paths import ROOT
from support.stages import curve, stage, write_data
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.train.accounting.fitting import (
    CANDIDATES,
    Fit,
    Fitting,
    PackWork,
    choose,
    expected_speed,
)
from unitoken.train.accounting.flops import PEAK_FLOPS
from unitoken.train.accounting.memory import RUNTIME
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.metadata import read_stage
from unitoken.train.config import StageConfig
from unitoken.train.model.unitoken import build_model
from unitoken.train.optim import count_trained, freeze

WORK = PackWork(tokens=4000, squares=4000 * 1500, targets=2000, views=1, most_views=2)
AUTO = ("activation_checkpointing=auto", "microbatch=auto")
COMPILED = "model.compile=true"


def seven_b(ranks: int, *overrides: str, layers: int = 32, name: str = "stage2") -> Fitting:
    """Return a stage of the 7B model on so many GPUs."""
    config = load_config(StageConfig, ROOT / f"yamls/{name}.yaml", [*AUTO, *overrides])
    decoder = LUMINA_7B.model_copy(update={"num_hidden_layers": layers})
    model = build_model(decoder, SIGLIP_SO400M, config.model)
    trained = freeze(model, config.trainable)
    return Fitting(config, decoder, SIGLIP_SO400M, trained, count_trained(model), ranks, WORK)


def chosen(fitting: Fitting, gigabytes: float) -> tuple[Any, int]:
    fit = choose(fitting, gigabytes * 1e9)
    return fit.recompute, fit.microbatch


def test_less_memory_means_more_recomputation() -> None:
    """Stage II on 8 GPUs: the least recomputed mode that fits, then the largest microbatch."""
    fitting = seven_b(8, COMPILED)
    assert chosen(fitting, 140) == ("none", 2)
    assert chosen(fitting, 80) == ("none", 1)
    assert chosen(fitting, 56) == (8, 1)
    assert chosen(fitting, 40) == ("selective", 1)
    assert chosen(fitting, 30) == ("full", 2)
    for gigabytes in (30, 40, 56, 80):
        assert choose(fitting, gigabytes * 1e9).memory.total <= gigabytes * 1e9


def test_a_given_setting_stays_as_it_is() -> None:
    assert chosen(seven_b(8, "microbatch=2", COMPILED), 80) == ("selective", 2)
    assert chosen(seven_b(8, "activation_checkpointing=full", COMPILED), 80) == ("full", 8)
    # Without `auto` nothing is chosen, and nothing is refused.
    assert chosen(seven_b(8, "activation_checkpointing=none", "microbatch=8"), 80) == ("none", 8)


def test_selective_is_left_out_where_it_is_not_possible() -> None:
    """Flex attention without model.compile."""
    assert "selective" not in [fit.recompute for fit in seven_b(8, "model.compile=false").that_fit(80e9)]
    assert "selective" in [
        fit.recompute for fit in seven_b(8, "model.compile=false", "model.attention=sdpa").that_fit(80e9)
    ]


def test_microbatches_divide_the_share_of_a_rank() -> None:
    """Of 64 packs 16 ranks have 4 each, and of 48 packs 16 ranks have 3."""
    assert chosen(seven_b(16, "data.global_batch=64", "activation_checkpointing=full"), 80) == ("full", 4)
    assert chosen(seven_b(16, "data.global_batch=48", "activation_checkpointing=full"), 80) == ("full", 3)


def test_between_machines_microbatches_are_large() -> None:
    """One pack at a time would wait for the gathered parameters longer than it computes."""
    recompute, packs = chosen(seven_b(16, COMPILED, "data.global_batch=128"), 80)
    assert (recompute, packs) == ("selective", 4)
    assert chosen(seven_b(16, COMPILED, "data.global_batch=128", "fsdp.replicas=2"), 80) == ("none", 1)


def test_a_cpu_recomputes_nothing() -> None:
    fit = choose(seven_b(1), None)
    assert (fit.recompute, fit.microbatch) == ("none", 1)
    assert choose(seven_b(1, "microbatch=4"), None).microbatch == 4


def test_nothing_that_fits_is_an_error_with_the_least() -> None:
    with pytest.raises(ConfigError) as error:
        choose(seven_b(1), 80e9)
    assert str(error.value).startswith(
        "activation_checkpointing: auto: nothing fits a GPU of 80.0 GB: activation_checkpointing=full "
        "microbatch=1 needs about 1"
    )


def test_the_expected_mfu_is_the_reviewed_one() -> None:
    """Full recomputation on H100s: 32 % as shipped and 41 % compiled, by a count of bytes and operations."""
    for is_compiled, mfu in ((False, 0.32), (True, 0.41)):
        fit = seven_b(8, f"model.compile={is_compiled}").fit("full", 8)
        tokens, found = expected_speed(fit, WORK, PEAK_FLOPS["H100 80GB HBM3"], is_compiled)
        assert found == pytest.approx(mfu, abs=0.01)
        assert tokens == pytest.approx(mfu * 989.4e12 / (fit.needed / WORK.tokens), rel=0.03)


def test_settings_are_ordered_by_speed_then_packs() -> None:
    fits = seven_b(8, COMPILED).that_fit(80e9)
    assert [fit.cost for fit in fits] == sorted(fit.cost for fit in fits)
    assert {fit.recompute for fit in fits} == set(CANDIDATES)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "gigabytes", "overrides"), [(8, 24, [COMPILED]), (2, 40, []), (1, 60, [])])
def test_the_choice_takes_what_a_simulated_step_takes(
    ranks: int, gigabytes: float, overrides: list[str]
) -> None:
    """A step of 8 layers of the 7B model, on tensors without memory, within a tenth."""
    fitting = seven_b(ranks, "model.attention=sdpa", *overrides, layers=8)
    for fit in fitting.that_fit(gigabytes * 1e9)[:2]:
        assert 0.98 * simulated(fitting, fit) < fit.memory.total - RUNTIME < 1.1 * simulated(fitting, fit)


def simulated(fitting: Fitting, fit: Fit) -> int:
    config = fit.settings_in(fitting.config)
    packs = config.data.global_batch // fitting.ranks // fit.microbatch
    return peak_bytes(
        config,
        fitting.decoder,
        SIGLIP_SO400M,
        ranks=fitting.ranks,
        views=fit.microbatch * WORK.most_views,
        microbatches=min(packs, 2),
    )


@pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
def test_a_stage_prints_and_records_what_auto_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun on a GPU, which is pretended, and resumed on a CPU, with the losses of a run on a CPU."""
    from unitoken.train import stage as stages
    from unitoken.train.distributed import composer_trainer

    def run(name: str, steps: int) -> tuple[Any, Any]:
        settings = ("model.dropout=0", "optimizer.schedule=constant", f"max_duration={steps}ba")
        config = stage(tmp_path, *AUTO, *settings, f"save.folder={tmp_path / name}")
        stages.run_stage(config, check_stage(config, 1))
        recorded = read_stage(tmp_path / name)
        assert recorded is not None
        return recorded.activation_checkpointing, recorded.microbatch

    write_data(tmp_path / "data")
    assert run("whole", 4) == ("none", 1)
    with monkeypatch.context() as patch:
        # A GPU that holds four packs if all is recomputed, and nothing else.
        patch.setattr(
            stages, "choose", lambda fitting, _: choose(fitting, fitting.fit("full", 4).memory.total)
        )
        patch.setattr(composer_trainer, "gpu_bytes", lambda: 3e9)
        patch.setattr(composer_trainer, "has_gpu", lambda: True)
        patch.setattr(stages, "_peak_flops", lambda precision: 1e12)
        assert run("moved", 2) == ("full", 4)
    out = capsys.readouterr().out
    assert "tiny: auto chose activation_checkpointing=full microbatch=4\n" in out
    assert "tiny: needs about 3.0 GB a GPU: runtime 3.0\n" in out
    assert re.search(r"tiny: about [\d,]+ tokens/s a GPU expected, MFU 3\d% \(computed\)\n", out)
    assert run("moved", 4) == ("none", 1)
    expected = [loss for _, loss in curve(tmp_path / "whole")]
    assert [loss for _, loss in curve(tmp_path / "moved")] == pytest.approx(expected, rel=1e-5)
