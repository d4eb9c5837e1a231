"""A GPU that computes a microbatch is never waited for, and once a step: else it stands still between them.

Counted on the CPU: operations whose result, or its shape, depends on values.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.core import Event
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_counts import waits_for_device
from support.stages import stage, write_data
from unitoken.train.check import check_stage
from unitoken.train.stage import run_stage


class Waits(TorchDispatchMode):
    """Lists the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits_for_device(func, args):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    def list_calls(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of tensors that also lists its calls, as no operation stands for it."""

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found.append(method.__name__)
            return method(tensor, *args, **kwargs)

        return call


def test_a_mask_and_an_item_are_waits_and_places_are_not() -> None:
    values = torch.arange(3)
    with Waits() as waits:
        values[torch.tensor([0, 2])].sum()
        assert waits.found == []
        values[values > 1].sum().item()
    assert waits.found == ["aten.index.Tensor", "aten._local_scalar_dense.default"]


@pytest.mark.filterwarnings("ignore")  # Composer's and streaming's own
def test_no_microbatch_waits_and_our_callbacks_wait_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_microbatches, in_callbacks, events = Waits(), Waits(), Counter[str]()
    train, run_event = Trainer._train_microbatch, Callback.run_event

    def train_microbatch(trainer: Trainer, *args: Any) -> Any:
        events["microbatch"] += 1
        with in_microbatches:
            return train(trainer, *args)

    def run_callback(callback: Callback, event: Event, *args: Any) -> None:
        if not type(callback).__module__.startswith("unitoken."):
            return run_event(callback, event, *args)
        already = len(in_callbacks.found)
        with in_callbacks, monkeypatch.context() as patched:
            for name in ("tolist", "numpy"):
                patched.setattr(Tensor, name, in_callbacks.list_calls(getattr(Tensor, name)))
            run_event(callback, event, *args)
        events[event.value] += len(in_callbacks.found) - already
        return None

    monkeypatch.setattr(Trainer, "_train_microbatch", train_microbatch)
    monkeypatch.setattr(Callback, "run_event", run_callback)
    write_data(tmp_path / "data")
    config = stage(tmp_path, "max_duration=3ba", "save.interval=100ba", "model.mask_image_logits=true")
    run_stage(config, check_stage(config, 1))
    assert events["microbatch"] == 3 * 4
    assert in_microbatches.found == []
    of_steps = {event: count for event, count in events.items() if event.startswith(("after_", "b"))}
    assert of_steps["after_train_batch"] == 3, in_callbacks.found
    assert sum(of_steps.values()) == 3, events
