"""Page through a dataset of any size in a browser: `unitoken preview --serve`.

    /                       samples that pass the filters, a page at a time
    /figures                the dataset in figures
    /picture/NUMBER-IMAGE   a picture beside what its codes decode to, as a PNG

Only what a page shows is read from the shards. The server answers this machine alone: it listens on
127.0.0.1, and refuses a `Host` that is neither that nor localhost, as a name of somebody else's may point
here and would let their page read the answers. Nothing in a request names a file.
"""

from __future__ import annotations

import functools
import html
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

import numpy as np

from unitoken.codec.image_tokenizer.encoder import VisionCodec
from unitoken.common.cli import report
from unitoken.common.errors import ConfigError, DataError, one_line
from unitoken.common.html_page import html_page
from unitoken.common.interruption import end_on_signals
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.record import Record
from unitoken.tokenize.checks.dataset_figures import CodeUsage, dataset_sections, dataset_tiles
from unitoken.tokenize.checks.gallery import LEGEND, STYLE, about
from unitoken.tokenize.checks.preview import Dataset, open_dataset
from unitoken.tokenize.checks.sample_cards import (
    Figure,
    decode_pairs,
    gap_width,
    load_codec,
    sample_card,
)
from unitoken.tokenize.checks.sample_filters import filter_form, filter_query, read_filters
from unitoken.tokenize.checks.sample_reader import SampleReader, spread_numbers
from unitoken.tokenize.checks.sample_table import Filters, SampleTable
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.finished_chunks import map_in_threads
from unitoken.tokenize.rejects import group_rejects

ADDRESS = "127.0.0.1"
HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")
COUNTED_SAMPLES = 256  # whose codes are counted
KEPT_RECORDS, KEPT_PICTURES = 128, 256
MOST_FIELDS = 20  # of a form
IDLE_SECONDS = 30.0  # after which a connection without a request is closed
PICTURE = re.compile(r"/picture/(\d{1,12})-(\d{1,5})")
NAVIGATION_STYLE = """
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: baseline; font-size: 15px; margin: 14px 0 }
.legend { margin: 14px 0 0 } nav b { font-weight: 600 } nav .off { color: var(--soft); opacity: .6 }
"""


class Answer(NamedTuple):
    """What the server sends."""

    status: HTTPStatus
    media_type: str
    content: bytes


