"""A trained model with its tokenizers, ready to reply: what `generate` and `chat` share.

found = find_model(config, checkpoint, size=None, draws=True)   # without torch, in a moment
model = LoadedModel(found)                                     # the tokenizers; the network when it is used
lengths = model.check_lengths(prompts, found.sizes, drawing=True)
replies = model.generate(prompts, sampling, sizes=found.sizes, drawing=True, max_tokens=...)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unitoken.codec.conversations import Conversation
from unitoken.codec.image_tokenizer.files import check_decoder, find_image_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.metadata import PictureCrops, read_metadata, read_sizes
from unitoken.train.config import DecoderConfig, StageConfig, VisionTowerConfig
from unitoken.train.generation.check_samples import image_sizes, latent_size, parse_size
from unitoken.train.generation.settings import check_trained_vocabulary

if TYPE_CHECKING:  # these import torch
    from unitoken.train.generation.dialogue import Dialogue
    from unitoken.train.generation.engine import PromptCollate, Watch
    from unitoken.train.generation.sampling import Sampling
    from unitoken.train.model.unitoken import UniToken


class FoundModel(NamedTuple):
    """What a checkpoint and its stage refer to, looked up before anything is loaded.

    Attributes:
        config: the settings of the stage that trained the model.
        checkpoint: as it was named: anything that `init_from` takes.
        origin: the checkpoint file, or the folder of an exported model.
        decoder: sizes of the decoder.
        vision: sizes of the vision tower; None without one.
        vocabulary: the one that the model was trained in; None if the checkpoint's folder does not have it.
        pictures: sizes of the training data's images; None in runs of older versions.
        sizes: the (height, width) in pixels that a generated image may have; empty without a decoder, when
            replies are text only.
        crops: the (width, height) in pixels to which images of prompts are cropped for the image tokenizer.
    """

    config: StageConfig
    checkpoint: Path
    origin: Path
    decoder: DecoderConfig
    vision: VisionTowerConfig | None
    vocabulary: Vocabulary | None
    pictures: PictureCrops | None
    sizes: list[tuple[int, int]]
    crops: list[tuple[int, int]]


def find_model(config: StageConfig, checkpoint: Path, size: str | None, draws: bool) -> FoundModel:
    """Look up what a checkpoint refers to, and check it as far as is possible without loading it.

    Args:
        config: the settings of the stage that trained the model.
        checkpoint: anything that `init_from` takes.
        size: of generated images, as `768x512`; None: `samples.size`, or as the data's images.
        draws: whether the image tokenizer must be able to draw.

    Raises:
        ConfigError: something is missing or does not fit.
    """
    if config.codec is None:
        raise ConfigError(
            "codec: generating takes the data's tokenizers: set codec.tokenizer and codec.vision.weights"
        )
    origin = find_origin(str(checkpoint))
    about = read_metadata(origin)
    samples_size = config.samples.size if config.samples is not None else None
    sizes = image_sizes(parse_size(size) if size else samples_size, about.pictures)
    image_tokenizer = find_image_tokenizer(config.codec.vision)
    for pixels in sizes:
        latent_size(pixels, image_tokenizer.downsampling)
    if draws:
        check_decoder(image_tokenizer, config.codec.vision.weights, "codec.vision.weights")
    decoder, vision = read_sizes(origin, config.model)
    # Runs of older versions have no pictures.json: images of prompts are then as large as those that are
    # generated.
    crops = about.pictures.crops if about.pictures is not None else []
    crops = crops or [(width, height) for height, width in sizes]
    if not image_tokenizer.has_decoder:
        sizes = []
    return FoundModel(
        config, checkpoint, origin, decoder, vision, about.vocabulary, about.pictures, sizes, crops
    )


def check_lengths(
    dialogue: Dialogue,
    collate: PromptCollate,
    conversations: Sequence[Conversation],
    crops: Sequence[tuple[int, int]],
    drawn: Sequence[tuple[int, int]],
    limit: int,
) -> list[int]:
    """Return the length of each prompt in tokens, features included.

    Args:
        dialogue: encodes the prompts.
        collate: lays them out.
        conversations: the prompts.
        crops: (width, height) in pixels to which their images are cropped.
        drawn: (height, width) in pixels of drawings; empty: the replies are no drawings.
        limit: data.packed_length.

    Raises:
        ConfigError: one leaves too little room for a reply.
    """
    grids = [dialogue.latents(size) for size in drawn]
    shortest_reply = max((len(list(dialogue.vocabulary.image_grammar(*grid))) for grid in grids), default=1)
    lengths = {}
    for conversation in dict.fromkeys(conversations):
        length = collate.length(dialogue.encode_layout(conversation, crops))
        if length + shortest_reply > limit:
            raise ConfigError(
                f"{conversation.id}: the prompt takes {length} tokens, features included, and the reply "
                f"{shortest_reply} at least; together they exceed data.packed_length ({limit}), "
                "the longest sequence seen in training"
            )
        lengths[conversation] = length
    return [lengths[conversation] for conversation in conversations]


class LoadedModel:
    """A model with its tokenizers on the GPU, or on the CPU where there is none.

    Raises:
        ConfigError: tokenizers and model do not fit.
    """

    def __init__(self, found: FoundModel) -> None:
        import torch

        from unitoken.train.generation.dialogue import Dialogue
        from unitoken.train.generation.engine import PromptCollate

        config, vision = found.config, found.vision
        assert config.codec is not None, "find_model"
        self.found = found
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dialogue = Dialogue(config.codec, found.vocabulary, self._device)
        self._check_vocabulary()
        views = Views(vision.image_size, vision.patch_size, config.data.anyres) if vision else None
        self._collate = PromptCollate(views, config.data.continuous, config.compat == "unitoken")

    def _check_vocabulary(self) -> None:
        vocabulary, found = self.dialogue.vocabulary, self.found
        if vocabulary.size > found.decoder.vocab_size:
            raise ConfigError(
                f"codec: its vocabulary has {vocabulary.size} ids, "
                f"model.decoder has room for {found.decoder.vocab_size}"
            )
        if found.vocabulary is not None:
            check_trained_vocabulary(vocabulary, found.vocabulary, str(found.checkpoint))

    def load(self) -> None:
        """Load the network now. Raises ConfigError: it is damaged, or does not fit its settings."""
        _ = self.network

    @functools.cached_property
    def network(self) -> UniToken:
        """The network, which is loaded when it is first used."""
        import torch

        from unitoken.train.generation.engine import load_model

        config = self.found.config
        half = config.precision == "bf16" and self._device == "cuda"
        # Converted tensor by tensor: the whole model in float32 may be too large for the device.
        model = load_model(config.model, self.found.checkpoint)
        return model.to(self._device, torch.bfloat16 if half else None)

    def check_lengths(
        self, conversations: Sequence[Conversation], sizes: Sequence[tuple[int, int]], drawing: bool
    ) -> list[int]:
        """Return the length of each prompt in tokens, features included.

        Raises:
            ConfigError: one leaves too little room for a reply.
        """
        drawn, limit = sizes if drawing else (), self.found.config.data.packed_length
        return check_lengths(self.dialogue, self._collate, conversations, self.found.crops, drawn, limit)

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        sizes: Sequence[tuple[int, int]],
        drawing: bool,
        max_tokens: Sequence[int],
        numbers: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> list[list[int]]:
        """Return the reply to each prompt, as ids; all prompts go through the model together.

        Args:
            conversations: the prompts.
            sampling: temperature, top-k, guidance and seed.
            sizes: the (height, width) in pixels that an image may have; empty: replies are text only.
            drawing: a reply is one image and nothing else.
            max_tokens: the most tokens of each reply that is not a drawing.
            numbers: the number of each prompt, which seeds its random numbers; default: 0, 1, ...
            watch: as in `engine.generate`.
        """
        from unitoken.train.generation.engine import generate

        return generate(
            self.network,
            self.dialogue.vocabulary,
            self.dialogue.encode(conversations, self.found.crops),
            sampling,
            sizes=[self.dialogue.latents(size) for size in sizes],
            drawing=drawing,
            max_tokens=max_tokens,
            numbers=numbers,
            collate=self._collate,
            batch=len(conversations),
            watch=watch,
        )
