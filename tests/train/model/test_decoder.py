"""Packs, masks and caches: the decoder gives each document the same states as alone."""

from typing import Literal

import pytest
import torch

from support.decoders import LENGTHS, build_decoder, packed_inputs, small_config
from unitoken.train.model.decoder import KVCache, document_mask


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


def test_a_cache_gives_the_states_of_reading_all_at_once() -> None:
    decoder = build_decoder(small_config(num_key_value_heads=2)).eval()
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
