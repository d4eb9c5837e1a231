"""Make demo/assets/vqgan: a small VQGAN of 128 codes, trained on the digits that are not held out.

    python -m demo.train_vqgan

Takes ten minutes on one core. Encoder, quantizer and decoder are those of Chameleon's image tokenizer; there
is no adversarial loss.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from demo.digits import picture, small, split
from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.image_tokenizer.chameleon import VQGAN, meta_name
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.codec.image_tokenizer.files import Parameters
from unitoken.dataset.images import tokenizer_pixels

FOLDER = Path(__file__).parent / "assets" / "vqgan"
SIZE = 16  # target_size in yamls/tokenize/digits.yaml
STEPS, BATCH = 1500, 32
SHAPE = {
    "embed_dim": 8,
    "n_embed": 128,
    "ddconfig": {
        "z_channels": 16,
        "resolution": SIZE,
        "ch": 32,
        "ch_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    },
}


def revive(model: VQGAN, uses: torch.Tensor, latents: torch.Tensor) -> None:
    """Move the codes that were used less than twice to some of the latents, and set the counts to zero."""
    dead = (uses < 2).nonzero().flatten()
    vectors = latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    picked = vectors[torch.randint(len(vectors), (len(dead),))]
    model.quantize.embedding.weight.data[dead] = picked + 0.01 * torch.randn_like(picked)
    uses.zero_()


def train(model: VQGAN, pictures: torch.Tensor) -> None:
    """Train on `pictures`, (n, 3, SIZE, SIZE) in -1 to 1, to reconstruct them."""
    model.quantize.embedding.weight.data.uniform_(-1, 1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    uses = torch.zeros(model.quantize.embedding.num_embeddings)
    for step in range(STEPS):
        x = pictures[torch.randint(len(pictures), (BATCH,))]
        latents = model.latents(x)
        quantized, commitment, codes = model.quantize(latents)
        y = model.decoder(model.post_quant_conv(quantized))
        loss = F.mse_loss(y, x) + 0.5 * F.l1_loss(y, x) + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        uses += torch.bincount(codes.flatten(), minlength=len(uses))
        if step % 100 == 99:
            print(
                f"step {step + 1}: loss {loss.item():.4f}, {int((uses > 0).sum())} codes in use", flush=True
            )
            if step < STEPS * 0.7:
                revive(model, uses, latents)
            uses.zero_()


def save(model: VQGAN) -> None:
    """Save the weights in half precision with Meta's names, which count the decoder's levels backwards."""
    levels = len(SHAPE["ddconfig"]["ch_mult"])  # type: ignore[index]
    state = {
        meta_name(name, levels): tensor.half().contiguous() for name, tensor in model.state_dict().items()
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(state, FOLDER / "vqgan.safetensors")
    (FOLDER / "vqgan.yaml").write_text(
        yaml.safe_dump({"model": {"params": SHAPE}}, sort_keys=False), encoding="utf-8"
    )


def report(pixels: npt.NDArray[np.uint8]) -> None:
    """Print how much held-out digits change when they are encoded and decoded, and how well they are read."""
    digits = load_digits()
    train_ids, held_out = split()
    classifier = SVC(gamma=0.001).fit(digits.data[train_ids], digits.target[train_ids])
    vision = load_vision(ImageTokenizerConfig(weights=str(FOLDER)))
    again = vision.decode(vision.encode(pixels[held_out]))
    error = np.abs(again.astype(float) - pixels[held_out]).mean()
    truth = digits.target[held_out]
    before, after = (
        classifier.score(np.stack([small(one) for one in pictures]), truth)
        for pictures in (pixels[held_out], again)
    )
    print(
        f"held out: mean error {error:.1f} of 255, read correctly {before:.3f} before and {after:.3f} after"
    )


def main() -> None:
    """Train the VQGAN, save it and report on the held-out digits."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels = np.stack(
        [tokenizer_pixels(picture(digit).convert("RGB"), (SIZE, SIZE)) for digit in load_digits().images]
    )
    model = VQGAN(Parameters.model_validate(SHAPE))
    train(model, torch.from_numpy(pixels[split()[0]]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    save(model)
    report(pixels)


if __name__ == "__main__":
    main()
