"""UniToken, base variant: Chameleon's decoder, SigLIP's tower, and the adapter between them.

    batch -> embeddings of input_ids, features of the images put in their places -> decoder -> loss on supervised tokens

Children bear the reference's names: `model`, `lm_head`, and `vit`, `adapter` where there is a vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig
from unitoken.train.model.activation_checkpointing import Mode, set_recompute
from unitoken.train.model.decoder import Decoder, KVCache, document_mask
from unitoken.train.model.loss import Loss, token_loss
from unitoken.train.model.vision_tower import VisionTower, adapter

Batch = Mapping[str, Tensor]  # see streaming_data/collate.py


class UniToken(nn.Module):
    def __init__(
        self,
        decoder: DecoderConfig,
        vision: VisionTowerConfig | None,
        *,
        dropout: float = 0.0,
        z_loss: float = 1e-5,
        attention: Literal["sdpa", "flex"] = "sdpa",
        masked_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = Decoder(decoder, dropout)
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        self.vision = vision
        if vision is not None:
            self.vit = VisionTower(vision)
            self.adapter = adapter(vision.hidden_size, decoder.hidden_size)
        self.z_loss = z_loss
        self.attention = attention
        self.masked_ids = masked_ids

    def forward(self, batch: Batch) -> Loss:
        embeddings = self.embed(batch)
        mask = document_mask(batch["document_ids"], self.attention)
        hidden = self.model(embeddings, batch["position_ids"], mask)
        masked = torch.tensor(self.masked_ids, device=hidden.device) if self.masked_ids else None
        return token_loss(hidden, batch["labels"], self.lm_head.weight, self.z_loss, masked)

    def predict(self, batch: Batch, mask: Tensor | None, past: KVCache) -> Tensor:
        """Logits (P, vocabulary) in float32 of what follows the last token of each row of `batch`, which `past` keeps."""
        hidden = self.model(self.embed(batch), batch["position_ids"], mask, past)
        logits: Tensor = self.lm_head(hidden[:, -1]).float()
        return logits

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (P, L, hidden) of a batch's ids, with the features of its views in their places."""
        embeddings: Tensor = self.model.embed_tokens(batch["input_ids"])
        pixels = batch["pixel_values"]
        if self.vision is None:
            assert len(pixels) == 0, "images for a model without a vision tower"
            return embeddings
        if len(pixels):
            features = self.adapter(self.vit(pixels)).to(embeddings.dtype)  # (V, F, hidden)
            features = features[batch["feature_views"], batch["feature_patches"]]  # (M, hidden)
            return embeddings.index_put((batch["feature_rows"], batch["feature_columns"]), features)
        if self.training:
            # FSDP gathers and reduces the tower's shards on all ranks at once: one that has no image in its microbatch
            # and left the tower out would leave the others waiting for ever.
            size = self.vision.image_size
            features = self.adapter(self.vit(pixels.new_zeros(1, 3, size, size)))
            embeddings = embeddings + 0.0 * features.sum().to(embeddings.dtype)
        return embeddings


def build_model(
    decoder: DecoderConfig,
    vision: VisionTowerConfig | None,
    config: ModelConfig,
    activation_checkpointing: Mode | int = "none",
    image_ids: Sequence[int] = (),
) -> UniToken:
    """The model on the `meta` device: names and shapes, no memory. `image_ids` are those of the codes, for mask_image_logits."""
    masked = image_ids if config.mask_image_logits else ()
    with torch.device("meta"):
        model = UniToken(
            decoder,
            vision,
            dropout=config.dropout,
            z_loss=config.z_loss,
            attention=config.attention,
            masked_ids=masked,
        )
    for layers in (
        (model.model.layers, model.vit.encoder.layers) if vision is not None else (model.model.layers,)
    ):
        set_recompute(layers, activation_checkpointing)
    return model
