"""Places of a block's tensors in one extent."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lowvram_video.memory.stream.layout import (
    ALIGNMENT,
    SMALL_BYTES,
    LayoutError,
    Part,
    bind,
    in_one_piece,
    layout_block,
    unbind,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Info:
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class Source:
    """Tensors in memory, as if they lay one after the other in a file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.values = tensors
        self.tensors: dict[str, Info] = {}
        end = 100
        for name, value in tensors.items():
            self.tensors[name] = Info(value.dtype, tuple(value.shape), value.nbytes, Path("model.bin"), end)
            end += value.nbytes

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.values[name].reshape(-1).view(torch.uint8))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(8, 8, device="meta")
        self.q = nn.Linear(8, 8, device="meta")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = Attention()
        self.modulation = nn.Parameter(torch.empty(1, 6, 8, device="meta"))
        self.register_buffer("scale", torch.empty((), device="meta"))
        self.ffn = nn.Linear(8, 13, bias=False, device="meta")


def values() -> dict[str, Tensor]:
    return {
        "blocks.0.modulation": torch.randn(1, 6, 8),
        "blocks.0.cross_attn.k.weight": torch.randint(0, 255, (8, 8), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "blocks.0.cross_attn.k.bias": torch.randn(8),
        "blocks.0.ffn.weight": torch.randn(13, 8).bfloat16(),
        "blocks.0.scale": torch.randn(()),
        "blocks.0.cross_attn.q.weight": torch.randn(8, 8),
        "blocks.0.cross_attn.q.bias": torch.randn(8),
    }


OPTIONAL = {"cross_attn.k.weight", "cross_attn.k.bias"}


def test_places_are_aligned_disjoint_and_optional_ones_come_last() -> None:
    layout = layout_block(Source(values()), "blocks.0", Block().state_dict(), OPTIONAL)
    end = 0
    for place in layout.places:
        assert place.offset % ALIGNMENT == 0 and place.offset >= end
        assert (place.offset >= layout.stream_bytes) == (place.name in OPTIONAL)
        end = place.offset + place.nbytes
    assert end <= layout.nbytes < end + ALIGNMENT
    assert layout.part_bytes(Part.STREAM) + layout.part_bytes(Part.OPTIONAL) == layout.part_bytes(Part.ALL)
    assert {place.name for place in layout.part_places(Part.OPTIONAL)} == OPTIONAL
    assert len(layout.part_places(Part.ALL)) == len(values())


def test_without_optional_names_all_parts_agree() -> None:
    layout = layout_block(Source(values()), "blocks.0", ["scale", "ffn.weight"])
    assert layout.stream_bytes == layout.nbytes == 2 * ALIGNMENT
    assert layout.part_places(Part.OPTIONAL) == ()


def test_all_optional_leaves_nothing_to_stream() -> None:
    layout = layout_block(Source(values()), "blocks.0", ["scale"], {"scale"})
    assert layout.stream_bytes == 0 and layout.part_places(Part.STREAM) == ()
    assert len(layout.part_places(Part.OPTIONAL)) == 1


def test_large_tensors_precede_small_ones_in_file_order() -> None:
    tensors = {f"b.{name}": torch.zeros(size, dtype=torch.uint8) for name, size in
               (("bias", 10), ("z", SMALL_BYTES), ("norm", 4), ("a", SMALL_BYTES + 3))}  # fmt: skip
    layout = layout_block(Source(tensors), "b", ["a", "bias", "norm", "z"])
    assert [place.name for place in layout.places] == ["z", "a", "bias", "norm"]


@pytest.mark.parametrize("part", list(Part))
def test_bound_parameters_are_views_with_the_stored_dtype(part: Part) -> None:
    source, block = Source(values()), Block()
    layout = layout_block(source, "blocks.0", block.state_dict(), OPTIONAL)
    flat = torch.zeros(layout.part_bytes(part), dtype=torch.uint8)
    bind(block, layout, flat, part)
    start, _ = layout.span(part)
    state = block.state_dict()
    for place in layout.part_places(part):
        # The bytes arrive after binding, as they do in a ring.
        at = place.offset - start
        source.read_into(f"blocks.0.{place.name}", flat[at : at + place.nbytes])
        stored = source.values[f"blocks.0.{place.name}"]
        assert state[place.name].dtype == stored.dtype
        assert torch.equal(state[place.name].reshape(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8))
    bound = {place.name for place in layout.part_places(part)}
    assert {name for name, tensor in state.items() if not tensor.is_meta} == bound
    assert isinstance(block.modulation, nn.Parameter) and not isinstance(block.scale, nn.Parameter)
    unbind(block, layout, part)
    assert all(tensor.is_meta for tensor in block.state_dict().values())


def test_refusals_name_the_tensor() -> None:
    tensors = values()
    source = Source(tensors)
    with pytest.raises(LayoutError, match=r"lacks the tensor 'blocks\.1\.scale'"):
        layout_block(source, "blocks.1", ["scale"])
    source.tensors["blocks.0.scale"] = Info(torch.float32, (3,), 4, Path("x"), 0)
    with pytest.raises(LayoutError, match=r"blocks\.0\.scale.*takes 12 bytes, the file says 4"):
        layout_block(source, "blocks.0", ["scale"])
    wrong = Source({"blocks.0.ffn.weight": torch.zeros(8, 13), "blocks.0.gone": torch.zeros(1)})
    layout = layout_block(wrong, "blocks.0", ["ffn.weight"])
    with pytest.raises(LayoutError, match=r"shape \(8, 13\), the model expects \(13, 8\)"):
        bind(Block(), layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    layout = layout_block(wrong, "blocks.0", ["gone"])
    with pytest.raises(LayoutError, match="no parameter or buffer named 'gone'"):
        bind(Block(), layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    with pytest.raises(LayoutError, match="flat uint8 tensor of 256 bytes"):
        bind(Block(), layout, torch.zeros(255, dtype=torch.uint8))


def test_tensors_of_any_dtype_and_shape_lie_in_one_allocation() -> None:
    tensors = {
        "weight": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "bias": torch.randn(7, dtype=torch.float64),
        "scale": torch.tensor(0.5),
        "across": torch.arange(6, dtype=torch.int16).view(2, 3).t(),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
    }
    infos = Source(tensors).tensors
    stored = (tensor.flatten().view(torch.uint8) for tensor in tensors.values())
    pieces = (piece for each in stored for piece in each.split(4) if piece.numel())  # also within a number
    placed = in_one_piece(infos, pieces, torch.device("cpu"))
    assert len({each.untyped_storage().data_ptr() for each in placed.values()}) == 1
    for name, tensor in tensors.items():
        assert placed[name].dtype == tensor.dtype and placed[name].shape == tensor.shape
        assert placed[name].storage_offset() * tensor.element_size() % ALIGNMENT == 0
        assert torch.equal(placed[name].double(), tensor.double())
