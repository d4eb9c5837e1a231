"""What the packs of a plan are made of, along an epoch."""

import numpy as np
import pytest

from support.plans import LENGTH, make_recipe, make_stream, samples_of
from unitoken.dataset.kinds import KINDS
from unitoken.streaming_data.plan import composition
from unitoken.streaming_data.plan.build import build
from unitoken.streaming_data.plan.composition import FILL_BINS, compose


@pytest.mark.parametrize("block", [1 << 18, 5])
@pytest.mark.parametrize("most_parts", [7, 10_000])
def test_parts_add_up_to_their_batches(monkeypatch: pytest.MonkeyPatch, block: int, most_parts: int) -> None:
    monkeypatch.setattr(composition, "PACKS_AT_ONCE", block)
    streams = [make_stream("a", 500), make_stream("b", 300, longest=20, seed=1)]
    plan = build(make_recipe(streams), streams, 0, None)
    found = compose(plan, streams, LENGTH, 4, most_parts)
    assert len(found.borders) == min(most_parts, plan.packs // 4) + 1
    lengths = np.concatenate([stream.lengths for stream in streams]).astype(np.int64)
    kinds = np.concatenate([stream.kinds for stream in streams])
    packs = samples_of(plan)
    for part, (begin, end) in enumerate(zip(found.borders[:-1], found.borders[1:], strict=True)):
        fills = [lengths[pack].sum() / LENGTH for pack in packs[4 * begin : 4 * end]]
        ids = np.array([number for pack in packs[4 * begin : 4 * end] for number in pack])
        for stream, of_stream in enumerate((ids < 500, ids >= 500)):
            for kind in range(len(KINDS)):
                chosen = ids[of_stream & (kinds[ids] == kind)]
                assert found.tokens[stream, kind, part] == lengths[chosen].sum()
        assert found.fill[part] == pytest.approx(np.mean(fills))
        assert found.least_fill[part] == pytest.approx(min(fills))
    assert found.pack_fills.sum() == plan.packs
    assert found.pack_fills[FILL_BINS // 2 :].sum() > plan.packs / 2
