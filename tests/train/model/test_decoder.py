"""Packs, masks, caches: the decoder gives each document what it would get alone."""

from typing import Literal

import pytest
import torch

from support.decoders import LENGTHS, build, packed, small
from unitoken.train.model.decoder import KVCache, document_mask


@pytest.mark.parametrize("kind", ["sdpa", "flex"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"swin_norm": True}])
def test_packed_documents_get_the_states_and_gradients_they_get_alone(
    kind: Literal["sdpa", "flex"], changes: dict[str, object]
) -> None:
    decoder = build(small(**changes))
    ids, positions, documents = packed()
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
    decoder = build(small())
    ids, positions, documents = packed(padding=9)
    empty = torch.cat([documents, torch.full_like(documents, -1)])  # and a row of padding only
    states = decoder(
        decoder.embed_tokens(ids.repeat(2, 1)), positions.repeat(2, 1), document_mask(empty, kind)
    )
    states.square().mean().backward()
    assert states.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())


def test_a_cache_gives_what_reading_everything_at_once_gives() -> None:
    decoder = build(small(num_key_value_heads=2)).eval()
    ids = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(11).expand(3, -1)
    with torch.no_grad():
        expected = decoder(decoder.embed_tokens(ids), positions, None)
        past = KVCache(2, 11)
        first = decoder(decoder.embed_tokens(ids[:, :6]), positions[:, :6], None, past)
        later = [
            decoder(decoder.embed_tokens(ids[:, [i]]), positions[:, [i]], None, past) for i in range(6, 11)
        ]
    torch.testing.assert_close(torch.cat([first, *later], dim=1), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_both_residual_branches_in_training_only() -> None:
    decoder = build(small(num_hidden_layers=1), dropout=0.5)
    ids, positions, _ = packed(padding=0)
    embeddings = decoder.embed_tokens(ids).detach()
    layer = decoder.layers[0]
    calls = []
    layer._drop = lambda hidden: calls.append(hidden.shape) or hidden
    decoder(embeddings, positions, None)
    assert len(calls) == 2
    del layer._drop
    assert not torch.equal(decoder(embeddings, positions, None), decoder(embeddings, positions, None))
    decoder.eval()
    assert torch.equal(decoder(embeddings, positions, None), decoder(embeddings, positions, None))
