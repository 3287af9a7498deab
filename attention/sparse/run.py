"""Self-attention of one model's runs: which layers are sparse, and how far each is from the dense answer.

What a call of the model measured of a layer is read when the next call comes to that layer: most of a pass lies between
the two, so that the device has work while the host waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ...system.torch_compiler import outside_graphs
from ..backend import AttentionWorkspace, Backend, SparseBackend
from .learning import Learning
from .order import TokenOrder, reorder_
from .readings import LayerReading, PassReadings
from .samples import LayerSamples, Samples, compare
from .settings import SparseSettings

# So many times a pass tells what it measured: a few, as some cards have one engine for copies both ways.
SENDS = 4
# What a dense layer of an ordered pass has for each element of k: keys and values as they were before.
IN_PLACE = 2.0 + 2.0
# Several cards' queries, keys and values come in the order that tokens elsewhere are in, and the result goes back: for
# each element of q, and of k.
GATHERED = (2.0 + 2.0, 2.0 + 2.0)


@dataclass(frozen=True)
class Decision:
    """What a pass does, and what is looked at of it.

    `call` is that of the model which the pass is of, `place` its place among the passes of that. `ask` says what a
    layer leaves out, (tau, top-k) or None for nothing: the same to all passes of a call, whenever they ask.
    """

    step: int
    call: int
    place: int
    sparse: bool
    ask: Callable[[int], tuple[float, float] | None]

    @property
    def seed(self) -> int:
        return (self.step * 64 + self.place) * 8191

    def chosen(self, layer: int) -> tuple[float, float] | None:
        """What a layer leaves out of this pass. It is known when the device is done with it in the call before."""
        found = self.ask(layer)
        return found if self.sparse else None


class Together(Protocol):
    """What cards that share a pass have of it: each some heads of all tokens, which stay in their places."""

    @property
    def heads(self) -> slice: ...
    @property
    def is_first(self) -> bool: ...
    def agree(self, decide: Callable[[], Decision | None]) -> Decision | None:
        """What the first of the cards decides."""
        ...

    def total(self, own: Tensor) -> Tensor:
        """The sum of all cards' tensors."""
        ...


@dataclass(frozen=True)
class LargerOf:
    """The workspace of calls that come one after the other."""

    parts: tuple[AttentionWorkspace, ...]

    def nbytes(self, rows: int, keys: int, heads: int, head_dim: int, length: int = 0) -> int:
        return max(part.nbytes(rows, keys, heads, head_dim, length) for part in self.parts)


