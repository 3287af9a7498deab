"""A pass of a full-size model without its numbers: what it allocates is counted, nothing is computed.

Tensors are PyTorch's fakes (shapes, dtypes and lifetimes). GPU kernels are the operators that stand for them in
compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lowvram_video.attention.backend import EXACT_WORKSPACE
from lowvram_video.attention.sage import workspace_on
from lowvram_video.fused.opaque import OpaqueOps
from lowvram_video.fused.ops import NormedRows, Rope
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.memory.stream.layout import Part, align, bind, layout_block, unbind
from lowvram_video.runtime.opened import M
from lowvram_video.runtime.streamed import StreamedModel
from lowvram_video.system.processors import ASSUMED_THREADS
from lowvram_video.system.reductions import sum_buffer_bytes
from lowvram_video.transformer.block_cache import BlockCache
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.wanvideo.footprint import WanWork
from lowvram_video.wanvideo.network.blocks import Context, KeysValues
from lowvram_video.wanvideo.network.model import Extras, Nag, Visitor
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.kernels.row_reference import QuantizedRows
from lowvram_video.weights.kernels.rows import dequantize_rows, quantize_rows
from lowvram_video.weights.linear.linear import Linear, Piece
from lowvram_video.weights.linear.made_fp8 import Fp8Made
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .caching_allocator import Recording

NARROW = 2048  # dimensions up to which no rows are made late (`fused/triton_ops.py`)
ALLOCATION_UNIT = 512  # of PyTorch's caching allocator
PASSES = 2
BLAS_BYTES = 32 << 20  # cuBLAS's workspace on Hopper, which PyTorch's allocator has
HELD_LATENTS = 8  # of a solver and guidance, in fp32


class CountedMemory(TorchDispatchMode):
    """Bytes of all tensors made under it that are still there: `now`, and the most there were at a time: `peak`."""

    def __init__(self, room_bytes: int = 0) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._room_bytes = align(room_bytes, ALLOCATION_UNIT)  # of `Workspace.make_room`, which may be refused
        self.recording = Recording()
        self._living: dict[int, tuple[StorageWeakRef, int, int]] = {}

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
            number = self.recording.malloc(nbytes, may_be_refused=nbytes == self._room_bytes)
            self._living[storage._cdata] = StorageWeakRef(storage), nbytes, number
            self.now += nbytes

    def _forget_dead(self) -> None:
        for key, (storage, nbytes, number) in list(self._living.items()):
            if storage.expired():
                del self._living[key]
                self.now -= nbytes
                self.recording.free(number)


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

    name, exact, workspace = "sageattn", False, workspace_on(ASSUMED_THREADS, copies_k=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone(memory_format=torch.contiguous_format)
        mean, columns = k.mean(dim=1, keepdim=True), k.shape[2] * k.shape[3]
        torch.empty(sum_buffer_bytes(k.shape[1], columns, ASSUMED_THREADS), dtype=torch.uint8)  # PyTorch's, meanwhile
        k -= mean
        half = v.to(torch.float16)
        q8, k8 = (torch.empty(x.shape, dtype=torch.int8) for x in (q, k))
        out = q.new_empty(q.shape)
        del q8, k8, half
        return out


class DryRowOps:
    """Triton's kernels, as the operators that they are in compiled code."""

    name = "triton"

    def quantize(self, x: Tensor | NormedRows, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(x, NormedRows):
            return x.quantized(dtype, 448.0, 1e-30)
        values, scales = quantize_rows(x, dtype)
        return (values if out is None else out), scales

    def quantizes_late(self, dtype: torch.dtype) -> bool:
        return True

    def dequantize(self, values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        dequantize_rows(values, scales, out)
        return out


class DryOps(OpaqueOps):
    """The kernels that are no part of compiled code: they write where they are told to, and nowhere else."""

    def makes_late_rows(self, dim: int) -> bool:
        return dim > NARROW

    def modulated_rows(
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float
    ) -> Tensor | NormedRows:
        if not self.makes_late_rows(x.shape[1]):
            return super().modulated_rows(x, shift, scale, first_row, rows_per_group, eps)
        return NormedRows(self, x, scale, shift, eps, first_row, rows_per_group)

    def affine_rows(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> NormedRows:
        return NormedRows(self, x, weight, bias, eps)

    def quantize_normed(
        self, rows: NormedRows, dtype: torch.dtype, largest: float, smallest_scale: float
    ) -> tuple[Tensor, Tensor]:
        return torch.empty(rows.shape, dtype=dtype), torch.empty(rows.shape[0], 1)

    def pack_heads(self, x: Tensor, values: Tensor, scales: Tensor) -> None:
        pass

    def pack_normed(
        self, x: Tensor, weight: Tensor, eps: float, rope: Rope | None, first_row: int, values: Tensor, scales: Tensor
    ) -> None:
        pass

    def unpack_heads(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        pass


class DryGemm:
    """A product that takes nothing beside its operands."""

    name, scratch_bytes = "dry", 0

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        pass


def use_gpu_kernels(model: StreamedModel[Any], attention: DryAttention) -> None:
    """Have a model that was opened for a CPU compute as on a GPU that has every kernel."""
    model.model.execution = Execution(torch.bfloat16, attention, DryOps())
    for layer in model.costs.busy_layers:
        if isinstance(layer.format, Fp8Made):
            layer.format = replace(layer.format, product=_dry(layer.format.product))
        layer.format = _dry(layer.format)


def _dry(form: Any) -> Any:
    """A format whose kernels are those that are none."""
    parts = {"gemm": DryGemm(), "ops": DryRowOps()}
    return replace(form, **{name: part for name, part in parts.items() if hasattr(form, name)})


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


def recorded_run(model: StreamedWan, plan: MemoryPlan, caches: Sequence[BlockCache | None] = (None,)) -> Recording:
    """What weights, and then passes as a solver has them, ask of an allocator: one a step for each step cache."""
    of_one = replace(plan, work=replace(plan.work, passes_per_step=1))
    room_bytes = plan.model.room_bytes(plan.work, plan.choice, plan.limits)
    with dry(model, plan, room_bytes) as network, CountedMemory(room_bytes) as memory:
        weights = [torch.empty(nbytes, dtype=torch.uint8) for nbytes in weights_of(model, plan)]
        latent, timestep, text = inputs_of(model, plan)
        held = torch.empty(HELD_LATENTS, model.config.out_channels, *plan.work.latent_size)
        blas = torch.empty(BLAS_BYTES, dtype=torch.uint8)
        prompts: list[tuple[Context, Tensor | None]] = []
        for _ in range(PASSES):
            for number, cache in enumerate(caches):
                if number == len(prompts):
                    prompts.append(prompt_of(model, of_one, text))
                velocity = network(latent, timestep, prompts[number][0], extras=Extras(cache=cache))
        del weights, held, blas, prompts, velocity
    assert memory.recording.num_refusable == PASSES * len(caches), "one of a pass's own is as large as the room"
    return memory.recording


@contextmanager
def dry(model: StreamedModel[M], plan: MemoryPlan, room_bytes: int = 0) -> Iterator[M]:
    """The network with fakes for weights, set up as planned; of its blocks there is one of each kind.

    Those of a kind are alike, and each gives back what it took.
    """
    choice, network = plan.choice, model.model
    network.execution = network.execution.planned(choice, room_bytes)
    first, *others, last = network.ordered_blocks().items()
    few = dict([first, last])
    left_out = {id(tensor) for _, block in others for tensor in [*block.parameters(), *block.buffers()]}
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    meta = {name: tensor.detach() for name, tensor in named if id(tensor) not in left_out}
    bring = network.bring
    with FakeTensorMode(), torch.inference_mode():
        for name, tensor in meta.items():
            assign(network, name, torch.empty(tensor.shape, dtype=tensor.dtype))
        network.ordered_blocks = lambda: few  # type: ignore[method-assign]
        if choice.transient_fixed:
            network.bring = Bringing(model)
        try:
            yield network
        finally:
            model.forget_contexts()
            network.bring = bring
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


class Bringing:
    """`TransientWeights` without bytes: into what is spare where that suffices, else into memory of their own."""

    def __init__(self, model: StreamedModel[Any]):
        self._source = model.weights.source
        self._names = {id(module): name for name, module in model.model.named_children()}

    @contextmanager
    def __call__(self, modules: Sequence[nn.Module], spare: Tensor | None) -> Iterator[None]:
        layouts = [
            layout_block(self._source, self._names[id(module)], module.state_dict().keys()) for module in modules
        ]
        sizes = [align(layout.nbytes) for layout in layouts]
        flat = room_for(sum(sizes), spare)
        for module, layout, part in zip(modules, layouts, flat[: sum(sizes)].split(sizes), strict=True):
            bind(module, layout, part)
        yield
        for module, layout in zip(modules, layouts, strict=True):
            unbind(module, layout)

    def pieces(self, layer: Linear, spare: Tensor | None) -> Iterator[Piece]:
        flat: Tensor | None = None
        for rows, piece in layer.pieces():
            sizes = [align(tensor.nbytes) for tensor in piece.values()]
            if flat is None:
                flat = room_for(sum(sizes), spare)
            parts = zip(piece.items(), flat[: sum(sizes)].split(sizes), strict=True)
            yield (
                rows,
                {name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for (name, tensor), part in parts},
            )


def room_for(nbytes: int, spare: Tensor | None) -> Tensor:
    """So many bytes."""
    flat = None if spare is None else spare.flatten().view(torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8) if flat is None or flat.numel() < nbytes else flat
