"""The page of a plan."""

from html.parser import HTMLParser

import pytest

from support.plans import LENGTH, make_recipe, make_stream
from unitoken.streaming_data.plan.build import build
from unitoken.streaming_data.plan.composition import compose
from unitoken.streaming_data.tools.plan_page import PlannedEpoch, epochs_of_run, plan_page
from unitoken.streaming_data.tools.sweep import SweepRow

SWEEP = [SweepRow(64, 0.9, 3, 0.8, 40), SweepRow(128, 0.0, 0, 0.0, problem="all are <longer>")]


class Tables(HTMLParser):
    """The cells of a page's tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._in_cell = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, name: str) -> dict[str, str]:
        """The first row with a name, by the heads of its table."""
        place = next(place for place, row in enumerate(self.rows) if row[0] == name)
        head = next(row for row in reversed(self.rows[:place]) if not row[-1][:1].isdigit())
        return dict(zip(head, self.rows[place], strict=True))


@pytest.fixture(scope="module")
def page() -> str:
    streams = [make_stream("a<b", 500, proportion=3), make_stream("c", 300, seed=1, proportion=1)]
    recipe = make_recipe(streams, epoch_samples=400)
    plans = [build(recipe, streams, 0, None)]
    plans.append(build(recipe, streams, 1, plans[0].report))
    epochs = [PlannedEpoch(plan.report, compose(plan, streams, LENGTH, 4, 20)) for plan in plans]
    return plan_page("yamls/<x>.yaml", recipe, epochs, 7, SWEEP)


def test_the_mixture_is_shown_as_asked_and_as_realised(page: str) -> None:
    rows = Tables(page).rows
    [found] = [row for row in rows if row[0] == "a<b" and len(row) == 10]
    assert found[1] == "75.0%"
    assert abs(float(found[2].rstrip("%")) - 75) < 3
    assert "a&lt;b" in page
    assert "<b," not in page
    assert "<x>" not in page


def test_each_epoch_has_its_row_and_later_ones_are_counted(page: str) -> None:
    rows = Tables(page).rows
    head = next(place for place, row in enumerate(rows) if row[0] == "epoch")
    assert [row[0] for row in rows[head + 1 : head + 3]] == ["0", "1"]
    assert rows[head + 1][1] == rows[head + 2][1]  # equally many packs
    assert "5 more follow in this run" in page
    assert "epochs 0 to 1, one after the other" in page


def test_batches_are_drawn_by_stream_and_by_kind(page: str) -> None:
    assert page.count('role="img"') == 5
    assert page.index("By stream") < page.index("By kind")
    for name in ("understanding", "generation", "global batch", "% of a pack filled"):
        assert name in page


def test_other_lengths_are_shown_where_they_were_swept(page: str) -> None:
    rows = {row[0]: row for row in Tables(page).rows}
    assert rows["64"] == ["64", "90.00%", "80.00%", "3", "as the settings have it"]
    assert rows["128"][-1] == "all are <longer>"
    assert "--sweep-length" not in page


@pytest.mark.parametrize(
    ("max_duration", "expected"), [(None, 1), ("3ep", 3), ("10ba", 1), ("11ba", 2), ("5tok", 1)]
)
def test_a_run_has_the_epochs_that_it_begins(max_duration: str | None, expected: int) -> None:
    streams = [make_stream("a", 500)]
    recipe = make_recipe(streams)
    report = build(recipe, streams, 0, None).report.model_copy(update={"packs": 40})
    assert epochs_of_run(max_duration, report, 4) == expected
