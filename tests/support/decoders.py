"""Small decoders with random weights, and packs for them."""

import torch
from torch import Tensor

from unitoken.train.config import DecoderConfig
from unitoken.train.model.decoder import Decoder

LENGTHS = (7, 12, 3)


def small(**changes: object) -> DecoderConfig:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return DecoderConfig.model_validate({**sizes, "qk_norm": "per_head", **changes})


def build(config: DecoderConfig, dropout: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config, dropout)
    for parameter in decoder.parameters():  # norms too, or a mix-up of theirs would not be seen
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    return decoder


def packed(padding: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and documents (1, L) of three documents in a pack, with padding behind them."""
    total = sum(LENGTHS)
    ids = torch.cat([torch.arange(total) % 50, torch.zeros(padding, dtype=torch.int64)])
    positions = torch.cat([*(torch.arange(n) for n in LENGTHS), torch.zeros(padding, dtype=torch.int64)])
    documents = torch.cat([*(torch.full((n,), i) for i, n in enumerate(LENGTHS)), torch.full((padding,), -1)])
    return ids[None], positions[None], documents[None].int()
