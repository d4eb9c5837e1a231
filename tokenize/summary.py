"""What a command prints about the dataset that it has made, and why it may still end with status 1."""

from __future__ import annotations

from unitoken.dataset.manifest import REJECTS, Manifest
from unitoken.storage.store import is_url
from unitoken.tokenize.rejects import CURES, group_rejects

FORGIVEN_REJECTS = 9  # so few say little about the rest
SUMMARY_KINDS = 5


def summary(out: str, manifest: Manifest) -> str:
    """Return the counts of a dataset, its most frequent rejects, and the commands that come next."""
    m = manifest
    lines = [
        f"{out}: {m.items:,} items -> {m.samples:,} samples, {m.rejected:,} rejected; "
        f"{m.tokens:,} tokens ({m.target_tokens:,} trained on), {m.images:,} images"
    ]
    if m.turns_left_out:
        lines.append(
            f"{m.turns_left_out:,} conversations begin with the assistant and lost that turn, "
            "as in LLaVA's loader"
        )
    if m.rejected:
        lines.append(f"rejected, by reason (see `unitoken rejects {out}`):")
        lines += [f"{group.items:>8,}  {group.kind}" for group in group_rejects(out)[:SUMMARY_KINDS]]
    if m.samples:
        where = f"{{remote: {out}}}" if is_url(out) else f"{{local: {out}}}"
        lines.append(f"next: unitoken preview {out}; in a stage's YAML: data.streams: {{NAME: {where}}}")
    return "\n".join(lines)


def problems(out: str, manifest: Manifest, max_reject_fraction: float) -> list[str]:
    """Return why a command that made a finished dataset still ends with status 1, a line for each reason."""
    groups = group_rejects(out)
    found = []
    cut = sum(group.items for group in groups if group.kind == "input cut")
    if cut:
        files = f"{cut} input file{'s end' if cut > 1 else ' ends'}"
        found.append(f"{files} in the middle of an item; see 'input cut' in {REJECTS}")
    if not manifest.samples:
        reason = ""
        if groups:
            commonest = groups[0]
            reason = (
                f"; the commonest reason, of {commonest.items} items: {commonest.kind}: {commonest.example}"
                f"{CURES.get(commonest.kind, '')}"
            )
        found.append(f"{out}: nothing was kept of {manifest.items} items{reason}")
        return found
    if manifest.rejected > max(FORGIVEN_REJECTS, max_reject_fraction * manifest.items):
        fraction = manifest.rejected / manifest.items
        found.append(
            f"{manifest.rejected} of {manifest.items} items were rejected ({fraction:.1%}), "
            f"max_reject_fraction is {max_reject_fraction}; "
            f"`unitoken rejects {out}` shows why, and with --retry tries them again"
        )
    return found
