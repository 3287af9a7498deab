"""Compiled blocks: what they compute, which memory they take, and how often code is made.

Post-grad graphs, of which inductor makes its code, are run as they are: that takes no C++ compiler and shows every
tensor that the code would make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowvram_video.compilation.blocks import compile_modules, dynamo_limits, inductor_options, uncompile_modules
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.framepack.network.model import FramePackModel, Frames, History, Prompt
from lowvram_video.fused.eager import EagerOps
from lowvram_video.fused.opaque import OpaqueOps
from lowvram_video.fused.ops import FusedOps
from lowvram_video.transformer.execution import Execution
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.weights.kernels import gemms
from lowvram_video.weights.kernels import rows as row_ops
from lowvram_video.weights.kernels.row_reference import INT8_MAX, QuantizedRows, TorchRowOps, row_scales
from lowvram_video.weights.linear.fp8 import Fp8Dequantized
from lowvram_video.weights.linear.int8 import Int8Matmul
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.projection import Scratch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode

from .tiny import CONFIGS, TEXT_DIM, randomize
from .tiny_framepack import CONFIG, make_tensors

CHUNK = {"wan": 60, "framepack": 60}  # tokens: two chunks, of which a graph is made sooner than of more
ROWS = {"wan": 96, "framepack": 113}  # tokens in the tests
WIDEST = {"wan": 192, "framepack": 32 + 128}  # features of the MLP, with the attention beside it where they are joined
OPS = {"opaque": OpaqueOps, "eager": EagerOps}


class Graphs:
    """A backend that makes post-grad graphs, keeps them, and notes what running them makes."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.largest = 0  # elements of the largest tensor that they made

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        return compile_fx(graph, inputs, inner_compile=self.keep)

    def keep(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor], **_: Any) -> Callable[..., Any]:
        options = inductor_options("default")
        with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)), torch._inductor.config.patch(options):
            post_grad_passes(graph, is_inference=True)
        graph.recompile()
        self.graphs.append(graph)

        def run(arguments: list[Any]) -> Any:
            with Allocations() as made:
                results = graph(*arguments)
            self.largest = max(self.largest, made.largest)
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def left_out_of_place(self) -> list[str]:
        """Writes that make a new tensor of what they write to."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"]
        return [str(node.target) for node in nodes if "scatter" in str(node.target) or "functional" in str(node.target)]


class Allocations(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((*args, *(kwargs or {}).values()))}
        for tensor in _tensors((result,)):
            if tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


Run = Callable[[float, int], Tensor]  # a timestep and a seed -> the model's velocity


def wan(ops: FusedOps) -> tuple[WanModel, list[nn.Module], Run]:
    model = WanModel(CONFIGS["t2v"])
    randomize(model).requires_grad_(False)
    model.execution = Execution(ops=ops, token_chunk=CHUNK["wan"])

    def run(timestep: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(1, 16, 2, 12, 16, generator=generator)  # 96 tokens
        text = torch.randn(1, 16, TEXT_DIM, generator=generator)
        return model(latent, torch.tensor([timestep]), text)

    return model, list(model.ordered_blocks().values()), run


def framepack(ops: FusedOps) -> tuple[FramePackModel, list[nn.Module], Run]:
    model = FramePackModel(CONFIG)
    model.load_state_dict(make_tensors(CONFIG), assign=True)
    model.requires_grad_(False)
    model.execution = Execution(ops=ops, token_chunk=CHUNK["framepack"])

    def run(timestep: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        noisy, clean = (Frames(draw(1, 16, frames, 12, 12), torch.arange(frames)) for frames in (2, 1))
        prompt = Prompt(draw(1, 5, CONFIG.text_dim), draw(1, CONFIG.pooled_dim))
        (condition,) = model.conditions(prompt, torch.tensor([timestep]), 10000.0)
        return model(noisy, History(clean=clean), condition)

    return model, list(model.ordered_blocks().values()), run


MODELS = {"wan": wan, "framepack": framepack}


def compile_with(backend: object, blocks: Sequence[nn.Module]) -> None:
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("form", list(OPS))
def test_one_code_for_all_blocks_steps_and_seeds_in_place(kind: str, form: str) -> None:
    model, blocks, run = MODELS[kind](OPS[form]())
    places = [(timestep, seed) for timestep in (900.0, 500.0, 20.0) for seed in (0, 1)]
    want = [run(*place) for place in places]
    backend = Graphs()
    compile_with(backend, blocks)
    error = max(relative(run(*place), plain) for place, plain in zip(places, want, strict=True))
    print(
        f"{kind} {form}: {len(backend.graphs)} graphs for {len(blocks)} blocks, max relative error {error:.1e}, "
        f"largest tensor {backend.largest}"
    )
    assert len(backend.graphs) == len({type(block) for block in blocks})
    assert error <= (0 if form == "opaque" else 2e-6)
    # the pool and the residual stream are written to in place: nothing new is larger than a chunk in the MLP, or q
    assert not backend.left_out_of_place()
    assert (
        backend.largest
        <= max(CHUNK[kind] * WIDEST[kind], ROWS[kind] * model.config.dim)
        < 3 * ROWS[kind] * model.config.dim
    )


def test_only_compiled_code_sees_the_opaque_steps() -> None:
    class Recording(EagerOps):
        def compiled(self) -> FusedOps:
            return OpaqueOps()

    model, blocks, run = wan(Recording())
    want = run(500.0, 0)
    backend = Graphs()
    compile_with(backend, blocks)
    assert torch.equal(run(500.0, 0), want)
    used = {str(node.target) for node in backend.graphs[0].graph.nodes if "lowvram_video" in str(node.target)}
    assert {name.split(".")[1] for name in used} == {
        "modulated_norm",
        "affine_norm",
        "rms_norm_",
        "gelu_",
        "gated_add_",
    }
    uncompile_modules(blocks)
    assert torch.equal(run(300.0, 1), wan(EagerOps())[2](300.0, 1))
    assert len(backend.graphs) == 1
    assert isinstance(model.workspace(8, torch.device("cpu")).ops, Recording)


def test_settings_reach_dynamo_and_go_again() -> None:
    _, blocks, run = wan(OpaqueOps())
    want, settings = run(500.0, 0), CompileSettings(backend="aot_eager", cache_size_limit=3)
    before = torch._dynamo.config.cache_size_limit
    compile_modules(blocks, settings)
    with dynamo_limits(settings):
        assert torch._dynamo.config.cache_size_limit == 3
        assert torch.equal(run(500.0, 0), want)
    assert torch._dynamo.config.cache_size_limit == before


# --- 8-bit weights ---------------------------------------------------------------------------------------


class OpaqueRowOps(TorchRowOps):
    """What `TritonRowOps` is to compiled code."""

    def quantize(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return row_ops.quantize_rows(x, dtype)

    def dequantize(self, values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        row_ops.dequantize_rows(values, scales, out)
        return out


class OpaqueGemm:
    name = "opaque"

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        gemms.multiply_int8(rows.values, rows.scales, weight, columns, bias, (1, 1, 1, 1, 1), out)


def quantize_layers(blocks: Sequence[nn.Module], dtype: torch.dtype, scaled: bool) -> None:
    for layer in (module for block in blocks for module in block.modules() if isinstance(module, Linear)):
        if not scaled:
            layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
            continue
        scale = row_scales(layer.weight, INT8_MAX if dtype == torch.int8 else 448.0)
        values = layer.weight / scale
        layer.weight = nn.Parameter((values.round() if dtype == torch.int8 else values).to(dtype), requires_grad=False)
        layer.register_buffer("weight_scale", scale)
        ops = OpaqueRowOps()
        layer.format = Int8Matmul(0, OpaqueGemm(), ops) if dtype == torch.int8 else Fp8Dequantized(ops=ops)


def reads_fp8(node: torch.fx.Node) -> bool:
    """Whether an operator of PyTorch's own, which inductor makes kernels of, reads fp8 numbers."""
    values = [one.meta.get("val", one.meta.get("example_value")) for one in node.all_input_nodes]
    fp8 = any(isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn for value in values)
    return fp8 and "lowvram_video" not in str(node.target) and "view" not in str(node.target)


