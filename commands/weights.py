"""`unitoken weights`: published weights from Hugging Face's hub."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

import typer

from unitoken.common.cli import one_line_errors, report
from unitoken.common.errors import DataError, one_line

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Tensors, sizes and tokenizers. Neither code nor pickles, which may hold code, are fetched."""
GO_ON = "the same command goes on from here"
CHAMELEON_NEEDS = (
    "Meta gives the image tokenizer on request (github.com/facebookresearch/chameleon); then: "
    "unitoken convert-vqgan FOLDER weights/vqgan"
)


def weights(
    which: Annotated[
        Literal["open", "chameleon"],
        typer.Argument(
            help="open: Qwen3-0.6B, Janus' image tokenizer and SigLIP, for yamls/open (6 GB). "
            "chameleon: Lumina-mGPT-7B-512 and SigLIP, for yamls/stage1.yaml (18 GB)."
        ),
    ] = "open",
    out: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("weights"),
) -> None:
    """Fetch published weights; rerun to continue.

    Only tensors, sizes and tokenizers are fetched: no code, and no pickles.
    """
    with one_line_errors(GO_ON):
        from unitoken.codec.config import CHAMELEON_WEIGHTS, OPEN_WEIGHTS

        for name in OPEN_WEIGHTS if which == "open" else CHAMELEON_WEIGHTS:
            folder = out / name.split("/")[1]
            size = _fetch(name, folder, only_image_tokenizer="Janus" in name)
            report(f"{folder}: {size / 1e9:.1f} GB of {name}")
        if which == "chameleon":
            report(CHAMELEON_NEEDS)


def _fetch(name: str, folder: Path, only_image_tokenizer: bool) -> int:
    """Fetch a hub id's files at its newest commit and return their size in bytes.

    A file that is there whole is not fetched again, and one that was begun is continued. Each file is asked
    for by itself: huggingface_hub's download of a whole folder returns an incomplete one without a network.

    Raises:
        DataError: the hub or the disk failed.
    """
    from huggingface_hub import HfApi, hf_hub_download

    from unitoken.codec.image_tokenizer import hub

    try:
        found = HfApi().model_info(name)
        present = sorted(file.rfilename for file in found.siblings or [])

        def fetch(patterns: Sequence[str]) -> int:
            wanted = [file for file in present if any(fnmatch(file, pattern) for pattern in patterns)]
            paths = [hf_hub_download(name, file, revision=found.sha, local_dir=folder) for file in wanted]
            return sum(Path(path).stat().st_size for path in paths)

        if only_image_tokenizer:
            return fetch([hub.CONFIG, hub.INDEX]) + fetch(hub.files_to_download(folder / hub.INDEX))
        return fetch(PATTERNS)
    except Exception as error:  # errors of the hub, the network and the disk have no common base
        raise DataError(f"{name}: can not be fetched: {one_line(error, 200)}; {GO_ON}") from None
