"""Small decoders with random weights, and packs for them."""

import torch
from torch import Tensor

from unitoken.streaming_data.reading.batch import target_places
from unitoken.train.config import DecoderConfig
from unitoken.train.model.decoder import Decoder

LENGTHS = (7, 12, 3)
VQ_CONFIG = {
    "embed_dim": 8,
    "num_embeddings": 64,
    "latent_channels": 8,
    "resolution": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
"""The image tokenizer of a small Chameleon of transformers."""


def small_config(**changes: object) -> DecoderConfig:
    """Return the sizes of a small decoder, with some changed."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return DecoderConfig.model_validate({**sizes, "qk_norm": "layer_per_head", **changes})


def build_decoder(config: DecoderConfig, dropout: float = 0.0) -> Decoder:
    """Build a decoder with random weights from a fixed seed."""
    torch.manual_seed(0)
    decoder = Decoder(config, dropout)
    for parameter in decoder.parameters():  # the norms too, so that a mix-up of their gains shows
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    return decoder


def packed_inputs(padding: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, position and document ids, each (1, L), of a pack of three documents and padding."""
    total = sum(LENGTHS)
    ids = torch.cat([torch.arange(total) % 50, torch.zeros(padding, dtype=torch.int64)])
    positions = torch.cat([*(torch.arange(n) for n in LENGTHS), torch.zeros(padding, dtype=torch.int64)])
    documents = torch.cat([*(torch.full((n,), i) for i, n in enumerate(LENGTHS)), torch.full((padding,), -1)])
    return ids[None], positions[None], documents[None].int()


def counting_batch(ids: range, step: int) -> dict[str, Tensor]:
    """Return 4 texts of 16 of these ids, each the one behind the one before, from a place drawn by `step`."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, len(ids), (4, 1), generator=generator)
    texts = ids.start + (first + torch.arange(16)) % len(ids)
    return {
        "input_ids": texts,
        "labels": texts,
        **target_places(texts),
        "position_ids": torch.arange(16).expand(4, -1),
        "document_ids": torch.zeros(4, 16, dtype=torch.int32),
        "pixel_values": torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    }
