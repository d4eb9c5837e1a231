"""The three programs that `benchmarks.training` compares: one step on the same documents and weights.

ours          Packs, features for images that are asked about, the tower once a batch, logits of supervised
              tokens only.
padded        The reference's way: each document a row as long as the longest, features for all images, the
              tower once for each image, float32 logits of every position.
transformers  Its Llama on our packs, with our mask and features, and its loss on every position's logits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unitoken.dataset.record import IGNORED, Record, spans_of
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.reading.batch import Batch, unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig
from unitoken.train.model.decoder import dense_document_mask
from unitoken.train.model.unitoken import UniToken, build_model

CODES, LATENTS = 64, 6  # of an image, whose block has 4 + 6 * 7 tokens
LENGTH = 1024  # of a pack
PACKS = 4
VISION = VisionTowerConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=56,
    patch_size=7,
)
Z_LOSS = 1e-5


def decoder_sizes(vocabulary: int) -> DecoderConfig:
    """Return the sizes of a Llama for two cores."""
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        qk_norm="none",
    )


def documents(vocabulary: Vocabulary, text_tokens: int, seed: int) -> Iterator[Record]:
    """Yield texts, questions about an image, and drawings, in turn, for ever; lengths are log-normal."""
    random, picture = np.random.default_rng(seed), io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(picture, "PNG")
    number = 0
    while True:
        for kind in ("text", "question", "drawing"):
            length = int(np.clip(random.lognormal(4.0, 0.8), 8, 400))
            text = random.integers(0, text_tokens, length)
            block = vocabulary.image_block(random.integers(0, CODES, (LATENTS, LATENTS)))
            parts = {"text": [text], "question": [block, text], "drawing": [text, block]}[kind]
            tokens = np.concatenate([[vocabulary.bos], *parts, [vocabulary.end_of_turn]])
            first = {"text": 1, "question": 1 + len(block), "drawing": 1 + len(text)}[kind]
            trained = np.arange(len(tokens)) >= first
            begin = {"text": [], "question": [1], "drawing": [1 + length]}[kind]
            spans = [(at, at + len(block), LATENTS, LATENTS) for at in begin]
            yield Record(
                f"{kind}-{number}",
                tokens.astype(np.uint32),
                spans_of(trained),
                np.array(spans, np.uint32).reshape(-1, 4),
                tuple(picture.getvalue() for _ in spans),
            )
        number += 1


def fill_packs(records: Iterator[Record], features: int) -> list[list[Record]]:
    """Fill PACKS packs in the order of the records; a question takes its image's features and a separator."""
    packs: list[list[Record]] = []
    while len(packs) < PACKS:
        pack: list[Record] = []
        room = LENGTH
        for record in records:
            room -= len(record.tokens) + (features + 1 if record.id.startswith("question") else 0)
            if room < 0:
                break
            pack.append(record)
        packs.append(pack)
    return packs


@dataclass(frozen=True)
class Side:
    """A program that trains on batches of packs."""

    prepare: Callable[[Sequence[Sequence[Record]]], Batch]
    loss: Callable[[Batch], Tensor]
    model: nn.Module

    def step(self, batch: Batch) -> None:
        """Run the forward and the backward pass, and forget the gradients."""
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad()


def build_sides(vocabulary: Vocabulary) -> dict[str, Side]:
    """Build the three programs with equal weights."""
    torch.manual_seed(0)
    sizes = decoder_sizes(vocabulary.size)
    network = build_model(
        sizes, VISION, ModelConfig(decoder=sizes, vision=VISION, dropout=0.0, z_loss=Z_LOSS)
    )
    network = network.to_empty(device="cpu").train()
    for name, parameter in network.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, 0.0, 0.02)
    views = Views(VISION.image_size, VISION.patch_size)

    def collate(length: int, continuous: str) -> Collate:
        return Collate(length, views, continuous, vocabulary.separator, vocabulary.newline, compat=False)

    def pad(packs: Sequence[Sequence[Record]]) -> Batch:
        rows = [[record] for pack in packs for record in pack]
        extra = [(VISION.features + 1) * len(record.image_spans) for [record] in rows]
        length = max(len(record.tokens) + more for [record], more in zip(rows, extra, strict=True))
        return unpack(collate(length, "all")(rows))

    def pack(packs: Sequence[Sequence[Record]]) -> Batch:
        return unpack(collate(LENGTH, "questions")(packs))

    return {
        "ours": Side(pack, lambda batch: network(batch).total, network),
        "padded": Side(pad, lambda batch: _padded_loss(network, batch), network),
        "transformers": _transformers_side(network, sizes, pack),
    }


def _padded_loss(network: UniToken, batch: Batch) -> Tensor:
    features = torch.cat([network.adapter(network.vit(view[None])) for view in batch["pixel_values"]])
    embeddings = _put_features(network, batch, features)
    hidden = network.model(embeddings, batch["position_ids"], dense_document_mask(batch["document_ids"]))
    logits = F.linear(hidden, network.output_weight).float()
    return _loss_of_all_logits(logits, batch["labels"])


def _put_features(network: UniToken, batch: Batch, features: Tensor) -> Tensor:
    rows = features[batch["feature_views"], batch["feature_patches"]]
    places = (batch["feature_rows"], batch["feature_columns"])
    embeddings: Tensor = network.model.embed_tokens(batch["input_ids"])
    return embeddings.index_put(places, rows)


def _loss_of_all_logits(logits: Tensor, labels: Tensor) -> Tensor:
    shifted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    z = torch.logsumexp(shifted, dim=-1)[targets != IGNORED].square().mean()
    return F.cross_entropy(shifted, targets, ignore_index=IGNORED) + Z_LOSS * z


def _transformers_side(
    network: UniToken, sizes: DecoderConfig, prepare: Callable[[Sequence[Sequence[Record]]], Batch]
) -> Side:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config).train()
    weights = {name: tensor for name, tensor in network.state_dict().items() if name in llama.state_dict()}
    llama.load_state_dict(weights)

    def loss(batch: Batch) -> Tensor:
        features = network.adapter(network.vit(batch["pixel_values"]))
        logits = llama(
            inputs_embeds=_put_features(network, batch, features),
            attention_mask=dense_document_mask(batch["document_ids"]),
            position_ids=batch["position_ids"],
            use_cache=False,
        ).logits
        return _loss_of_all_logits(logits.float(), batch["labels"])

    return Side(prepare, loss, nn.ModuleList([llama, network]))
