"""UniToken, base variant: a language model's decoder, SigLIP's vision tower, and the adapter between them.

    batch -> embeddings of input_ids, image features put in their positions -> decoder -> loss on supervised
    tokens

Its children have the reference's names: `model`, `lm_head`, and with a vision tower `vit` and `adapter`.
Without `lm_head` the token embedding is the output layer, too (`tie_word_embeddings`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig
from unitoken.train.model.activation_checkpointing import RecomputeMode, set_recompute
from unitoken.train.model.decoder import Decoder, KVCache, document_mask
from unitoken.train.model.loss import Loss, token_loss
from unitoken.train.model.projection import project
from unitoken.train.model.vision_tower import VisionTower, build_adapter

# The tensors of a batch by name; their shapes are at the top of streaming_data/reading/batch.py.
ModelInputs = Mapping[str, Tensor]


class OutputLayer(nn.Linear):
    """The output layer (vocabulary, hidden), a sharding unit: its weight is whole in its own methods only."""

    def forward(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """Return the logits (..., ids) of hidden states (..., hidden), for a range of the vocabulary."""
        return project(hidden, self.weight[ids])

    def loss(self, rows: Tensor, targets: Tensor, z_weight: float, masked_ids: Tensor | None) -> Loss:
        """Return `token_loss` of its logits."""
        return token_loss(rows, targets, self.weight, z_weight, masked_ids)


class UniToken(nn.Module):
    """The model: a batch of P packs of L positions, with V views and M feature positions, to its loss.

    Args:
        decoder: sizes of the decoder.
        vision: sizes of the vision tower; None builds neither tower nor adapter.
        dropout: probability on both residual branches of the decoder.
        z_loss: weight of the mean squared logsumexp in the loss.
        attention: implementation of the decoder's attention.
        masked_ids: token ids that get no probability in the loss.
    """

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
        if not decoder.tie_word_embeddings:
            self.lm_head = OutputLayer(decoder.hidden_size, decoder.vocab_size, bias=False)
        self.vision = vision
        if vision is not None:
            self.vit = VisionTower(vision)
            self.adapter = build_adapter(vision.hidden_size, decoder.hidden_size)
        self.z_loss = z_loss
        self.attention = attention
        self.masked_ids = masked_ids

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight (vocabulary, hidden): the head's, or with tied embeddings theirs."""
        layer = self.model.embed_tokens if self.is_tied else self.lm_head
        weight: Tensor = layer.weight
        return weight

    def compile_layers(self, **settings: Any) -> None:
        """Compile all layers of decoder and tower for training, with the arguments of `torch.compile`."""
        for layer in self.model.layers:
            layer.compile(**settings)
        if self.vision is not None:
            for layer in self.vit.encoder.layers:
                layer.compile(**settings)

    def set_recompute(self, setting: RecomputeMode | int) -> None:
        """Apply the setting `activation_checkpointing` to the layers of decoder and tower."""
        set_recompute(self.model.layers, setting)
        if self.vision is not None:
            set_recompute(self.vit.encoder.layers, setting)

    @property
    def is_tied(self) -> bool:
        """Whether the token embedding is the output layer, too."""
        return not hasattr(self, "lm_head")

    def forward(self, batch: ModelInputs) -> Loss:
        """Return the loss over the supervised tokens of a batch, without waiting for a GPU."""
        embeddings = self.embed(batch)
        mask = document_mask(batch["document_ids"], self.attention)
        hidden = self.model(embeddings, batch["position_ids"], mask)
        row, column = batch["target_rows"], batch["target_columns"]
        targets = batch["labels"][row, column]
        masked_ids = None
        if self.masked_ids:
            masked_ids = torch.tensor(self.masked_ids).to(hidden.device, non_blocking=True)
        rows = hidden[row, column - 1]
        if self.is_tied:
            return token_loss(rows, targets, self.output_weight, self.z_loss, masked_ids)
        return self.lm_head.loss(rows, targets, self.z_loss, masked_ids)

    def predict(
        self,
        batch: ModelInputs,
        mask: Tensor | None,
        past: KVCache,
        *,
        columns: Tensor | None = None,
        ids: slice = slice(None),
    ) -> Tensor:
        """Return the float32 logits (P, C, ids) of the tokens that follow C of the new tokens of each row.

        Args:
            batch: the new tokens (P, T); `past` keeps their keys and values.
            mask: (P, 1, T, places of the cache that are seen), what is added to the scores, or True where a
                query sees a key; None: whole texts, in a causal order.
            past: the cache of the tokens before.
            columns: (P, C), which of the new tokens; None: the last, so C is 1.
            ids: a range of the vocabulary: the output layer is computed for no other.
        """
        hidden = self.model(self.embed(batch), batch["position_ids"], mask, past)
        if columns is None:
            hidden = hidden[:, -1:]
        else:
            hidden = hidden.gather(1, columns[:, :, None].expand(-1, -1, hidden.shape[2]))
        if self.is_tied:
            return project(hidden, self.output_weight[ids]).float()
        logits: Tensor = self.lm_head(hidden, ids)
        return logits.float()

    def embed(self, batch: ModelInputs) -> Tensor:
        """Return the embeddings (P, L, hidden) of a batch's ids, with image features in their positions."""
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
            # FSDP gathers and reduces the tower's shards on all ranks at once: a rank that has no image in
            # its microbatch and skipped the tower would leave the other ranks waiting for ever.
            size = self.vision.image_size
            features = self.adapter(self.vit(pixels.new_zeros(1, 3, size, size)))
            embeddings = embeddings + 0.0 * features.sum().to(embeddings.dtype)
        return embeddings


def build_model(
    decoder: DecoderConfig,
    vision: VisionTowerConfig | None,
    config: ModelConfig,
    activation_checkpointing: RecomputeMode | int = "none",
    image_ids: Sequence[int] = (),
) -> UniToken:
    """Build the model on the `meta` device: names and shapes, no memory.

    Args:
        decoder: sizes of the decoder.
        vision: sizes of the vision tower, or None.
        config: the stage's other settings of the model.
        activation_checkpointing: a mode for all layers, or k to recompute every k-th layer in full.
        image_ids: token ids of the image codes, which `config.mask_image_logits` masks.
    """
    with torch.device("meta"):
        model = UniToken(
            decoder,
            vision,
            dropout=config.dropout,
            z_loss=config.z_loss,
            attention=config.attention,
            masked_ids=image_ids if config.mask_image_logits else (),
        )
    model.set_recompute(activation_checkpointing)
    return model
