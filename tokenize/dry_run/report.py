"""`unitoken tokenize --dry-run`: what the whole input would take, from a few of its items."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from unitoken.common.cli import printable
from unitoken.common.errors import ConfigError
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.dry_run.measure import WARM_UP, Measured, cores, measure
from unitoken.tokenize.dry_run.taken_items import TakenItems, take_items
from unitoken.tokenize.first_items import adapter_hint
from unitoken.tokenize.prepare import Checked, check_may_go_on, check_run, describe_job
from unitoken.tokenize.rejects import kind_of

SHOWN_KINDS = 5
SHOWN_LETTERS = 90


class Estimate(NamedTuple):
    """The whole input with so many workers on this machine.

    Attributes:
        rate: items a second.
        slowest: what bounds the rate.
    """

    rate: float
    slowest: str


def dry_run(config: TokenizeConfig, sources: list[str], out: str, count: int, splits: int) -> str:
    """Tokenize `count` items of the input, and return a report; nothing is written to `out`.

    Args:
        config: the settings.
        sources: paths, URLs and globs of the input.
        out: path or URL of the dataset, which is only looked at.
        count: how many items.
        splits: how many processes would share the work.

    Raises:
        ConfigError: what a run would refuse, too.
    """
    checked = check_run(config, sources, out)
    sample = take_items(checked.files, count + WARM_UP)
    if not sample.items:
        raise ConfigError(f"{', '.join(file.name for file in checked.files)[:200]}: holds no items")
    file = describe_job(config, checked, sample.input)
    check_may_go_on(out, file)
    measured = measure(config, file, checked.vocabulary, sample, count)
    return "\n".join(_lines(config, checked, sample, measured, splits))


def _lines(
    config: TokenizeConfig, checked: Checked, sample: TakenItems, measured: Measured, splits: int
) -> list[str]:
    where = f"{measured.gpus} GPU(s)" if measured.gpus else "the CPU: no GPU was found"
    lines = [f"dry run: {measured.items} items through the whole pipeline on {where}; nothing is kept"]
    lines.append(f"kept      {measured.samples}, rejected {len(measured.rejects)}")
    lines += _reject_lines(measured)
    if not measured.samples:
        items = sample.items[: measured.items]
        hint = adapter_hint(config, [item.value for item in items], checked.vocabulary)
        raise ConfigError(f"none of {measured.items} items can be used; {_first_reason(measured)}{hint}")
    estimate = estimate_of(config, measured, splits)
    times, kept = measured.times, measured.samples
    tokens, trained = measured.tokens / kept, measured.target_tokens / kept
    lines.append(
        f"sample    {tokens:,.0f} tokens, {trained:,.0f} of them trained on, "
        f"{times.images / kept:.1f} pictures"
    )
    pictures = f"{estimate.rate * times.images / measured.items:,.1f} pictures/s, " if times.images else ""
    lines.append(
        f"speed     about {pictures}{estimate.rate:,.1f} items/s with --splits {splits}; "
        f"bound by {estimate.slowest}"
    )
    each = max(measured.bytes - measured.chunk_bytes, 0) / measured.items
    size = sample.total * (each + measured.chunk_bytes / config.chunk_size)
    lines += [
        f"input     {round(sample.total):,} items ({sample.how})",
        f"takes     {_hours(sample.total / estimate.rate, measured.gpus, splits)}",
        f"output    about {size / 1e9:,.3g} GB" if size >= 1e8 else f"output    about {size / 1e6:,.3g} MB",
        "measured after the models were loaded and the first pictures were through",
    ]
    return lines


def _reject_lines(measured: Measured) -> list[str]:
    counts = Counter(kind_of(line["reason"]) for line in measured.rejects)
    examples = {kind_of(line["reason"]): line for line in reversed(measured.rejects)}
    lines = []
    for kind, count in counts.most_common(SHOWN_KINDS):
        example = examples[kind]
        text = printable(f"{example['file']} ({example['id']}): {example['reason']}")
        shown = text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."
        lines.append(f"{count:>6}    {shown}")
    return lines


def _first_reason(measured: Measured) -> str:
    line = measured.rejects[0]
    return f"{line['file']} ({line['id']}): {line['reason']}"


def estimate_of(config: TokenizeConfig, measured: Measured, splits: int) -> Estimate:
    """Return how fast a run with `splits` workers on this machine will be.

    A worker's stages run side by side, so the slowest bounds it; all workers share the cores and GPUs.
    """
    times, items = measured.times, measured.items
    write = (
        max(times.write - measured.chunk_seconds, 0.0) / items + measured.chunk_seconds / config.chunk_size
    )
    read, pictures, encode = times.read / items, times.pictures / items, times.encode / items
    busy = read + write + pictures + (0.0 if measured.gpus else encode)
    seconds = {  # of this machine for an item
        "reading the input": read / splits,
        "opening pictures": pictures / (measured.threads * splits),
        "the image tokenizer": encode / min(splits, measured.gpus or splits),
        "writing": write / splits,
        "the cores": busy / cores(),
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    return Estimate(1 / max(seconds[slowest], 1e-9), slowest)


def _hours(seconds: float, gpus: int, splits: int) -> str:
    scales = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    scale, unit = next((pair for pair in scales if seconds >= pair[0]), scales[-1])
    text = f"about {seconds / scale:,.1f} {unit}"
    used = min(gpus, splits)
    if not used:
        return f"{text} on this CPU; GPU-hours are unknown here"
    return f"{text}, {seconds / 3600 * used:,.2f} GPU-hours"
