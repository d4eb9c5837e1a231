"""A page of samples, with each picture beside what the image tokenizer keeps of it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from support.tokenizing import encoder_alone, picture, run_here, settings, tiny_vqgan, turns, write_items
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.common.errors import ConfigError
from unitoken.dataset import images
from unitoken.tokenize.__main__ import app
from unitoken.tokenize.checks.gallery import write_page
from unitoken.tokenize.merge import merge


@pytest.fixture(scope="module")
def folder(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    names = [picture(folder / f"{n}.png", n, (40, 20 + n)) for n in range(2)]
    items = [
        {"id": "a<b", "conversations": turns("<|image|> <b>?", "<|image|>"), "image": names},
        {"conversations": turns("a", "b")},
        {"id": "<i>", "conversations": turns("<|image|>", "b"), "image": "<none>.png"},
    ]
    run_here(settings(vqgan, crop_position="random"), write_items(folder, items), folder / "data")
    merge(str(folder / "data"))
    return folder


class Cards(HTMLParser):
    """The attributes of a page's samples, and of the pictures in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.samples: list[dict[str, str | None]] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = dict(attrs)
        if tag == "section" and fields.get("class") == "sample":
            self.samples.append(fields)
        if tag == "img":
            self.pictures.append(fields)


def test_each_image_is_shown_beside_its_decoded_codes(folder: Path, vqgan: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["preview", str(folder / "data"), "--out", str(tmp_path / "page")])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/page/index.html: 2 samples\n"), result.stderr
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == [
        "0000-0.png",
        "0000-1.png",
        "index.html",
    ]
    codec = load_vision(settings(vqgan).vision)
    for number in range(2):
        original = images.decode((folder / f"{number}.png").read_bytes())
        cut = images.tokenizer_pixels(original, (16, 16), images.crop_generator(0, "a<b", number))
        sheet = np.asarray(Image.open(tmp_path / "page" / f"0000-{number}.png"))
        assert (sheet[:, :16, :3] == cut).all()
        assert (sheet[:, 16:-16, 3] == 0).all()  # the gap
        decoded = codec.decode(codec.encode([cut]))[0].astype(int)
        assert abs(sheet[:, -16:, :3] - decoded).max() <= 1  # decoded with the others of its size
    page = (tmp_path / "page" / "index.html").read_text()
    assert (
        page.index("0000-0.png")
        < page.index("&lt;b&gt;?")
        < page.index('<figure class="image trained"><img src="0000-1.png"')
    )
    assert not re.search("<b>[?]|<i>|<none>", page)


def test_the_page_says_what_its_filters_need(folder: Path, vqgan: Path, tmp_path: Path) -> None:
    write_page(str(folder / "data"), settings(vqgan), 2, tmp_path)
    page = (tmp_path / "index.html").read_text()
    cards = Cards(page)
    names = ("data-id", "data-kind", "data-source")
    assert [tuple(sample[name] for name in names) for sample in cards.samples] == [
        ("a<b", "generation", "0"),
        ("1", "text", "0"),
    ]
    lengths = [int(sample["data-tokens"] or 0) for sample in cards.samples]
    assert [f"{length:,} tokens, " in page for length in lengths] == [True, True]
    assert {picture["loading"] for picture in cards.pictures} == {"lazy"}
    fields = re.findall(r'name="(kind|from|to|id|source)"', page)
    assert fields == ["kind", "kind", "from", "to", "id"]  # there is only one source
    assert "<output>" in page


def test_the_page_shows_the_whole_dataset_in_figures(folder: Path, vqgan: Path, tmp_path: Path) -> None:
    write_page(str(folder / "data"), settings(vqgan), 1, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "1 samples, chosen from all over the dataset" in page
    assert "<b>2</b><span>samples</span>" in page
    assert re.search(r"<td>draws pictures</td><td class=\"number\">1</td>", page)
    assert "tokens in a sample" in page
    assert "longer side of the original in pixels" in page
    assert re.search(r"<b>[\d.]+%</b><span>of the 64 codes occur", page)
    assert '<td>no such image</td><td class="number">1</td><td>' in page
    assert "items.json item 2 (&lt;i&gt;)" in page


def test_another_image_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = settings(tiny_vqgan(tmp_path / "other", seed=1))
    with pytest.raises(
        ConfigError,
        match=r"vision\.weights: .* its fingerprint is [0-9a-f]{16} .* was made with [0-9a-f]{16}",
    ):
        write_page(str(folder / "data"), other, 1, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_an_image_tokenizer_without_decoder_is_refused(vqgan: Path, tmp_path: Path) -> None:
    """Data can be made with it, but shows nothing: that is said before the weights are loaded."""
    alone = encoder_alone(vqgan, tmp_path / "alone")
    items = [{"conversations": turns("<|image|>", "a"), "image": [picture(tmp_path / "a.png", 0)]}]
    run_here(settings(alone), write_items(tmp_path, items), tmp_path / "data")
    merge(str(tmp_path / "data"))
    result = CliRunner().invoke(app, ["preview", str(tmp_path / "data"), "--out", str(tmp_path / "page")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"vision.weights: {alone} has transformers' encoder of Chameleon and no decoder" in result.stderr
    assert CliRunner().invoke(app, ["preview", str(tmp_path / "data")]).exit_code == 0


def test_texts_need_no_image_tokenizer(vqgan: Path, tmp_path: Path) -> None:
    run_here(settings(vqgan), write_items(tmp_path, [{"conversations": turns("a", "b")}]), tmp_path / "data")
    merge(str(tmp_path / "data"))
    write_page(str(tmp_path / "data"), settings(tmp_path / "gone"), 1, tmp_path / "page")
    assert "codes occur" not in (tmp_path / "page" / "index.html").read_text()
