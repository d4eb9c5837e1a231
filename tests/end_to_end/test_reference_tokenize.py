"""The discrete side against what was recorded from the reference: codes, tokens, labels, errors, decoded pixels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from support.tokenizing import vision_config
from unitoken.codec.conversations import ItemError, parse
from unitoken.codec.image_tokenizer.encoder import VisionCodec, load_vision
from unitoken.codec.sequence import assemble
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.dataset import images
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import Vocabulary

Codes = npt.NDArray[np.int64]
MARGIN = 1e-3  # of squared distances: below it, rounding decides between the two nearest codes


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


@pytest.fixture(scope="module")
def vision(golden: Path) -> VisionCodec:
    return load_vision(vision_config(golden / "assets" / "vqgan"))


@pytest.fixture(scope="module")
def pixels(golden: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """What each image's tokenizer sees: stem -> 512 x 512, stem.var -> of variable size."""
    result = {}
    for row in rows(golden / "dev" / "A_images.jsonl"):
        image = images.decode((golden / "assets" / "images" / row["image"]).read_bytes(), compat=True)
        fixed = row["crop_list"] == "[(512, 512)]"
        crop = images.choose_crop(image.size, [(512, 512)] if fixed else images.crop_sizes(512))
        assert list(crop) == row["crop_size"]
        found = images.tokenizer_pixels(image, crop)
        assert hashlib.sha256(found.tobytes()).hexdigest() == row["input_sha256"]
        result[Path(row["image"]).stem + ("" if fixed else ".var")] = found
    return result


@pytest.fixture(scope="module")
def codes(vision: VisionCodec, pixels: dict[str, npt.NDArray[np.uint8]]) -> dict[str, Codes]:
    """18 images, one by one as the reference does: about one second each."""
    return {stem: vision.encode(array[None])[0] for stem, array in pixels.items()}


@pytest.fixture(scope="module")
def vocabulary(golden: Path, vision: VisionCodec) -> Vocabulary:
    return Vocabulary.from_tokens(
        load_tokenizer(str(golden / "assets" / "tokenizer")).get_vocab(), vision.codebook_size
    )


@pytest.fixture(scope="module")
def doubtful(golden: Path) -> dict[str, npt.NDArray[np.bool_]]:
    """Where a code may differ by rounding."""
    margins = np.load(golden / "dev" / "A_images_vq.npz")
    return {
        name.removesuffix(".margin"): margins[name] <= MARGIN for name in margins if name.endswith(".margin")
    }


@pytest.mark.slow
def test_image_codes_are_the_references(
    golden: Path, codes: dict[str, Codes], doubtful: dict[str, npt.NDArray[np.bool_]], vocabulary: Vocabulary
) -> None:
    for row in rows(golden / "dev" / "A_images.jsonl"):
        stem = Path(row["image"]).stem + ("" if row["crop_list"] == "[(512, 512)]" else ".var")
        expected = vocabulary.image_codes(np.array(row["tokens"]))
        differs = codes[stem] != expected
        if stem in doubtful:
            assert not (differs & ~doubtful[stem]).any(), stem
        else:  # no margins were recorded; 0.1 to 1.3 % of the codes are doubtful
            assert differs.mean() < 0.013, stem
        assert len(vocabulary.image_block(codes[stem])) == row["n_tokens"]


@pytest.mark.slow
def test_decoded_pixels_are_the_references(golden: Path, vision: VisionCodec, vocabulary: Vocabulary) -> None:
    recorded = np.load(golden / "dev" / "A_decode.npz")
    tokens = {
        Path(r["image"]).stem + ("" if r["crop_list"] == "[(512, 512)]" else ".var"): r["tokens"]
        for r in rows(golden / "dev" / "A_images.jsonl")
    }
    for name in recorded:
        block = vocabulary.image_codes(np.array(tokens[name.removesuffix(".rgb_stride8")]))
        found = vision.decode(block[None])[0, ::8, ::8]
        assert np.abs(found.astype(int) - recorded[name].astype(int)).max() <= 1, name


