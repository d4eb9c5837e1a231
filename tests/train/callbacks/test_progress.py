"""How the progress of a stage is shown."""

import io

import pytest
from rich.console import Console

from unitoken.train.callbacks.progress import StepProgressBar

LINE = {"step": 156_249, "loss": 12.3456, "tokens_per_second": 1_234_567.0, "useful": 0.931, "skipped": 12}


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_counter_and_time_left_fit_every_terminal_width(columns: int) -> None:
    bar = StepProgressBar("stage2-anyres", 156_250, 10)
    bar.start(0)
    try:
        bar.bar.console.width = columns
        bar.start_time -= 2_000_000  # 23 days
        bar.step({**LINE, "step": 100_000})
        screen = Console(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
        screen.print(bar.bar.get_renderable())
    finally:
        bar.close()
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "100000/156250" in shown
    assert "13 days, 0:30:00 left" in shown
    assert "…" not in shown
    assert ("loss 12.3456" in shown) == (columns >= 80)
    assert ("useful" in shown) == (columns >= 140)
