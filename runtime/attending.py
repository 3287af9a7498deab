"""How a model attends, and what its runs learn: what may change between runs, or from step to step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.backend import AttentionSpec, Backend
from ..attention.select import (
    AUTO,
    AUTO_FAST,
    AttentionUnavailable,
    select_attention,
    select_fastest,
    select_sparse,
)
from ..attention.sparse.run import AttentionRun
from ..attention.sparse.settings import SparseSettings
from ..attention.timing import AttentionSize
from ..sampling.caching.moments import Moment
from ..system.dtypes import FP16_ENDS, half_dtype
from ..weights.linear.compute import describe_products
from .opened import M, OpenedModel

logger = logging.getLogger(__name__)

SAFE_ATTENTION = "sdpa"


class AttendingModel(OpenedModel[M]):
    """A model whose attention is chosen, made sparse, or put on the safe path; each stops it first."""

    _before_safe_path: tuple[torch.dtype, Backend, AttentionRun | None] | None = None
    _attention_tokens = 0  # of the size that attention was chosen for
    _step: tuple[int, int, int | None] | None = None  # what `at_step` was told last; None before a run's first

    # What else a model is made of

    @property
    def _compiled(self) -> bool:
        """Whether its blocks run as compiled code."""
        raise NotImplementedError

    @property
    def _alone(self) -> bool:
        """Whether no other card shares its passes."""
        raise NotImplementedError

    @property
    def _others(self) -> Sequence[AttendingModel[M]]:
        """The same model on the other cards that share its passes."""
        raise NotImplementedError

    @property
    def host_bytes(self) -> int:
        return super().host_bytes + sum(other.fixed.host_bytes for other in self._others)

    @property
    def pinned_bytes(self) -> int:
        return super().pinned_bytes + sum(other.fixed.pinned_bytes for other in self._others)

    # The choice

    def choose_attention(self, tokens: int) -> None:
        """Have the fastest attention for a pass of so many tokens, where the choice is ours; not between passes.

        It is timed on a GPU, once for a size; before a run's settings are told, as it is one of them.
        """
        execution, device, mode = self.model.execution, self.settings.device, self.settings.attention_mode
        known = tokens == self._attention_tokens or self._before_safe_path is not None
        if known or mode not in (AUTO, AUTO_FAST) or not self._may_time:
            return
        spec = AttentionSpec(device, execution.dtype, self.config.head_dim)
        size, self._attention_tokens = AttentionSize(tokens, self.config.num_heads), tokens
        chosen = self._on_all_cards(select_fastest(mode, spec, size))
        if chosen.name == execution.attention.name:
            return
        self.stop()
        self.model.execution = replace(execution, attention=chosen)
        self.use_sparse(self._sparse_settings)

    def agree_on_attention(self) -> None:
        """Have attention that all cards of its passes have, where the choice is ours: as many as there are by now."""
        self._attention_tokens = 0  # fewer cards may have a faster one
        execution = self.model.execution
        if self.settings.attention_mode in (AUTO, AUTO_FAST):
            self.model.execution = replace(execution, attention=self._on_all_cards(execution.attention))

    def _on_all_cards(self, chosen: Backend) -> Backend:
        """What was chosen for this card; PyTorch's, which every card has, where another one lacks it."""
        dtype, head_dim = self.model.execution.dtype, self.config.head_dim
        for other in self._others:
            if other.model.execution.attention.name == chosen.name:
                continue
            try:
                select_attention(chosen.name, AttentionSpec(other.settings.device, dtype, head_dim))
            except AttentionUnavailable as error:
                logger.info("attention: sdpa on all cards, as one of them has no %s: %s", chosen.name, error)
                return select_attention(SAFE_ATTENTION, AttentionSpec(self.settings.device, dtype, head_dim))
        return chosen

    @property
    def _may_time(self) -> bool:
        return self.settings.device.type == "cuda"

    @property
    def _sparse_settings(self) -> SparseSettings | None:
        watch = self.model.execution.watch
        return None if watch is None else watch.settings

    def check_sparse(self, settings: SparseSettings) -> None:
        """AttentionUnavailable (a ValueError), with what is missing, where sparse attention cannot run here."""
        if settings.bound != 0:
            select_sparse(AttentionSpec(self.settings.device, self.model.execution.dtype, self.config.head_dim))
        for other in self._others:
            other.check_sparse(settings)

    def use_sparse(self, settings: SparseSettings | None, leader: AttentionRun | None = None) -> None:
        """Leave out of self-attention what these settings say; None, or a bound of 0: nothing.

        AttentionUnavailable (a ValueError) where sparse attention cannot run here, with what is missing. What is
        inexact is compared with dense attention in every run, but for code that is compiled in one piece. Several cards
        do as the first one's `leader` says, which learns for all; what is inexact alone is compared on one card only.
        """
        execution, device = self.model.execution, self.settings.device
        if settings is not None and settings.bound == 0:
            settings = None
        self.stop()
        watch, alone = None, self._alone
        watches = not execution.attention.exact and not self._compiled and alone
        if settings is not None or watches:
            spec = AttentionSpec(device, execution.dtype, self.config.head_dim)
            kernel = None if settings is None else select_sparse(spec)
            watch = AttentionRun(
                execution.attention, len(self.blocks), self.config.num_heads, kernel, settings, leader, not alone
            )
            if self._step is not None:  # attention is chosen for a run whose first step has begun
                watch.begin_step(*self._step)
        self.model.execution = replace(execution, watch=watch)
        for other in self._others:
            other.use_sparse(settings, watch)

    # The safe path

    @property
    def _safe_dtype(self) -> torch.dtype:
        dtype = self.model.execution.dtype
        if dtype != torch.float16:
            return dtype
        return torch.bfloat16 if half_dtype(self.settings.device) == torch.bfloat16 else torch.float32

    @property
    def on_safe_path(self) -> bool:
        """Whether it computes with PyTorch's attention, and not in fp16."""
        execution = self.model.execution
        exact = execution.attention.name == SAFE_ATTENTION and not execution.is_sparse
        return exact and self._safe_dtype == execution.dtype

    def take_safe_path(self) -> bool:
        """Compute with PyTorch's attention, and in bf16 or fp32 where it was fp16, from the next start on.

        False where it does so already.
        """
        if self.on_safe_path:
            return False
        execution, device, dtype = self.model.execution, self.settings.device, self._safe_dtype
        self.stop()
        attention = select_attention(SAFE_ATTENTION, AttentionSpec(device, dtype, self.config.head_dim))
        self._before_safe_path = execution.dtype, execution.attention, execution.watch
        self.model.execution = replace(execution, dtype=dtype, attention=attention, watch=None)
        return True

    def leave_safe_path(self) -> None:
        """Compute as before `take_safe_path`, from the next start on; nothing where it was not taken."""
        before, self._before_safe_path = self._before_safe_path, None
        if before is not None:
            self.stop()
            self.model.execution = replace(self.model.execution, dtype=before[0], attention=before[1], watch=before[2])

    def likely_cause(self, more: str = "") -> str:
        """Words on why its latents are no numbers, the likeliest first; `more` is one of whoever asks."""
        execution, loras = self.model.execution, self.weights.loras.loras
        causes = [more] if more else []
        causes += [f"a LoRA ({lora.checkpoint.path.name}) or its strength" for lora in loras[:1]]
        if execution.dtype == torch.float16:
            causes.append(FP16_ENDS)
        if execution.attention.name != SAFE_ATTENTION:
            causes.append(f"the attention backend {execution.attention.name}")
        if execution.is_sparse:
            causes.append("sparse attention")
        return " or ".join([*causes, f"damaged weights in {self.checkpoint.path.name} (download it again)"])

    # A run

    @property
    def arithmetic(self) -> dict[str, str]:
        """What a result depends on beside the weights: a run that goes on must compute as before."""
        execution, device = self.model.execution, self.settings.device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(execution.dtype),
            "quantization": self.quantization,
            "products": describe_products(self.costs.busy_layers),
            "attention": execution.attention.name,
            "elementwise": execution.ops.name,
            "loras": self.settings.lora_mode,
            "batched_guidance": str(self.settings.batched_guidance),
            "compiled": str(self._compiled),
            "torch": str(torch.__version__),
            **self._sparse_arithmetic,
            **({} if self.step_cache is None else {"step_cache": str(self.step_cache)}),
        }

    @property
    def _sparse_arithmetic(self) -> dict[str, str]:
        watch = self.model.execution.watch
        if watch is None or watch.sparse is None:
            return {}
        return {"sparse": f"{watch.sparse.name}, {watch.settings}"}

    def begin_steps(self) -> None:
        """A run begins: no step of the last one is reused, nor what was learnt of it."""
        self._step = None
        if (watch := self.model.execution.watch) is not None:
            watch.begin_run()
        if self.step_cache is not None:
            self.step_cache.begin_run()

    def end_steps(self) -> None:
        """The run is over, or given up: nothing of its steps is kept."""
        if self.step_cache is not None:
            self.step_cache.forget_residuals()

    def at_step(self, step: int, num_steps: int, call: int | None = None) -> None:
        """The passes that follow are of this step of a run's; what attention leaves out depends on it.

        `call` is as `AttentionRun.begin_step` has it.
        """
        self._step = step, num_steps, call
        watch = self.model.execution.watch
        if watch is not None:
            watch.begin_step(step, num_steps, call)

    def at_moment(self, moment: Moment) -> None:
        """The passes that follow are here in the schedule."""
        if self.step_cache is not None:
            self.step_cache.at(moment)

    def learnt(self) -> list[Tensor]:
        """What a run that goes on from here must know: what sparse attention learnt so far, and what a step cache
        decided since this was last asked; `num_learnt` tensors."""
        watch = self.model.execution.watch
        state = None if watch is None else watch.state()
        learnt = [] if state is None else [state]
        return learnt if self.step_cache is None else [*learnt, self.step_cache.decisions()]

    @property
    def num_learnt(self) -> int:
        watch = self.model.execution.watch
        return int(watch is not None and watch.settings is not None) + int(self.step_cache is not None)

    def learn(self, states: Sequence[Tensor]) -> None:
        """Go on with what sparse attention had learnt, by `learnt`."""
        watch = self.model.execution.watch
        if watch is not None and watch.settings is not None:
            watch.restore(states[0])
