"""Packs, masks and caches: the decoder gives each document the same states as alone."""

from typing import Any, Literal

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from support.decoders import LENGTHS, build_decoder, packed_inputs, small_config
from unitoken.train.model.decoder import Decoder, KVCache, causal_bias, document_mask

BLOCK_LISTS = [
    f"{full}{side}_{kind}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for kind in ("num_blocks", "indices")
]


@pytest.mark.parametrize("kind", ["sdpa", "flex"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"swin_norm": True}])
def test_packed_documents_train_as_they_do_alone(
    kind: Literal["sdpa", "flex"], changes: dict[str, object]
) -> None:
    decoder = build_decoder(small_config(**changes))
    ids, positions, documents = packed_inputs()
    states = decoder(decoder.embed_tokens(ids), positions, document_mask(documents, kind))
    together = states[:, : sum(LENGTHS)]
    weights = torch.linspace(-1, 1, together.numel()).view_as(together)
    (together * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    parts = []
    for document in ids[0, : sum(LENGTHS)].split(LENGTHS):
        parts.append(decoder(decoder.embed_tokens(document[None]), torch.arange(len(document))[None], None))
    alone = torch.cat(parts, dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    (alone * weights).sum().backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["sdpa", "flex"])
def test_padding_gives_no_nan_forward_or_backward(kind: Literal["sdpa", "flex"]) -> None:
    decoder = build_decoder(small_config())
    ids, positions, documents = packed_inputs(padding=9)
    empty = torch.cat([documents, torch.full_like(documents, -1)])  # a second row holds padding only
    states = decoder(
        decoder.embed_tokens(ids.repeat(2, 1)), positions.repeat(2, 1), document_mask(empty, kind)
    )
    states.square().mean().backward()
    assert states.isfinite().all()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def random_packs(length: int, seed: int) -> torch.Tensor:
    """Document ids (3, length): of documents of any length with padding behind, one document, and padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 300, (length,), generator=generator)
    ids = torch.arange(length).repeat_interleave(lengths)[:length]
    end = int(torch.randint(1, length + 1, (1,), generator=generator))
    return torch.stack(
        [ids.where(torch.arange(length) < end, -1), torch.zeros_like(ids), -torch.ones_like(ids)]
    )


@pytest.mark.parametrize("length", [1, 100, 128, 129, 640, 1000])
def test_the_block_mask_of_packs_equals_torchs(length: int) -> None:
    for seed in range(5):
        mask = document_mask(random_packs(length, seed), "flex")
        assert isinstance(mask, BlockMask)
        expected = create_block_mask(mask.mask_mod, 3, None, length, length, device="cpu")
        assert mask.seq_lengths == expected.seq_lengths
        assert mask.BLOCK_SIZE == expected.BLOCK_SIZE
        torch.testing.assert_close(mask.to_dense(), expected.to_dense(), rtol=0, atol=0)
        for part in BLOCK_LISTS:
            found, torchs = getattr(mask, part), getattr(expected, part)
            assert found.is_contiguous(), part
            torch.testing.assert_close(found, torchs, rtol=0, atol=0, msg=part)


class LargestTensor(TorchDispatchMode):
    """Measures the most elements that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_a_block_mask_makes_no_matrix_of_all_positions() -> None:
    packs = random_packs(4096, seed=0)
    with LargestTensor() as largest:
        document_mask(packs, "flex")
    assert largest.elements <= packs.numel()


def go_on(decoder: Decoder, past: KVCache, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The states (P, T) of the next tokens of the cache's first rows."""
    past.proceed(positions, past.length)
    bias = causal_bias(positions, past.length, torch.float32)
    states: torch.Tensor = decoder(decoder.embed_tokens(ids), positions, bias, past)
    return states


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_cache_gives_the_states_of_reading_all_at_once(step: int) -> None:
    """Also for rows of different lengths, whose shorter ones are padded, and for several tokens at a time."""
    decoder = build_decoder(small_config(num_key_value_heads=2)).eval()
    ids = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    begins = torch.tensor([6, 2, 4])
    with torch.no_grad():
        expected = decoder(decoder.embed_tokens(ids), torch.arange(16).expand(3, -1), None)
        past = KVCache(2, 3, 16)
        past.begin(torch.arange(3), 6)
        prompts = decoder(decoder.embed_tokens(ids[:, :6]), torch.arange(6).expand(3, -1), None, past)
        stored = [buffer.data_ptr() for buffers in past.stored if buffers for buffer in buffers]
        for row, begin in enumerate(begins):
            torch.testing.assert_close(prompts[row, :begin], expected[row, :begin], rtol=1e-5, atol=1e-5)
        for first in range(0, 10, step):
            positions = begins[:, None] + first + torch.arange(step)
            states = go_on(decoder, past, ids.gather(1, positions), positions)
            torch.testing.assert_close(
                states, expected[torch.arange(3)[:, None], positions], rtol=1e-5, atol=1e-5
            )
    assert stored == [buffer.data_ptr() for buffers in past.stored if buffers for buffer in buffers], (
        "nothing is allocated after the prompt"
    )


def test_a_row_of_the_cache_is_read_anew_or_again() -> None:
    """A new text in a row, wrong tokens that others replace, and new rows leave no trace in the others."""
    decoder = build_decoder(small_config()).eval()
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    at = torch.arange(8)
    with torch.no_grad():
        expected = decoder(decoder.embed_tokens(ids), at.expand(2, -1), None)
        past = KVCache(2, 2, 8)
        past.begin(torch.arange(2), 5)
        decoder(decoder.embed_tokens(ids[:, :5]), at[:5].expand(2, -1), None, past)
        go_on(decoder, past, torch.zeros(2, 3, dtype=torch.int64), at[5:].expand(2, -1))  # wrong tokens
        past.begin(torch.tensor([1]), 7)
        decoder(decoder.embed_tokens(ids[:1, :7]), at[:7][None], None, past)  # row 1 takes the text of row 0
        past.grow(3)
        found = go_on(decoder, past, ids[:1].expand(2, -1)[:, 5:], at[5:].expand(2, -1))
    for row in found:
        torch.testing.assert_close(row, expected[0, 5:], rtol=1e-5, atol=1e-5)


def test_dropout_is_on_both_residual_branches_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = build_decoder(small_config(num_hidden_layers=1), dropout=0.5)
    ids, positions, _ = packed_inputs(padding=0)
    embeddings = decoder.embed_tokens(ids).detach()
    dropped: list[torch.Tensor] = []

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        dropped.append(hidden)
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr(decoder.layers[0], "_dropout", recorded)
        decoder(embeddings, positions, None)
    assert len(dropped) == 2
    assert not torch.equal(decoder(embeddings, positions, None), decoder(embeddings, positions, None))
    decoder.eval()
    assert torch.equal(decoder(embeddings, positions, None), decoder(embeddings, positions, None))