class AttentionRun:
    """The runs of a model, one after the other, by its own `dense` attention and a sparse one.

    On several cards each has its own; `leader` is the first one's, which decides and learns for all.
    """

    def __init__(
        self,
        dense: Backend,
        num_layers: int,
        num_heads: int,
        sparse: SparseBackend | None = None,
        settings: SparseSettings | None = None,
        leader: AttentionRun | None = None,
        on_cards: bool = False,
    ) -> None:
        assert (sparse is None) == (settings is None)
        self._leader, self._on_cards, self._lock = leader, on_cards, threading.Lock()
        self.dense, self.sparse, self.settings = dense, sparse, settings
        self.num_layers, self.num_heads = num_layers, num_heads
        self._step, self._num_steps, self._passes = 0, 0, 0
        self._call, self._call_told = 0, (-1, -1)  # the model's calls, one after the other, and what was told of it
        self._learning = Learning(settings, num_layers)
        self._orders: dict[Hashable, TokenOrder] = {}

    @property
    def workspace(self) -> AttentionWorkspace | LargerOf:
        """Of any of its calls."""
        own = self.dense.workspace
        if self.sparse is None:
            return own
        parts = (own.beside(0.0, IN_PLACE), self.sparse.workspace)
        return LargerOf(tuple(part.beside(*GATHERED) for part in parts) if self._on_cards else parts)

    @property
    def watches(self) -> bool:
        """Whether anything is compared with dense attention."""
        return not self.dense.exact or (self.settings is not None and bool(self.settings.bound))

    # The run around it

    def begin_run(self) -> None:
        """A run begins, at whatever step: nothing is known of it yet but what it is told to go on with (`restore`)."""
        self.collect()
        self._learning.begin_run()
        self._step, self._num_steps, self._passes = 0, 0, 0

    def begin_step(self, step: int, num_steps: int, call: int | None = None) -> None:
        """What follows is of this step of so many; an earlier one than before, or of other steps, begins a run.

        With `call` it does not: samplers such as Heun's call the model more than once a step, and some go back. It
        numbers their calls: what one of them measured the next one knows.
        """
        is_other = (step, num_steps) != (self._step, self._num_steps)
        if call is None and self._num_steps and is_other and (step < self._step or num_steps != self._num_steps):
            self.begin_run()
        told = (step, -1) if call is None else (step, call)
        if told != self._call_told or is_other:
            self._begin_call(told)
        self._step, self._num_steps = step, num_steps

    def _begin_call(self, told: tuple[int, int]) -> None:
        self._call, self._call_told, self._passes = self._call + 1, told, 0

    def begin_pass(
        self, tokens: int, device: torch.device, together: Together | None = None, sample: int | None = None
    ) -> AttentionPass | None:
        """The attention of a pass over so many tokens of each sample; None where it is the model's own alone.

        `sample` is the first of a batch that cards share, where others make passes of other samples at the same time.
        """
        leader = self._leader or self
        if together is not None and self.settings is None:  # of before the cards came: the others have none
            return None

        def decide() -> Decision | None:
            return leader.decide(tokens, sample)

        decision = decide() if together is None else together.agree(decide)
        return None if decision is None else AttentionPass(self, device, decision, together)

    def decide(self, tokens: int, sample: int | None = None) -> Decision | None:
        """What the next pass does; None where nothing is left out or looked at."""
        with self._lock:
            if not self._num_steps and not sample:  # nobody tells of steps: each pass learns from those before
                self._call += 1
            sparse = self._is_sparse(tokens)
            if not sparse and not self.watches and self.settings is None:
                return None
            self._passes += sample is None
            place = self._passes if sample is None else 1 + sample
            return Decision(self._step, self._call, place, sparse, partial(self._chosen_at, self._call))

    def _chosen_at(self, call: int, layer: int) -> tuple[float, float] | None:
        """`chosen` of a call, by what all calls before it measured of the layer."""
        with self._lock:
            self._learning.read((layer,), call)
            return self.chosen(layer)

    def order_of(self, key: Hashable, device: torch.device, make: Callable[[], TokenOrder]) -> TokenOrder:
        """The order of this key on a device, made once."""
        found = self._orders.get((key, device))
        if found is None:
            self._orders = {(key, device): (found := make().to(device))}
        return found

    def collect(self) -> None:
        """Read all that was measured, and learn from it."""
        with self._lock:
            self._learning.read(range(self.num_layers), self._call + 1)

    def readings(self) -> tuple[LayerReading, ...]:
        """What was measured since it was last forgotten, by step and layer."""
        self.collect()
        return self._learning.readings()

    def forget_readings(self) -> None:
        """Another run is reported from here on."""
        self._learning.forget_readings()

    def state(self) -> Tensor | None:
        """What was learnt so far, for a run that goes on later; None where there is nothing to learn.

        `[1 + passes, layers, 6]`, fp64: `Bound.state`, and `PassReadings.unlearnt` of those that are still
        to be learnt, in their order. It is on the device where that may still have to make it: nobody waits.
        """
        if self.settings is None:
            return None
        if self._on_cards:  # each measured some
            self.collect()
        return self._learning.state(self._call)

    def restore(self, state: Tensor) -> None:
        """Go on with what a run had learnt, and nothing that was measured here before."""
        self.collect()
        self._learning.restore(state)

    # What a pass asks

    def chosen(self, layer: int) -> tuple[float, float] | None:
        """(tau, top-k) of a layer in a sparse pass, None where it is exact."""
        bound = self._learning.bound
        return bound.chosen(layer) if bound is not None and self._may_be_sparse(layer) else None

    def _may_be_sparse(self, layer: int) -> bool:
        """In this call or a later one."""
        bound = self._learning.bound
        if self.settings is None or bound is None or layer < self.settings.dense_layers:
            return False
        return not bound.layers[layer].dense

    def add(self, done: PassReadings) -> None:
        """A pass is over, and all its layers are sent."""
        keeper = self._leader or self
        with keeper._lock:  # other cards' passes of other samples end, and begin, at the same time
            keeper._learning.add(done)

    def _is_sparse(self, tokens: int) -> bool:
        settings = self.settings
        if settings is None or tokens < settings.min_tokens:
            return False
        if self._num_steps and 100 * self._step < settings.dense_percent * self._num_steps:
            return False
        # not `chosen`, which of the call before may know nothing yet
        return any(self._may_be_sparse(layer) for layer in range(self.num_layers))


