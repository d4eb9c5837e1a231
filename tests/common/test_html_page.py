"""Pages that need no other file."""

import base64
import hashlib
import re

from unitoken.common.html_page import figure_tile, html_page, html_table, picture_url


def test_a_page_runs_its_own_script_alone() -> None:
    script = 'document.title = "</script>"'
    page = html_page("Runs & more", "<h1>Runs</h1>", script=script)
    [run] = re.findall(r"<script>(.*?)</script>", page)
    assert run == script.replace("</", "<\\/")
    digest = base64.b64encode(hashlib.sha256(run.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "<title>Runs &amp; more</title>" in page
    assert "script-src 'none'" in html_page("Runs", "<h1>Runs</h1>")


def test_pictures_beside_a_page_are_an_exception() -> None:
    alone, beside = html_page("a", ""), html_page("a", "", files=True)
    assert "img-src data:;" in alone
    assert "form-action 'none'" in alone
    assert "img-src data: 'self' file:;" in beside
    assert not re.search(r"https?://", alone + beside)


def test_a_table_escapes_its_cells_and_aligns_numbers() -> None:
    table = html_table(["run", "loss", "note"], [["<a>", 1.23456, "12 apples"], ["b", None, "none & co"]])
    assert "<td>&lt;a&gt;</td>" in table
    assert '<th class="number">loss</th>' in table
    assert '<td class="number">1.235</td>' in table
    assert '<td class="number"></td>' in table
    assert "<td>none &amp; co</td>" in table
    assert '<th class="number">n</th>' in html_table(
        ["n"], [["1,200 tokens/s"], [-1024], ["2e-05"], ["3.1%"]]
    )


def test_a_figure_is_green_or_red_with_a_goal_alone() -> None:
    kinds = [
        re.findall(r'class="(.*?)"', figure_tile("<1>", "of & all", good)) for good in (None, True, False)
    ]
    assert kinds == [["figure"], ["figure good"], ["figure bad"]]
    assert "<b>&lt;1&gt;</b><span>of &amp; all</span>" in figure_tile("<1>", "of & all")


def test_a_picture_travels_in_its_url() -> None:
    assert picture_url(b"\x89PNG") == "data:image/png;base64,iVBORw=="