@pytest.mark.slow
def test_tokens_and_labels_are_the_references(
    golden: Path, codes: dict[str, Codes], doubtful: dict[str, npt.NDArray[np.bool_]], vocabulary: Vocabulary
) -> None:
    text = TextEncoder(load_tokenizer(str(golden / "assets" / "tokenizer")), vocabulary, compat=True)
    compared = 0
    for row in rows(golden / "dev" / "A_tokenization.jsonl"):
        if row["status"] != "ok":
            continue
        conversation = parse(row["record"], "0")
        stems = [Path(path).stem for path in conversation.images]
        record = assemble(conversation, [codes[stem] for stem in stems], [b""] * len(stems), text, vocabulary)
        expected, labels = np.array(row["tokens"]), np.array(row["labels"])
        # Where rounding may decide, the recorded code counts as found, in tokens and labels.
        found, found_labels = record.tokens.astype(np.int64), record.labels()
        for (start, end, height, width), stem in zip(record.image_spans, stems, strict=True):
            allowed = np.zeros(end - start, bool)
            allowed[3:-1] = np.pad(doubtful[stem], ((0, 0), (0, 1))).reshape(-1)
            assert (height, width) == doubtful[stem].shape
            found[start:end][allowed] = expected[start:end][allowed]
            found_labels[start:end][allowed] = labels[start:end][allowed]
        assert found.tolist() == row["tokens"], row["id"]
        assert found_labels.tolist() == row["labels"], row["id"]
        compared += 1
    assert compared == 21


def test_text_of_the_other_tokenizer_style_is_the_references(golden: Path) -> None:
    tokenizer = load_tokenizer(str(golden / "assets" / "tokenizer_llama_style"))
    vocabulary = Vocabulary.from_tokens(tokenizer.get_vocab(), 16)
    text = TextEncoder(tokenizer, vocabulary, compat=True)
    for row in rows(golden / "dev" / "A_tokenization_llama_style.jsonl"):
        record = assemble(parse(row["record"], "0"), [], [], text, vocabulary)
        assert record.tokens.tolist() == row["tokens"], row["id"]
        assert record.labels().tolist() == row["labels"], row["id"]


def test_an_item_without_labels_is_refused(golden: Path, vocabulary: Vocabulary) -> None:
    """The reference's LabelAllZeroError. The other error classes are in test_conversations.py and test_worker.py."""
    text = TextEncoder(load_tokenizer(str(golden / "assets" / "tokenizer")), vocabulary, compat=True)
    [row] = [
        row
        for row in rows(golden / "dev" / "A_tokenization.jsonl")
        if row.get("error") == "LabelAllZeroError"
    ]
    with pytest.raises(ItemError, match="nothing to train on: "):
        assemble(parse(row["record"], "0"), [], [], text, vocabulary)


@pytest.mark.slow
def test_the_command_keeps_all_items_that_pretokenize_kept(
    golden: Path, tmp_path: Path, codes: dict[str, Codes]
) -> None:
    """Three ranks over the recorded input: the same tokens for what the reference wrote, a sample for the text-only item
    that it dropped although its documentation allows it, and the other two rejected.
    """
    from streaming import StreamingDataset

    from support.tokenizing import run_here
    from unitoken.tokenize.config import TokenizeConfig
    from unitoken.tokenize.merge import merge

    recorded = json.loads((golden / "dev" / "A_pretokenize_cli.json").read_text())
    source = tmp_path / "items.json"
    source.write_text(json.dumps(recorded["input"]))
    (tmp_path / "images").symlink_to(golden / "assets" / "images")
    assets = golden / "assets"
    config = TokenizeConfig.model_validate(
        {
            "tokenizer": str(assets / "tokenizer"),
            "vision": {"weights": str(assets / "vqgan")},
            "chunk_size": 1,
            "compat": "unitoken",
        }
    )
    run_here(config, source, tmp_path / "out", splits=3)
    manifest = merge(str(tmp_path / "out"))
    samples = {
        sample["id"]: Record.from_mds(sample)
        for sample in StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False)
    }
    assert sorted(samples) == ["0", "1", "2", "4", "6"]
    assert (manifest.items, manifest.rejected) == (7, 2)
    for name, written in recorded["output_files"].items():
        if name.endswith(".pkl"):
            record = samples[str(written["id"])]
            assert len(record.tokens) == len(written["token"])
            assert (
                np.mean(record.tokens == written["token"]) > 0.987
            )  # codes below the margin; test_image_codes is exact
            assert np.mean(record.labels() == written["label"]) > 0.987
