"""The settings of a tokenization. `yamls/tokenize/chameleon.yaml` explains each for those who fill it in."""

from typing import Literal

from pydantic import Field

from unitoken.streaming_data.config import Config


class VisionConfig(Config):
    kind: Literal["chameleon"] = "chameleon"
    weights: str  # folder, file or hub id
    batch_size: int = Field(default=8, ge=1)  # images encoded at once
    precision: Literal["fp32"] = "fp32"  # TF32 flips 1.5 % of the codes, bf16 13 %


class TokenizeConfig(Config):
    tokenizer: str  # folder or hub id
    vision: VisionConfig
    target_size: int = Field(default=512, ge=2)  # pixels; a multiple of 2 latents, checked once the weights are known
    crop: Literal["square", "aspect"] = "square"
    chunk_size: int = Field(default=1000, ge=1)  # items; what is lost at most, per process, when a run is killed
    max_reject_fraction: float = Field(default=0.01, ge=0, le=1)
    compat: Literal["unitoken"] | None = None
