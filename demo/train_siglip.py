"""Make demo/assets/siglip: a small vision tower, trained as SigLIP is to match words with pictures.

    python -m demo.train_siglip

It is trained on 64 views of each digit that is not held out, against the ten words, with SigLIP's pairwise
sigmoid loss (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training"). Takes a minute on one core.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from demo.digits import PIXELS, WORDS, moved, picture, split
from unitoken.train.config import VisionTowerConfig
from unitoken.train.model.vision_tower import VisionTower

FOLDER = Path(__file__).parent / "assets" / "siglip"
CONFIG = VisionTowerConfig(
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=PIXELS,
    patch_size=16,
)
VIEWS, STEPS, BATCH = 64, 1500, 128


class Pairs(nn.Module):
    """The vision tower, and an embedding for each of the ten words."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = VisionTower(CONFIG)
        self.words = nn.Embedding(len(WORDS), CONFIG.hidden_size)
        self.scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, pixels: Tensor) -> Tensor:
        """Score how well pictures (B, 3, S, S) match the words, as logits (B, 10)."""
        pictures = F.normalize(self.tower(pixels).mean(1), dim=-1)
        logits: Tensor = pictures @ F.normalize(self.words.weight, dim=-1).T * self.scale.exp() + self.bias
        return logits


def pixels_of(digits: npt.NDArray[np.float64], indices: npt.NDArray[np.int64], view: int) -> Tensor:
    """Make the pictures of some digits as one tensor (n, 3, PIXELS, PIXELS), uint8."""
    pictures = [np.asarray(moved(picture(digits[i]), int(i), view).convert("RGB")) for i in indices]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    """Train the tower, save it and print how many held-out digits it matches with their words."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits, (train, held_out) = load_digits(), split()
    pixels = torch.cat([pixels_of(digits.images, train, view) for view in range(VIEWS)])
    labels = torch.from_numpy(digits.target[train]).repeat(VIEWS)
    model = Pairs()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step in range(STEPS):
        chosen = torch.randint(len(pixels), (BATCH,))
        signs = 2.0 * F.one_hot(labels[chosen], len(WORDS)) - 1
        loss = -F.logsigmoid(signs * model(pixels[chosen])).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        read = model(pixels_of(digits.images, held_out, 0)).argmax(-1).numpy()
    print(f"held out: {np.mean(read == digits.target[held_out]):.3f} match the right word")

    FOLDER.mkdir(parents=True, exist_ok=True)
    state = {
        f"vision_model.{name}": tensor.half().contiguous()
        for name, tensor in model.tower.state_dict().items()
    }
    save_file(state, FOLDER / "model.safetensors")
    settings = {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        **CONFIG.model_dump(),
    }
    (FOLDER / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
