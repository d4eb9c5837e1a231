"""Make the quickstart's image tokenizer: a VQGAN of 4,096 codes for photographs of 64 pixels.

    python train_image_tokenizer.py weights/photo-vqgan

It learns from crops of the photographs that scikit-image and scikit-learn bring along, apart from two that
are held out: scikit-image's cat and scikit-learn's flower. First it is an autoencoder without codes; then the
codes begin as the centres of its latents. Takes about an hour on one core. There is no adversarial loss.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import skimage
import sklearn
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file

from unitoken.codec.image_tokenizer.chameleon import VQGAN, meta_name
from unitoken.codec.image_tokenizer.files import Parameters

Pixels = npt.NDArray[np.uint8]

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
PHOTOGRAPHS = {  # and how often crops are taken from each
    SKIMAGE / "astronaut.png": 1.5,
    SKIMAGE / "coffee.png": 1.5,
    SKIMAGE / "motorcycle_left.png": 1.0,
    SKIMAGE / "motorcycle_right.png": 0.5,
    SKIMAGE / "hubble_deep_field.jpg": 0.7,
    SKIMAGE / "retina.jpg": 0.4,
    SKIMAGE / "ihc.png": 0.7,
    SKIMAGE / "rocket.jpg": 1.0,
    SKIMAGE / "color.png": 0.2,
    SKLEARN / "china.jpg": 2.0,
}
HELD_OUT = (SKIMAGE / "chelsea.png", SKLEARN / "flower.jpg")
SIZE, SMALLEST_CROP, CROPS = 64, 80, 12000
STEPS, LEARNING_RATE, COMMITMENT = 12000, 2e-3, 0.25
WITHOUT_CODES, REVIVED_UNTIL = STEPS // 8, STEPS * 4 // 5
QUARTERS_UNTIL = STEPS * 2 // 3  # until then a batch has quarters of crops, which are faster
CODES = 4096
SHAPE = {
    "embed_dim": 8,
    "n_embed": CODES,
    "ddconfig": {
        "z_channels": 32,
        "resolution": SIZE,
        "ch": 32,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    },
}


class Square(NamedTuple):
    """A part of a photograph: its left upper corner and its side."""

    left: float
    top: float
    side: float


def crop(photograph: Image.Image, square: Square) -> Pixels:
    """Return a square of a photograph as SIZE x SIZE pixels."""
    left, top, side = square
    box = (left, top, left + side, top + side)
    return np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box))


def varied(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Mirror a crop, exchange its colours, or change contrast and brightness, each of them sometimes."""
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    if random.random() < 0.4:
        pixels = pixels[..., random.permutation(3)]
    if random.random() < 0.3:
        changed = (pixels - 128.0) * random.uniform(0.7, 1.3) + 128 + random.uniform(-25, 25, 3)
        pixels = changed.clip(0, 255).astype(np.uint8)
    return pixels


def training_crops() -> torch.Tensor:
    """Return random crops of the photographs, (n, SIZE, SIZE, 3)."""
    random = np.random.default_rng(0)
    photographs = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    shares = np.array(list(PHOTOGRAPHS.values())) / sum(PHOTOGRAPHS.values())
    crops = []
    for number in random.choice(len(photographs), CROPS, p=shares):
        photograph = photographs[number]
        side = math.exp(random.uniform(math.log(SMALLEST_CROP), math.log(min(photograph.size))))
        left, top = (random.uniform(0, length - side) for length in photograph.size)
        crops.append(varied(crop(photograph, Square(left, top, side)), random))
    return torch.from_numpy(np.stack(crops))


