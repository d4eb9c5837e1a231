"""Which chunks follow from the files of a run."""

from __future__ import annotations

from unitoken.tokenize.job import Chunk, Round, Work
from unitoken.tokenize.sources.reader import Input, InputFile, Piece


def files(*names: str) -> list[InputFile]:
    return [InputFile(name=name, format="jsonl", size=1, version="v") for name in names]


def pieces(*counts: int | None) -> list[Piece]:
    return [Piece(file=0, start=0, end=1, position=0, items=count) for count in counts]


def test_chunks_follow_from_the_pieces_and_the_rounds_of_retries() -> None:
    rounds = (Round(items=[(0, 3), (0, 7), (1, 2)]), Round(items=[(1, 2)]))
    work = Work(Input(files=files("a"), pieces=pieces(10, 5)), rounds, chunk_size=2)
    assert work.chunks() == [
        Chunk("chunk-000000", ((0, None),)),
        Chunk("chunk-000001", ((1, None),)),
        Chunk("retry-01-000000", ((0, (3, 7)),)),
        Chunk("retry-01-000001", ((1, (2,)),)),
        Chunk("retry-02-000000", ((1, (2,)),)),
    ]
    assert [work.count_items(chunk) for chunk in work.chunks()] == [10, 5, 2, 1, 1]


def test_a_chunk_of_a_piece_of_unknown_length_has_no_count() -> None:
    work = Work(Input(files=files("a"), pieces=pieces(None)), (), 2)
    assert work.count_items(work.chunks()[0]) is None