class DatasetPages:
    """Makes the pages of a dataset. Several threads may use it. To be closed."""

    def __init__(self, out: str, settings: TokenizeConfig, page_size: int) -> None:
        """Open the dataset and load its tokenizers.

        Args:
            out: path or URL of the dataset.
            settings: name its text tokenizer and its image tokenizer.
            page_size: samples on a page.

        Raises:
            ConfigError: no dataset, or another tokenizer than its own.
        """
        self._out, self._page_size = out, page_size
        self._dataset: Dataset = open_dataset(out, settings.tokenizer)
        self._codec: VisionCodec | None = load_codec(self._dataset.manifest, settings, out)
        self._reader = SampleReader(self._dataset.store)
        self._table = SampleTable(self._dataset.store, self._reader.entries)
        self._decoding = threading.Lock()
        self._find = functools.lru_cache(4)(self._table.find)
        self._record = functools.lru_cache(KEPT_RECORDS)(self._reader.read)
        self._picture = functools.lru_cache(KEPT_PICTURES)(self._make_picture)
        self._figures = functools.lru_cache(1)(self._make_figures)

    def __enter__(self) -> DatasetPages:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()

    def answer(self, target: str) -> Answer:
        """Return what a path and query ask for."""
        try:
            parts = _parts(target)
            if parts.path == "/":
                return self._html(HTTPStatus.OK, self._samples_page(_fields(parts.query)))
            if parts.path == "/figures":
                return self._html(HTTPStatus.OK, self._figures())
            if match := PICTURE.fullmatch(parts.path):
                return self._picture_answer(int(match[1]), int(match[2]))
        except ConfigError as error:
            return self._problem(HTTPStatus.BAD_REQUEST, one_line(error, 300))
        except (OSError, DataError) as error:
            return self._problem(HTTPStatus.BAD_GATEWAY, one_line(error, 300))
        return self._problem(HTTPStatus.NOT_FOUND, "there is no such page")

    # --- pages

    def _samples_page(self, fields: Mapping[str, Sequence[str]]) -> str:
        filters = read_filters(fields)
        found = self._find(filters)
        pages = max(1, -(-len(found) // self._page_size))
        page = min(read_page(fields), pages)
        begin = (page - 1) * self._page_size
        shown = found[begin : begin + self._page_size].tolist()
        cards = map_in_threads(self._card, shown)
        places = f"{begin + 1:,} to {begin + len(shown):,}" if shown else "0"
        count = f"{places} of {len(found):,}"
        if len(found) < len(self._reader):
            count += f" ({len(self._reader):,} in all)"
        return f"""{_navigation("Samples")}{filter_form(self._table, filters, count, button=True)}
<p class="legend">{LEGEND}</p>
{"".join(cards) or "<section>No sample passes these filters.</section>"}
{_page_links(filters, page, pages)}"""

    def _card(self, number: int) -> str:
        try:
            record = self._record(number)
        except (OSError, DataError) as error:
            problem = html.escape(one_line(error, 300))
            return f'<section class="sample unreadable">{problem}</section>'
        figures = []
        if self._codec is not None:
            figures = [self._figure(number, record, image) for image in range(len(record.image_spans))]
        return sample_card(number, record, self._dataset, self._table, figures)

    def _figure(self, number: int, record: Record, image: int) -> Figure:
        """Return how a picture will look, which is made when a browser asks for it."""
        manifest, data = self._dataset.manifest, record.images[image]
        rows, columns = record.image_spans[image, 2:].tolist()
        height, width = rows * manifest.vision.downsampling, columns * manifest.vision.downsampling
        url, codes = f"/picture/{number}-{image}", f"from its {rows * columns} codes"
        if not len(data):
            return Figure(url, width, height, f"{codes}; the dataset has no originals")
        try:
            size = images.displayed_size(data, manifest.compat is not None)
        except ImageError as error:
            return Figure(url, width, height, f"{codes}; the original can not be read: {error}")
        caption = f"{size[0]} x {size[1]}, cut to {width} x {height}  |  {codes}"
        return Figure(url, 2 * width + gap_width(height), height, caption)

    def _make_figures(self) -> str:
        usage = CodeUsage(np.zeros(self._dataset.manifest.vision.codebook_size, np.int64))
        numbers = spread_numbers(len(self._reader), COUNTED_SAMPLES)
        usage.add(map_in_threads(self._reader.read, numbers), self._dataset)
        usage.is_whole = len(numbers) == len(self._reader)
        sections = dataset_sections(self._table, usage, group_rejects(self._out))
        tiles = dataset_tiles(self._dataset.manifest, self._table)
        return f"{_navigation('Figures')}{tiles}{sections}"

    def _html(self, status: HTTPStatus, content: str) -> Answer:
        body = f"<h1>{html.escape(self._out)}</h1><p>{about(self._dataset)}</p>{content}"
        page = html_page(self._out, body, STYLE + NAVIGATION_STYLE, files=True)
        return Answer(status, "text/html; charset=utf-8", page.encode(errors="replace"))

    def _problem(self, status: HTTPStatus, problem: str) -> Answer:
        return self._html(status, f"{_navigation('')}<section>{html.escape(problem)}</section>")

    # --- pictures

    def _picture_answer(self, number: int, image: int) -> Answer:
        if self._codec is None or number >= len(self._reader) or image >= self._table.images[number]:
            return self._problem(HTTPStatus.NOT_FOUND, "there is no such picture")
        return Answer(HTTPStatus.OK, "image/png", self._picture(number, image))

    def _make_picture(self, number: int, image: int) -> bytes:
        assert self._codec is not None
        record = self._record(number)
        with self._decoding:  # one picture keeps all cores busy, and a GPU's memory is limited
            return decode_pairs([(record, image)], self._dataset, self._codec)[0].png()


def _parts(target: str) -> SplitResult:
    try:
        return urlsplit(target)
    except ValueError:  # brackets that hold no address
        raise ConfigError("this is no address") from None


def _fields(query: str) -> dict[str, list[str]]:
    try:
        return parse_qs(query, max_num_fields=MOST_FIELDS)
    except ValueError:
        raise ConfigError(f"more than {MOST_FIELDS} fields") from None


def read_page(fields: Mapping[str, Sequence[str]]) -> int:
    """Return the number of the page that is asked for, from 1."""
    text = fields.get("page", ["1"])[0]
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ConfigError(f"page: expected a whole number, found {text[:40]!r}")
    return max(1, int(text))


def _navigation(here: str) -> str:
    links = {"Samples": "/", "Figures": "/figures"}
    parts = [
        f"<b>{name}</b>" if name == here else f'<a href="{url}">{name}</a>' for name, url in links.items()
    ]
    return f"<nav>{''.join(parts)}</nav>"


def _page_links(filters: Filters, page: int, pages: int) -> str:
    def link(name: str, to: int) -> str:
        if to == page or not 1 <= to <= pages:
            return f'<span class="off">{name}</span>'
        query = html.escape(urlencode([*filter_query(filters), ("page", to)]))
        return f'<a href="/?{query}">{name}</a>'

    links = [link("First", 1), link("Previous", page - 1), link("Next", page + 1), link("Last", pages)]
    return f'<nav aria-label="Pages">{"".join(links)}<span>page {page:,} of {pages:,}</span></nav>'


# --- the server


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests for this machine; all other methods are refused by the base class."""

    server_version, sys_version = "unitoken", ""
    timeout = IDLE_SECONDS
    pages: DatasetPages

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            self._send(Answer(HTTPStatus.FORBIDDEN, "text/plain", b"this server is for 127.0.0.1 alone\n"))
            return
        self._send(self.pages.answer(self.path))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.media_type,
            "Content-Length": str(len(answer.content)),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing for each request."""


class Server(ThreadingHTTPServer):
    """The server of a dataset's pages."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing where a browser has closed its connection."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def make_server(pages: DatasetPages, port: int) -> Server:
    """Return a server that listens on 127.0.0.1.

    Args:
        pages: what it sends.
        port: 0 takes any that is free.

    Raises:
        ConfigError: the port is in use, or needs rights that this process lacks.
    """
    handler = type("Handler", (_Handler,), {"pages": pages})
    try:
        return Server((ADDRESS, port), handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"--port {port}: {reason}; choose another port, or 0 for any free one") from None


def serve_dataset(out: str, settings: TokenizeConfig, page_size: int, port: int) -> None:
    """Serve the pages of a dataset until Ctrl+C.

    Raises:
        ConfigError: as `DatasetPages` and `make_server`.
    """
    with DatasetPages(out, settings, page_size) as pages, make_server(pages, port) as server:
        report(f"http://{ADDRESS}:{server.server_port}/ shows {out}; Ctrl+C ends it")
        end_on_signals("stopped")
        server.serve_forever()