def held_out_crops() -> torch.Tensor:
    """Return the middle of each photograph that is held out, and the quarters of this middle."""
    crops = []
    for path in HELD_OUT:
        photograph = Image.open(path).convert("RGB")
        side = min(photograph.size)
        left, top = ((length - side) / 2 for length in photograph.size)
        crops.append(crop(photograph, Square(left, top, side)))
        for x in (left, left + side / 2):
            crops += [crop(photograph, Square(x, y, side / 2)) for y in (top, top + side / 2)]
    return torch.from_numpy(np.stack(crops))


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels (n, height, width, 3) as the network takes them: channels first, -1 to 1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def vectors(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (n, channels, height, width) as one vector each."""
    return latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


@torch.no_grad()
def centres(points: torch.Tensor, count: int) -> torch.Tensor:
    """Return the centres of `count` clusters (k-means)."""
    found = points[torch.randperm(len(points))[:count]].clone()
    for _ in range(12):
        nearest = torch.cat([torch.cdist(part, found).argmin(1) for part in torch.split(points, 4096)])
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(found).index_add_(0, nearest, points)
        found = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], found)
        empty = (sizes == 0).nonzero().flatten()
        found[empty] = points[torch.randint(len(points), (len(empty),))]
    return found


def batch(crops: torch.Tensor, step: int) -> torch.Tensor:
    """Return a step's crops, or quarters of crops."""
    if step >= QUARTERS_UNTIL:
        return as_input(crops[torch.randint(len(crops), (8,))])
    half = SIZE // 2
    y, x = torch.randint(half + 1, (2,)).tolist()
    return as_input(crops[torch.randint(len(crops), (16,)), y : y + half, x : x + half])


@torch.no_grad()
def place_codes(model: VQGAN, crops: torch.Tensor) -> None:
    """Move the codes to the centres of the latents."""
    some = torch.split(crops[torch.randint(len(crops), (1280,))], 64)
    points = torch.cat([vectors(model.latents(as_input(part))) for part in some])
    model.quantize.embedding.weight.data = centres(points, CODES)


def revive(model: VQGAN, uses: torch.Tensor, latents: torch.Tensor) -> None:
    """Move the codes that are not used to some of the latents, and halve the counts."""
    dead = (uses < 0.5).nonzero().flatten()
    points = vectors(latents)
    picked = points[torch.randint(len(points), (len(dead),))]
    model.quantize.embedding.weight.data[dead] = picked + 0.01 * torch.randn_like(picked)
    uses *= 0.5


@torch.no_grad()
def fidelity(model: VQGAN, pixels: torch.Tensor) -> float:
    """Return how well pictures come back: the mean of their PSNR in decibels."""
    again = model.decoder(model.post_quant_conv(model.quantize(model.latents(as_input(pixels)))[0]))
    errors = (again.clamp(-1, 1) - as_input(pixels)).mul(127.5).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / errors)).mean())


def train(model: VQGAN, crops: torch.Tensor, held_out: torch.Tensor) -> None:
    """Train the model to give crops back."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.05)
    uses = torch.zeros(CODES)
    for step in range(STEPS):
        if step == WITHOUT_CODES:
            place_codes(model, crops)
        x = batch(crops, step)
        latents = quantized = model.latents(x)
        commitment = torch.zeros(())
        if step >= WITHOUT_CODES:
            quantized, commitment, codes = model.quantize(latents)
            uses += torch.bincount(codes.flatten(), minlength=CODES)
        loss = F.mse_loss(model.decoder(model.post_quant_conv(quantized)), x) + COMMITMENT * commitment
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if WITHOUT_CODES < step < REVIVED_UNTIL and step % 100 == 99:
            revive(model, uses, latents)
        if step >= WITHOUT_CODES and step % 500 == 499:
            print(f"step {step + 1}: held-out pictures come back at {fidelity(model, held_out):.1f} dB")


def save(model: VQGAN, folder: Path) -> None:
    """Save the weights in half precision with Meta's names, which count the decoder's levels backwards."""
    levels = len(SHAPE["ddconfig"]["ch_mult"])  # type: ignore[index]
    state = {meta_name(name, levels): value.half().contiguous() for name, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "vqgan.safetensors")
    settings = yaml.safe_dump({"model": {"params": SHAPE}}, sort_keys=False)
    (folder / "vqgan.yaml").write_text(settings, encoding="utf-8")


def main() -> None:
    """Train the image tokenizer, and save it in the folder that the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "weights/photo-vqgan")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = VQGAN(Parameters.model_validate(SHAPE))
    train(model, training_crops(), held_out_crops())
    save(model, folder)
    print(folder)


if __name__ == "__main__":
    main()
