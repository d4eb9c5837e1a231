"""The screen of `unitoken check`: at most 100 columns, and readable without colours."""

from __future__ import annotations

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from unitoken.train.accounting.fitting import describe_fit
from unitoken.train.accounting.memory import GB
from unitoken.train.overview.bars import draw_packs
from unitoken.train.overview.documents import TRAINED, find_tokenizer, show_documents
from unitoken.train.overview.facts import Overview, memory_here, size_text

WIDTH = 100


def make_console() -> Console:
    """Return a console for stdout, as wide as the terminal but at most 100 columns."""
    console = Console(highlight=False, emoji=False, markup=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def show(overview: Overview, console: Console) -> None:
    """Print the screen."""
    coloured = console.color_system is not None and not console.no_color
    streams = [source.name for source in overview.resolved.train.sources]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _facts(overview):
        table.add_row(name, Text(text))
    console.print(_heading(overview.config.name))
    console.print(table)
    console.print(_heading("mixture of an epoch"))
    console.print(Text(overview.plan.report.table()))
    console.print(_heading(f"first batch: {len(overview.batch):,} packs, a row each"))
    length = overview.config.data.packed_length
    for line in draw_packs(overview.batch, streams, length, console.width, coloured):
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    vocabulary = overview.resolved.vocabulary
    tokenizer = find_tokenizer(overview.config, overview.resolved.train.sources, vocabulary)
    if isinstance(tokenizer, str):
        console.print(Text(f"first pack: its text can not be shown: {tokenizer}"), overflow="fold")
        return
    mark = "green" if coloured else f"in {TRAINED[0]} {TRAINED[1]}"
    console.print(_heading(f"first pack: what is trained on is {mark}"))
    for line in show_documents(overview.records, streams, vocabulary, tokenizer, coloured):
        console.print(line, overflow="fold")


def _heading(title: str) -> Rule:
    return Rule(Text(title, "bold"), align="left", characters="-", style="dim")


def _facts(overview: Overview) -> list[tuple[str, str]]:
    return [
        ("device", _device(overview)),
        ("model", f"{overview.parameters:,} parameters; {overview.trained:,} are trained: "
                  f"{', '.join(overview.config.trainable)}"),
        ("memory", _memory(overview)),
        ("settings", f"{describe_fit(overview.fit)} precision={overview.config.precision}"),
        ("steps", _steps(overview)),
        ("speed", _speed(overview)),
        ("time", _time(overview)),
        *(("disk" if number == 0 else "", line) for number, line in enumerate(_disk(overview))),
    ]  # fmt: skip


def _device(overview: Overview) -> str:
    if overview.gpus is None:
        return f"the CPU of this machine: no GPU was found; {_count(overview.ranks, 'rank')}"
    return f"{overview.ranks} x {overview.gpus.where}"


def _memory(overview: Overview) -> str:
    parts = sorted(overview.fit.memory.parts.items(), key=lambda part: -part[1])
    if overview.gpus is not None:
        shown = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts if size >= 5e7)
        total, there = overview.fit.memory.total, overview.gpus.bytes
        return f"about {total / GB:.1f} GB of each GPU's {there / GB:.0f}: {shown}"
    needed, room = memory_here(overview.fit)
    text = f"about {size_text(needed)} a rank, besides 1 GB for the program"
    return text if room is None else f"{text}; this machine has {size_text(room)}"


def _steps(overview: Overview) -> str:
    data = overview.config.data
    text = (
        f"{overview.steps:,} ({overview.config.max_duration}; an epoch has {overview.steps_per_epoch:,}), "
        f"each of {_count(data.global_batch, 'pack')} of {data.packed_length:,} positions, "
        f"{overview.plan.report.fill:.1%} full"
    )
    if overview.resumed:
        text += f"; the run in {overview.config.save.folder} goes on after step {overview.resumed:,}"
    return text


def _speed(overview: Overview) -> str:
    tokens = overview.speed.tokens
    if not tokens:
        return overview.speed.how
    rates = [f"{rate:,.0f} tokens/s" + (f" on {name}" if name else "") for name, rate in tokens.items()]
    return f"about {', or '.join(rates)}: {overview.speed.how}"


def _time(overview: Overview) -> str:
    left = max(overview.steps - overview.resumed, 0)
    seconds = [left * overview.tokens_per_step / rate for rate in overview.speed.tokens.values()]
    if not seconds:
        return "unknown"
    names = overview.speed.tokens
    shown = [
        duration_text(each) + (f" on {name}" if name else "")
        for each, name in zip(seconds, names, strict=True)
    ]
    extra = [name for name in ("eval", "samples", "suite") if getattr(overview.config, name) is not None]
    without = f", without {' and '.join(extra)} and without saving" if extra else ", without saving"
    return f"about {', or '.join(shown)} for {left:,} steps{without}"


def _disk(overview: Overview) -> list[str]:
    return [
        f"{space.where}: {size_text(space.needed)}, {space.what}"
        + ("" if space.free is None else f" ({size_text(space.free)} free)")
        for space in overview.space
    ]


def space_warnings(overview: Overview) -> list[str]:
    """Return warnings of disks and memory that are too small."""
    found = [
        f"{space.where}: {size_text(space.free)} free, the stage writes about {size_text(space.needed)}"
        for space in overview.space
        if space.free is not None and space.free < space.needed
    ]
    needed, there = memory_here(overview.fit)
    if overview.gpus is None and there is not None and needed * overview.ranks > there:
        found.append(
            f"memory: {_count(overview.ranks, 'rank')} need about {size_text(needed * overview.ranks)}, "
            f"and this machine has {size_text(there)}"
        )
    return found


def duration_text(seconds: float) -> str:
    """Return a duration as text in two units at most."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
