"""A pass of a full-size model without its numbers: what it allocates is counted, nothing is computed.

Files are headers with nothing behind them, tensors are PyTorch's fakes (shapes, dtypes and lifetimes). GPU kernels are
the operators that stand for them in compiled code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lowvram_video.attention.backend import EXACT_WORKSPACE
from lowvram_video.attention.sage import WORKSPACE
from lowvram_video.benchmarks.synthetic import block_number, tensors_of
from lowvram_video.fused.opaque import OpaqueOps
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.memory.stream.layout import Part, align, bind, layout_block, unbind
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.transformer.workspace import Execution
from lowvram_video.wanvideo.footprint import WanWork
from lowvram_video.wanvideo.network.blocks import Context, KeysValues
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import Extras, Nag, Visitor, WanModel
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.kernels.row_reference import QuantizedRows
from lowvram_video.weights.kernels.rows import dequantize_rows, quantize_rows
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .caching_allocator import CachingAllocator, Piece

ALLOCATION_UNIT = 512  # of PyTorch's caching allocator
DTYPES = {"bf16": (torch.bfloat16, "BF16"), "fp8": (torch.float8_e4m3fn, "F8_E4M3")}
NUM_BLOCKS = 2  # all are alike, and each gives back what it took
PASSES = 2
BLAS_BYTES = 32 << 20  # cuBLAS's workspace on Hopper, which PyTorch's allocator has
HELD_LATENTS = 8  # of a solver and guidance, in fp32


class CountedMemory(TorchDispatchMode):
    """Bytes of all tensors made under it that are still there: `now`, and the most there were at a time: `peak`.

    Each of them has its place in every one of `allocators`.
    """

    def __init__(self, *allocators: CachingAllocator) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._allocators = allocators
        self._living: dict[int, tuple[StorageWeakRef, int, list[Piece]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._forget_dead()
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.untyped_storage()._cdata not in known:
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._living:
            nbytes = align(storage.nbytes(), ALLOCATION_UNIT)
            pieces = [allocator.malloc(nbytes) for allocator in self._allocators]
            self._living[storage._cdata] = StorageWeakRef(storage), nbytes, pieces
            self.now += nbytes

    def _forget_dead(self) -> None:
        for key, (storage, nbytes, pieces) in list(self._living.items()):
            if storage.expired():
                del self._living[key]
                self.now -= nbytes
                for allocator, piece in zip(self._allocators, pieces, strict=True):
                    allocator.free(piece)


class DryAttention:
    """An exact kernel: its output, and a logarithm for each row and head."""

    name, exact, workspace = "sdpa", True, EXACT_WORKSPACE

    def refuse(self, spec: object) -> None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.new_empty(q.shape[:3], dtype=torch.float32)
        out = q.new_empty(q.shape)
        del rows
        return out


class DrySage(DryAttention):
    """What `sageattention` 1.0.6 allocates (`core.py: sageattn`), of a k that is the backend's own."""

    name, exact, workspace = "sageattn", False, WORKSPACE

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone(memory_format=torch.contiguous_format)
        k -= k.mean(dim=1, keepdim=True)
        v = v.to(torch.float16)
        q8, k8 = (torch.empty(x.shape, dtype=torch.int8) for x in (q, k))
        out = q.new_empty(q.shape)
        del q8, k8, v
        return out


