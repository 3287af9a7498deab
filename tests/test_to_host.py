"""Pieces reach host memory in order, and what fails on the way is said."""

import threading
from collections.abc import Iterator

import pytest
import torch
from lowvram_video.vae.to_host import behind_decoding
from torch import Tensor


def pieces(num: int) -> Iterator[Tensor]:
    for index in range(num):
        yield torch.full((1, 3, 2, 4, 4), float(index))


@pytest.mark.parametrize("num", [0, 1, 5])
def test_all_come_in_order(num: int) -> None:
    assert list(behind_decoding(pieces(num), lambda piece: float(piece.mean()))) == [
        float(index) for index in range(num)
    ]


def test_a_piece_is_taken_while_the_next_is_made() -> None:
    asked_for_second = threading.Event()

    def made() -> Iterator[Tensor]:
        yield torch.zeros(1)
        asked_for_second.set()
        yield torch.ones(1)

    def take(piece: Tensor) -> float:
        assert asked_for_second.wait(20)
        return float(piece)

    assert list(behind_decoding(made(), take)) == [0.0, 1.0]


def test_an_error_of_the_decoder_is_raised_after_what_was_made() -> None:
    def failing() -> Iterator[Tensor]:
        yield torch.zeros(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    seen = []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        for value in behind_decoding(failing(), float):
            seen.append(value)
    assert seen == [0.0], "what was made before is passed on"


def test_an_error_on_the_way_is_raised() -> None:
    def take(piece: Tensor) -> float:
        if piece.mean() == 2:
            raise MemoryError("no room for a frame")
        return float(piece.mean())

    seen = []
    with pytest.raises(MemoryError, match="no room for a frame"):
        for value in behind_decoding(pieces(4), take):
            seen.append(value)
    assert seen == [0.0, 1.0]


@pytest.mark.gpu
def test_bits_are_the_same_from_a_gpu() -> None:
    wide = torch.randn(8, 3, 4, 256, 256, device="cuda")

    def made() -> Iterator[Tensor]:
        for each in wide:
            yield (each[None] @ each[None].transpose(-1, -2)).tanh()

    want = [piece.cpu() for piece in made()]
    got = list(behind_decoding(made(), lambda piece: piece.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
