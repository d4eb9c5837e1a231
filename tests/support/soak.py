"""20,000 items, of which 3 % are bad in ten ways, and their tokenization, which is killed again and again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from support.processes import alive, wait_for, workers
from support.tokenizing import turns
from unitoken.storage.open import open_store
from unitoken.storage.store import Store
from unitoken.tokenize.output import Output

PICTURES = 500
BAD_EVERY = 33  # items: 3 % of them
LOADING_SECONDS = 5.0  # a worker takes longer until its first chunk is done


@dataclass(frozen=True)
class Size:
    """How large a test is."""

    items: int
    chunk_size: int
    kills: int

    @property
    def chunks(self) -> int:
        return -(-self.items // self.chunk_size)

    @property
    def bad(self) -> int:
        return sum(is_bad(n) for n in range(self.items))


FULL = Size(20_000, 20, 50)
SHORT = Size(990, 10, 3)
SHORT_OF_CLOUDS = Size(330, 10, 1)  # for each of three servers; with 990 items they took eight minutes


def is_bad(n: int) -> bool:
    """Whether the n-th item is to be rejected."""
    return n % BAD_EVERY == 5


def make_source(folder: Path, items: int) -> Path:
    """Write items.jsonl and its pictures: digits, which the demo's image tokenizer was trained on."""
    from sklearn.datasets import load_digits

    from demo.digits import picture

    (folder / "images").mkdir(parents=True)
    for number, digit in enumerate(load_digits().images[:PICTURES]):
        picture(digit).save(folder / "images" / f"{number:03d}.png")
    _write_bad_pictures(folder / "images")
    with open(folder / "items.jsonl", "w", encoding="utf-8") as file:
        for n in range(items):
            item = _bad(n, list(REASONS)[n // BAD_EVERY % len(REASONS)]) if is_bad(n) else _good(n)
            file.write((item if isinstance(item, str) else json.dumps(item)) + "\n")
    return folder / "items.jsonl"


THREE_IMAGES = ("<|image|> Read this digit: <|image|>", "a one", "Draw a one.", "<|image|>")


def _good(n: int) -> dict[str, Any]:
    image = f"images/{n % PICTURES:03d}.png"
    kinds: list[dict[str, Any]] = [
        {"conversations": turns("What digit is this? <|image|>", "seven"), "image": image},
        {"conversations": turns("Draw a seven.", "<|image|>"), "image": [image]},
        {"conversations": turns("Someone wrote seven. Which digit do you see?", "seven")},
        {"conversations": turns(*THREE_IMAGES), "image": [image] * 3},
    ]
    return {"id": f"item-{n:05d}", **kinds[n % 4]}


# The ways in which items are bad, and the beginning of their reason in rejects.jsonl.
REASONS = {
    "truncated.jpg": "unusable image: images/truncated.jpg: cannot be decoded",
    "empty.jpg": "unusable image: images/empty.jpg: not an image: 0 bytes",
    "page.jpg": "unusable image: images/page.jpg: not an image",
    "bomb.png": "unusable image: images/bomb.png: Image size (3600000000 pixels)",
    "missing.png": "no such image: images/missing.png",
    "roles": "wrong turn order",
    "counts": "image counts differ",
    "empty text": "empty text",
    "types": "no conversations: expected a list",
    "broken line": "not readable as JSON",
}


def _bad(n: int, kind: str) -> dict[str, Any] | str:
    """An item that is rejected, or a line that is not JSON."""
    item = {"id": f"bad-{n:05d}"}
    if kind == "roles":
        wrong_order = [{"from": "gpt", "value": "seven"}, {"from": "human", "value": "Why?"}]
        return item | {"conversations": wrong_order}
    if kind == "counts":
        return item | {"conversations": turns("<|image|> <|image|>", "seven"), "image": ["images/000.png"]}
    if kind == "empty text":
        return item | {"conversations": turns("", "")}
    if kind == "types":
        return item | {"conversations": "What digit is this?", "image": 7}
    if kind == "broken line":
        return json.dumps(item)[:-3]
    question = turns("What digit is this? <|image|>", "seven")
    return item | {"conversations": question, "image": f"images/{kind}"}


def _write_bad_pictures(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "JPEG")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[:700])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<!doctype html><title>404 Not Found</title>")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def command(source: Path, out: str, size: Size, *arguments: str) -> list[str]:
    """The command that tokenizes the items."""
    program = [sys.executable, "-m", "unitoken.tokenize", "run", "--config", "yamls/tokenize/digits.yaml"]
    settings = [f"chunk_size={size.chunk_size}", "max_reject_fraction=0.04"]
    return [*program, *arguments, "--in_filename", str(source), "--out_dir", out, *settings]


def content(url: str) -> dict[str, str]:
    """Every file of a folder or bucket, with the hash of its bytes."""
    store = open_store(url)
    return {name: hashlib.sha256(store.read(name)).hexdigest() for name in store.sizes()}


def done(out: str) -> int:
    """The number of finished chunks."""
    return len(Output(out).done())


def kill_again_and_again(source: Path, out: str, size: Size, seed: int = 0) -> None:
    """Start the command and kill it or one of its workers at a random moment, `size.kills` times.

    The moments are spread over the work: each is a number of finished chunks and a little time. One run of
    five is killed while it loads its models.
    """
    moment = random.Random(seed)
    process: subprocess.Popen[bytes] | None = None
    loading = False
    for count in sorted(moment.randrange(size.chunks * 9 // 10) for _ in range(size.kills)):
        while True:
            if process is None or process.poll() is not None:
                process, loading = _start(source, out, size, moment.choice((2, 4))), moment.random() < 0.2
            if loading:
                time.sleep(moment.uniform(0, LOADING_SECONDS))
            else:
                _wait_for_chunks(process, out, count)
                time.sleep(moment.uniform(0, size.chunks / 2000))
            if process.poll() is None:
                break
            assert not Output(out).exists("manifest.json"), "ended before it could be killed"
        running = workers(process.pid)
        if running and moment.random() < 0.6:
            os.kill(moment.choice(running), signal.SIGKILL)
        else:
            _kill(process)
    if process is not None:
        _kill(process)
    assert not Output(out).exists("manifest.json")


def _start(source: Path, out: str, size: Size, splits: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(source, out, size, "--splits", str(splits)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _wait_for_chunks(process: subprocess.Popen[bytes], out: str, count: int) -> None:
    """Wait until at least one new chunk and `count` chunks in all are done, or the run has ended."""
    begun_with = done(out)
    while process.poll() is None and done(out) < max(count, begun_with + 1):
        time.sleep(0.05)


def _kill(process: subprocess.Popen[bytes]) -> None:
    running = workers(process.pid) if process.poll() is None else []
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, running)), seconds=20)


def finish(source: Path, out: str, size: Size, *arguments: str) -> str:
    """Run the command to its end. Returns its output."""
    run = subprocess.run(command(source, out, size, *arguments), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def check_counts(out: str, size: Size) -> None:
    """Check that exactly the bad items are in rejects.jsonl, with their reasons, and the rest are samples."""
    store: Store = open_store(out)
    manifest = json.loads(store.read("manifest.json"))
    assert (manifest["items"], manifest["rejected"]) == (size.items, size.bad)
    assert manifest["samples"] == size.items - size.bad
    rejects = [json.loads(line) for line in store.read("rejects.jsonl").splitlines()]
    assert [reject["position"] for reject in rejects] == [n for n in range(size.items) if is_bad(n)]
    for reject in rejects:
        reasons = list(REASONS.values())
        assert reject["reason"].startswith(reasons[reject["position"] // BAD_EVERY % len(reasons)])