class DryRowOps:
    """Triton's kernels, as the operators that they are in compiled code."""

    name = "triton"

    def quantize(self, x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values, scales = quantize_rows(x, dtype)
        return (values if out is None else out), scales

    def dequantize(self, values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        dequantize_rows(values, scales, out)
        return out


class DryGemm:
    """A product that takes nothing beside its operands."""

    name, scratch_bytes = "dry", 0

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        pass


def write_header(path: Path, config: WanConfig, stored: str) -> None:
    """A file of a model whose blocks' products are stored as bf16, fp8 or a GGUF type; behind its header is a hole."""
    if stored in DTYPES:
        _write_safetensors(path, config, stored)
    else:
        _write_gguf(path, config, stored)


def _write_safetensors(path: Path, config: WanConfig, stored: str) -> None:
    header, end = {}, 0
    for name, tensor in tensors_of(config).items():
        product = block_number(name) is not None and tensor.ndim == 2
        dtype, label = DTYPES[stored if product else "bf16"]
        size = tensor.numel() * dtype.itemsize
        header[name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def _write_gguf(path: Path, config: WanConfig, stored: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[stored]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer, end = gguf.GGUFWriter(path, "wan"), 0
    for name, tensor in tensors_of(config).items():
        product = block_number(name) is not None and tensor.ndim == 2
        shape = (tensor.shape[0], tensor.shape[1] // elements * nbytes) if product else tuple(tensor.shape)
        dtype = np.dtype(np.uint8 if product else np.float32)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, size, raw_dtype=kind if product else None)
        end += align(size, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(align(path.stat().st_size, 32) + end)


def use_gpu_kernels(model: StreamedWan, attention: DryAttention) -> None:
    """Have a model that was opened for a CPU compute as on a GPU that has every kernel."""
    model.model.execution = Execution(torch.bfloat16, attention, OpaqueOps())
    for layer in model._busy_layers():
        for name, part in (("gemm", DryGemm()), ("ops", DryRowOps())):
            if hasattr(layer.format, name):
                layer.format = replace(layer.format, **{name: part})


class Seeing(Visitor):
    """A host's patch that looks at self-attention."""

    sees_attention = True

    def attended(self, x: Tensor, q: Tensor, k: Tensor) -> None:
        assert x.shape == q.shape


def bytes_of_pass(model: StreamedWan, plan: MemoryPlan) -> int:
    """The most that a pass under this plan has at a time, beside the weights: prompts, buffers, temporaries."""
    with dry(model, plan) as network:
        latent, timestep, text = inputs_of(model, plan)
        with CountedMemory() as memory:
            context, _kept = prompt_of(model, plan, text)
            extras = extras_of(model, plan, text, context)
            memory.peak = memory.now
            network(latent, timestep, context, extras=extras)
    return memory.peak


def extras_of(model: StreamedWan, plan: MemoryPlan, text: Tensor, context: Context) -> Extras:
    """What steers a pass, or looks at it, as the plan's work says."""
    work = plan.work
    assert isinstance(work, WanWork)
    nag = None
    if work.nag:  # its keys and values, where all prompts' are kept, are counted with theirs
        own = Context(model.model.embed_context(text).text, keys_values=context.keys_values)
        nag = Nag(text[:1], NagSettings(), context=own)
    return Extras(nag=nag, visitor=Seeing() if work.seen_queries else Visitor())


def room_for_run(model: StreamedWan, plan: MemoryPlan, *allocators: CachingAllocator) -> None:
    """Weights, and then passes as a solver asks for them, in each allocator; NoRoom where something does not fit."""
    with dry(model, plan) as network, CountedMemory(*allocators):
        weights = [torch.empty(nbytes, dtype=torch.uint8) for nbytes in weights_of(model, plan)]
        latent, timestep, text = inputs_of(model, plan)
        held = torch.empty(HELD_LATENTS, model.config.out_channels, *plan.work.latent_size)
        blas = torch.empty(BLAS_BYTES, dtype=torch.uint8)
        context, kept = prompt_of(model, plan, text)
        for _ in range(PASSES):
            velocity = network(latent, timestep, context)
        del weights, held, blas, kept, velocity


@contextmanager
def dry(model: StreamedWan, plan: MemoryPlan) -> Iterator[WanModel]:
    """The network with fakes for weights and with few blocks, set up as planned."""
    choice, network = plan.choice, model.model
    network.execution = replace(
        network.execution,
        token_chunk=choice.token_chunk,
        head_groups=choice.head_groups,
        query_chunk=choice.query_chunk,
        packed_keys=choice.packed_keys,
    )
    few = dict(list(network.ordered_blocks().items())[:NUM_BLOCKS])
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    meta = {name: tensor.detach() for name, tensor in named}
    bring = network.bring
    with FakeTensorMode(), torch.inference_mode():
        for name, tensor in meta.items():
            assign(network, name, torch.empty(tensor.shape, dtype=tensor.dtype))
        network.ordered_blocks = lambda: few  # type: ignore[method-assign]
        if choice.transient_fixed:
            network.bring = bringing(model)  # type: ignore[method-assign]
        try:
            yield network
        finally:
            network.forget_angles()
            network.bring = bring  # type: ignore[method-assign]
            del network.ordered_blocks
            for name, tensor in meta.items():
                assign(network, name, tensor)


def inputs_of(model: StreamedWan, plan: MemoryPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, timestep and text of a pass."""
    latent = torch.empty(plan.work.batch, model.config.in_channels, *plan.work.latent_size)
    text = torch.empty(plan.work.batch, model.config.text_tokens, model.config.text_dim)
    return latent, torch.empty(plan.work.batch), text


def prompt_of(model: StreamedWan, plan: MemoryPlan, text: Tensor) -> tuple[Context, Tensor | None]:
    """The embedded prompt, and its keys and values in all blocks where they are kept."""
    network = model.model
    context = network.embed_context(text)
    if not plan.choice.cache_text_kv:
        return context, None
    # as `StreamedModel.visit` and its shelf do
    optional = max(layout.part_bytes(Part.OPTIONAL) for layout in model.weights.layouts)
    ring = torch.empty(2 * optional, dtype=torch.uint8)
    made = [block.cross_attn.keys_values(context) for block in network.ordered_blocks().values()]
    kept = torch.empty(plan.model.text_cache_bytes(plan.work), dtype=torch.uint8)
    shelf = kept.view(made[0].pairs[0][0].dtype)
    shapes = [pair[0].shape for pair in made[0].pairs]
    at = 0
    context.keys_values = []
    for _ in made:
        pairs = []
        for shape in shapes:
            size = shape.numel()
            pairs.append((shelf[at : at + size].view(shape), shelf[at + size : at + 2 * size].view(shape)))
            at += 2 * size
        context.keys_values.append(KeysValues(pairs))
    del ring, made
    return context, kept


def weights_of(model: StreamedWan, plan: MemoryPlan) -> list[int]:
    """Bytes of each allocation for weights and their ring, in order."""
    return list(filter(None, (plan.denoise.fixed_weights, plan.denoise.residents, plan.denoise.ring)))


def assign(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter of this name."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor, requires_grad=False))


def bringing(model: StreamedWan) -> Any:
    """`TransientWeights` without bytes: into what is spare where that suffices, else into memory of their own."""

    @contextmanager
    def bring(modules: Sequence[nn.Module], spare: Tensor | None) -> Iterator[None]:
        names = {id(module): name for name, module in model.model.named_children()}
        layouts = [
            layout_block(model.weights.source, names[id(module)], module.state_dict().keys()) for module in modules
        ]
        sizes = [align(layout.nbytes) for layout in layouts]
        flat = None if spare is None else spare.flatten().view(torch.uint8)
        if flat is None or flat.numel() < sum(sizes):
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
        for module, layout, part in zip(modules, layouts, flat[: sum(sizes)].split(sizes), strict=True):
            bind(module, layout, part)
        yield
        for module, layout in zip(modules, layouts, strict=True):
            unbind(module, layout)

    return bring
