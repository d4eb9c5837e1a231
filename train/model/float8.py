"""Products of the decoder's linear layers in float8, by torchao.

For each product weights, activations and gradients are scaled to float8 by the largest number of the whole
tensor: e4m3 for the first two, e5m2 for gradients. Parameters, their names, and all that is saved stay as
they are. The output layer, the embeddings and the vision tower compute as before.
"""

from __future__ import annotations

from torch import nn


def use_float8(layers: nn.Module, *, emulate: bool = False) -> None:
    """Replace the linear layers inside of `layers`; the parameters stay.

    Args:
        layers: the decoder's layers, on any device.
        emulate: round to float8, but multiply in the data type of the inputs; for tests on a CPU.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(layers, config=Float8LinearConfig(emulate=emulate))
