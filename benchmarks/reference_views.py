"""The reference's way to prepare a picture for the vision tower.

LLaVA's AnyRes cuts the picture into views, and transformers' processor prepares each of them.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image

from unitoken.dataset.vision_views import Views, _fit_into


def processor(views: Views) -> Any:
    """Make transformers' processor for pictures of the tower's size."""
    from transformers import SiglipImageProcessor

    size = {"height": views.image_size, "width": views.image_size}
    return SiglipImageProcessor(size=size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def reference_pixels(data: bytes, views: Views, process: Any) -> torch.Tensor:
    """Prepare an encoded picture as V views of the tower's size: (V, 3, S, S) float32, normalized."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = views.image_size
    if not views.anyres:
        pixels: torch.Tensor = process.preprocess(image, return_tensors="pt")["pixel_values"]
        return pixels
    across, down = views.canvas(*image.size)
    width, height = _fit_into(image.size, (across * size, down * size))
    canvas = Image.new("RGB", (across * size, down * size), (0, 0, 0))
    canvas.paste(image.resize((width, height)), ((across * size - width) // 2, (down * size - height) // 2))
    tiles = [
        canvas.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(down)
        for x in range(across)
    ]
    parts = [
        process.preprocess(part, return_tensors="pt")["pixel_values"][0]
        for part in [image.resize((size, size)), *tiles]
    ]
    return torch.stack(parts)
