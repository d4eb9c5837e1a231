"""The model card of an exported model: its README.md, as the hub shows it.

It holds no paths of the machine that made it, and no addresses of data. Torch is not needed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from unitoken.codec.config import FOLDERS_BEGIN_WITH
from unitoken.common.hashing import fingerprint
from unitoken.common.urls import without_secrets
from unitoken.dataset.manifest import Manifest
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.compatibility import CompleteMetadata
from unitoken.train.checkpoint.locations import TOWER
from unitoken.train.config import StageConfig
from unitoken.train.export.config import ARCHITECTURES


def model_card(metadata: CompleteMetadata, manifests: Mapping[str, Manifest], name: str, dtype: str) -> str:
    """Return the text of the card.

    Args:
        metadata: of the model.
        manifests: of the datasets that are known, by the name of their stream.
        name: of the model.
        dtype: of the tensors.
    """
    stage = metadata.stage
    sections = [_front_matter(stage), f"# {name}\n\n{_summary(metadata, dtype)}"]
    if stage is not None:
        sections += [f"## Data\n\n{_data(stage, manifests)}", f"## Settings\n\n{_settings(stage)}"]
    sections += [
        f"## Layout\n\n{_layout(metadata.vocabulary)}",
        f"## Answer and draw\n\n{_usage(metadata, manifests, name)}",
        "## Licence\n\nNone is set. Choose one that those of the base model and of the data allow,\n"
        "and name it in the first lines of this file (`license:`).",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(stage: StageConfig | None) -> str:
    lines = ["library_name: transformers"]
    base = stage.model.decoder if stage is not None else None
    if isinstance(base, str) and _is_hub_id(base):
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- unitoken", "- text-generation", "- text-to-image", "- image-text-to-text"]
    return "\n".join(["---", *lines, "---"])


def _is_hub_id(name: str) -> bool:
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_id and not name.startswith(FOLDERS_BEGIN_WITH) and not Path(name).exists()


def _shown(name: str) -> str:
    """Return a hub id, or of a path the last part only."""
    return f"`{name}`" if _is_hub_id(name) else f"a local folder, `{Path(without_secrets(name)).name}`"


def _summary(metadata: CompleteMetadata, dtype: str) -> str:
    stage, decoder, vision = metadata.stage, metadata.sizes.decoder, metadata.sizes.vision
    base = stage.model.decoder if stage is not None else None
    lines = [
        "A language model that reads and draws images as tokens, trained with unitoken-streaming.",
        "",
        f"- Base model: {_shown(base) if isinstance(base, str) else 'not known, or new weights'}",
    ]
    if stage is not None and stage.init_from is not None:
        lines.append(f"- Continued from: {_shown(stage.init_from)}")
    lines.append(
        f"- Decoder: `{ARCHITECTURES[decoder.family]}`, {decoder.num_hidden_layers} layers of "
        f"{decoder.hidden_size}, {decoder.vocab_size} rows of embeddings, {dtype}"
    )
    if vision is not None:
        lines.append(
            f"- Vision tower and adapter in `{TOWER}/`: {vision.num_hidden_layers} layers of "
            f"{vision.hidden_size}, {vision.image_size} x {vision.image_size} pixels"
        )
    if stage is not None and stage.codec is not None:
        image = stage.codec.vision
        lines.append(f"- Image tokenizer: {image.kind}, {_shown(image.weights)}")
    return "\n".join(lines)


def _data(stage: StageConfig, manifests: Mapping[str, Manifest]) -> str:
    rows = ["| stream | samples | tokens | share of an epoch | manifest |", "|---|---|---|---|---|"]
    for name, stream in stage.data.streams.items():
        weight = ", ".join(f"{key} {value:g}" for key, value in stream.weight.items()) or "each sample once"
        manifest = manifests.get(name)
        known = (
            (f"{manifest.samples:,}", f"{manifest.tokens:,}", f"`{fingerprint(manifest.dump())}`")
            if manifest is not None
            else ("?", "?", "?")
        )
        safe = without_secrets(name).replace("|", "\\|")
        rows.append(f"| {safe} | {known[0]} | {known[1]} | {weight} | {known[2]} |")
    return "\n".join(rows)


def _settings(stage: StageConfig) -> str:
    data, optimizer = stage.data, stage.optimizer
    settings = {
        "stage": stage.name,
        "trained": ", ".join(stage.trainable),
        "max_duration": stage.max_duration,
        "packed_length": data.packed_length,
        "global_batch": data.global_batch,
        "lr": f"{optimizer.lr:g}",
        "weight_decay": f"{optimizer.weight_decay:g}",
        "precision": stage.precision,
        "continuous": data.continuous,
        "null_prompt_fraction": f"{data.null_prompt_fraction:g}",
        "seed": stage.seed,
    }
    return "\n".join(f"- {key}: {value}" for key, value in settings.items())


def _layout(vocabulary: Vocabulary) -> str:
    return (
        f"`{vocabulary.layout_name}`, {vocabulary.size} tokens, of which {len(vocabulary.image_ids)} are "
        f"image codes; {len(vocabulary.new_ids)} were added to the tokenizer.\n"
        f"Fingerprint `{vocabulary.fingerprint}`; `vocabulary.json` has all ids."
    )


def _usage(metadata: CompleteMetadata, manifests: Mapping[str, Manifest], name: str) -> str:
    length, height, width = next(_image_sizes(metadata, manifests), (0, 32, 32))
    loader = (
        "ChameleonForConditionalGeneration"
        if metadata.sizes.decoder.family == "chameleon"
        else "AutoModelForCausalLM"
    )
    return f"""With unitoken-streaming, which also shows images to the vision tower:

```bash
unitoken generate {name} --prompt "Draw a cat." --draw --out drawings
unitoken generate {name} --prompt "What is it? <|image|>" --image cat.jpg --out answers
```

With transformers (`examples/transformers_draw.py` decodes the codes to a picture):

```python
from transformers import AutoTokenizer, {loader}
from unitoken.generation import ImageGrammar

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {loader}.from_pretrained("{name}")
{_prompt(metadata.vocabulary)}
grammar = ImageGrammar.from_folder("{name}", sizes=[({height}, {width})], drawing=True)  # in latents
drawn = model.generate(
    **inputs, logits_processor=[grammar], max_new_tokens={length + 1 if length else 2000}, do_sample=True
)
```"""


def _prompt(vocabulary: Vocabulary) -> str:
    if vocabulary.layout is None:
        return (
            'prompt = f"{tokenizer.bos_token}Draw a cat.{tokenizer.sep_token}"\n'
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")\n'
            "model.model.vocabulary_mapping.image_tokens = []  # or transformers masks all image codes"
        )
    return (
        'messages = [{"role": "user", "content": "Draw a cat."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
    )


def _image_sizes(
    metadata: CompleteMetadata, manifests: Mapping[str, Manifest]
) -> Iterator[tuple[int, int, int]]:
    """Yield the length, and height and width in latents, of the data's images, if they are known."""
    crops = metadata.pictures.crops if metadata.pictures is not None else []
    for pixels in {manifest.vision.downsampling for manifest in manifests.values()}:
        for width, height in crops:
            with contextlib.suppress(ValueError):  # of a dataset with another image tokenizer
                size = height // pixels, width // pixels
                yield metadata.vocabulary.image.count(*size), *size
