"""What is evaluated: a network with its tokenizers, and the settings of the stage that trained it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.metadata import PictureCrops
from unitoken.train.config import StageConfig
from unitoken.train.generation.check_samples import image_sizes
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import PromptCollate
from unitoken.train.generation.settings import check_trained_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from unitoken.train.model.unitoken import UniToken


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
        config: the settings of the stage that trained it.
        vocabulary: that it was trained in; None if its folder does not have it.
        pictures: the sizes of the training data's images; None if its folder does not have them.
        views: how the vision tower sees an image; None without one.
        load_network: loads the network, in evaluation mode; called once, and only if there is work to do.
        device: where it computes.
        checkpoint: identifies the weights, as JSON.
        broadcast: gives the first rank's tokens to ranks that go through a sharded network together.
    """

    config: StageConfig
    vocabulary: Vocabulary | None
    pictures: PictureCrops | None
    views: Views | None
    load_network: Callable[[], UniToken]
    device: str
    checkpoint: dict[str, Any]
    broadcast: Callable[[Tensor], Tensor] = field(default=_unchanged)

    @functools.cached_property
    def network(self) -> UniToken:
        """The network."""
        return self.load_network()

    @functools.cached_property
    def dialogue(self) -> Dialogue:
        """The tokenizers. Raises ConfigError if they are not those of the model."""
        assert self.config.codec is not None, "open_suite"
        dialogue = Dialogue(self.config.codec, self.vocabulary, self.device)
        if self.vocabulary is not None:
            check_trained_vocabulary(dialogue.vocabulary, self.vocabulary, "the model")
        return dialogue

    @property
    def collate(self) -> PromptCollate:
        """Lays out prompts as training laid out its data."""
        return PromptCollate(self.views, self.config.data.continuous, self.config.compat == "unitoken")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) in pixels of drawings, as the data has them."""
        return image_sizes(None, self.pictures)

    @property
    def crops(self) -> list[tuple[int, int]]:
        """The (width, height) in pixels to which images of prompts are cropped for the image tokenizer."""
        crops = self.pictures.crops if self.pictures is not None else []
        return crops or [(width, height) for height, width in self.sizes]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything of the model that its replies and losses depend on, as JSON."""
        config = self.config
        data = config.data.model_dump(mode="json", include={"packed_length", "continuous", "anyres"})
        return {
            "checkpoint": self.checkpoint,
            "model": config.model.model_dump(mode="json", exclude={"dropout", "compile"}),
            "compat": config.compat,
            "precision": config.precision,
            "device": self.device.split(":")[0],
            "codec": config.codec.model_dump(mode="json") if config.codec else None,
            "data": data,
        }