class AttentionPass:
    """Self-attention of one pass, whose layers say that they begin."""

    def __init__(
        self, run: AttentionRun, device: torch.device, decision: Decision, together: Together | None = None
    ) -> None:
        self.run, self.decision, self.together = run, decision, together
        self.order: TokenOrder | None = None
        self.orders = True  # whether tokens are brought in their order: not where somebody is shown them
        self.ordered = False  # whether they are in it
        self.layer = 0
        self._heads = slice(0, run.num_heads) if together is None else together.heads
        self._chosen: tuple[float, float] | None = None  # of the layer
        self._num_sent = 0  # layers
        self._readings = PassReadings(decision.step, run.num_layers, device, decision.place, decision.call)
        self._samples = LayerSamples(Samples(device, decision.seed), run.num_heads) if run.watches else None
        self._heads_left = 0  # of the layer, to be looked at
        # no decorator: it would bring torch's compiler, 150 MB of RAM, to whoever imports this
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = outside_graphs(self.attend_now)

    @property
    def sparse(self) -> bool:
        return self.decision.sparse

    @property
    def reorders(self) -> bool:
        return self.sparse and self.orders and self.together is None

    def begin_layer(self, layer: int, tokens: Sequence[Tensor], spare: Tensor) -> None:
        """The next layer has its turn. Before the first that may be sparse, all `tokens [B * L, ...]` come in order.

        They do so in place, through the bytes of `spare`, which nobody needs meanwhile; cards that share a pass order
        what they attend instead.
        """
        if self.together is None and layer - self._num_sent >= self.run.num_layers / SENDS:
            self._send(layer)
        self.layer, self._heads_left = layer, self._heads.stop - self._heads.start
        told = self.decision.ask(layer)  # known when the device is done with the layer in the call before
        self._chosen = told if self.sparse else None
        self._readings.told_exact[layer] = told is None
        if self._samples is not None:
            self._samples.begin_layer(self._heads.start)
        waits = self.reorders and not self.ordered
        if waits and self.order is not None and self._chosen is not None:
            for each in tokens:
                reorder_(each, self.order.index, spare)
            self.ordered = True

    def end(self, tokens: Tensor, spare: Tensor) -> None:
        """All layers are done: the tokens come back to their places."""
        if self.ordered and self.order is not None:
            reorder_(tokens, self.order.inverse, spare)
        if self.together is not None:
            self._readings.together(self.together.total)
            if not self.together.is_first:
                return
        self._send(self.run.num_layers)
        self.run.add(self._readings)

    def _send(self, layer: int) -> None:
        """What was measured of the layers before this one goes to the host."""
        self._readings.send(range(self._num_sent, layer))
        self._num_sent = layer

    def attend_now(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Backend.attend`, of some heads of the layer."""
        run, order = self.run, self.order
        chosen = self._chosen if q.shape[1] == k.shape[1] else None
        blocks, back = None, None
        with self._readings.time(self.layer, chosen is not None):
            if chosen is not None and run.sparse is not None and order is not None:
                blocks = order.choice(*chosen, k.shape[1])
                if self.together is not None and self.orders:
                    # rows that are left out are text, which is in its place
                    places, back = order.index[: k.shape[1]], order.inverse[: k.shape[1]]
                    q, k, v = (each.index_select(1, places) for each in (q, k, v))
                out = run.sparse.attend(q, k, v, blocks)
            elif self.ordered and order is not None:  # bit for bit as if tokens were never ordered
                places = order.inverse[: k.shape[1]]
                out = run.dense.attend(q, k.index_select(1, places), v.index_select(1, places))
            else:
                out = run.dense.attend(q, k, v)
        inexact = blocks is not None or not (run.dense.exact or run.dense.workspace.spares(k.shape[1]))
        if self._samples is not None and inexact and self._heads_left > 0:
            self._heads_left -= q.shape[2]  # every head once, not for all rows that are attended by themselves
            one = self.layer % q.shape[0]
            self._readings.add(self.layer, compare(q[one], k[one], v[one], out[one], self._samples, blocks))
        return out if back is None else out.index_select(1, back)