@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [(torch.int8, True), (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)],
    ids=["int8", "fp8", "fp8 cast"],
)
def test_eight_bit_layers_compile_without_copies(dtype: torch.dtype, scaled: bool) -> None:
    model, blocks, run = wan(OpaqueOps())
    quantize_layers(blocks, dtype, scaled)
    want = run(500.0, 0)
    backend = Graphs()
    compile_with(backend, blocks)
    got = run(500.0, 0)
    scratch = model.scratch_elements()
    print(f"{dtype}: max relative error {relative(got, want):.1e}, largest tensor {backend.largest}, scratch {scratch}")
    assert torch.equal(got, want)
    assert len(backend.graphs) == 1 and not backend.left_out_of_place()
    casts = [node for graph in backend.graphs for node in graph.graph.nodes if reads_fp8(node)]
    assert not casts, "inductor cannot read fp8 on GPUs before compute capability 8.9"
    assert backend.largest <= ROWS["wan"] * model.config.dim and (not scratch or backend.largest < scratch)


def test_row_operators_are_ones_that_torch_compile_knows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 32, generator=generator), torch.randn(16, 32, generator=generator)
    values, scales = TorchRowOps().quantize(x, torch.int8)
    packed, columns = TorchRowOps().quantize(weight, torch.int8)
    columns, out = columns.flatten(), torch.empty(6, 16)
    with torch.inference_mode(False):
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (row_ops.quantize_rows, (x, torch.int8)),
            (row_ops.dequantize_rows, (values, scales, torch.empty(6, 32))),
            (row_ops.rescale_rows, (torch.randn(6, 16), scales.clone(), columns.clone(), None, torch.empty(6, 16))),
            (gemms.multiply_int8, (values, scales, packed, columns, None, (1, 1, 1, 1, 1), out)),
        ]
        for operator, arguments in calls:
            plain = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
            torch.library.opcheck(operator, plain, test_utils=("test_schema", "test_faketensor"))


def test_scratch_hands_out_disjoint_tensors() -> None:
    scratch = Scratch(torch.device("cpu"), torch.float32, 20)
    first, second = scratch.take((2, 3)), scratch.take((7, 2))
    first.fill_(1.0), second.fill_(2.0)
    assert scratch.buffer.tolist() == [1.0] * 6 + [2.0] * 14


def test_code_knows_how_many_queries_go_together_on_a_gpu() -> None:
    """Found before the blocks: dynamo cannot follow the search, and breaks there from the second size on."""
    model, blocks, _ = wan(EagerOps())
    model.execution = replace(model.execution, query_chunk=70, head_groups=2, processors=4)
    latents = [torch.randn(1, 16, 2, 12, width) for width in (16, 20)]
    text = torch.randn(1, 16, TEXT_DIM)
    want = [model(latent, torch.tensor([500.0]), text) for latent in latents]
    blocks[0].compile(backend="eager", fullgraph=True)
    for latent, each in zip(latents, want, strict=True):
        assert (model(latent, torch.tensor([500.0]), text) - each).abs().max() < 1e-5
