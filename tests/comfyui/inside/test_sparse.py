"""Sparse Attention in a real ComfyUI: where in a sampler's run it begins, by what core tells, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_pack.attention.backend import AttentionWorkspace
from lowvram_pack.attention.sdpa import Sdpa
from lowvram_pack.attention.sparse.settings import SparseSettings
from lowvram_pack.compilation.settings import CompileSettings
from lowvram_pack.nodes.sparse import SparseAttention
from lowvram_pack.runtime import attending
from lowvram_pack.sampling.caching import sampler_steps
from tiny_models import empty_latent, ours, prompts, relative_error, sample, save


class Kernel:
    """Leaves nothing out, and counts."""

    name, workspace = "stand-in", AttentionWorkspace()

    def __init__(self) -> None:
        self.calls = 0
        self.taus: list[float] = []

    def attend(self, q: Any, k: Any, v: Any, blocks: Any) -> torch.Tensor:
        self.calls += 1
        self.taus.append(blocks.tau)
        return Sdpa(torch.device("cpu")).attend(q, k, v)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    monkeypatch.setattr(attending, "select_sparse", lambda spec: made)
    yield made


def sparse(model: Any, bound: float = 0.5, percent: float = 0.0) -> Any:
    return SparseAttention.execute(model, "tau", 0.5, bound, percent, 0, 0).result[0]


def calls_of(kernel: Kernel, path: Path, percent: float) -> int:
    kernel.calls = 0
    sample(sparse(ours(path), percent=percent), *prompts(), empty_latent(), cfg=1.0, steps=4)
    return kernel.calls


def test_it_begins_after_its_share_of_the_steps(models: Path, kernel: Kernel) -> None:
    path = save(models, "t2v")
    whole = calls_of(kernel, path, 0)
    assert whole > 0 and whole % 4 == 0
    assert calls_of(kernel, path, 50) == whole // 2
    assert calls_of(kernel, path, 25) == 3 * whole // 4
    assert calls_of(kernel, path, 100) == 0


@pytest.mark.parametrize("sampler, calls", [("euler", 4), ("heun", 7), ("heunpp2", 9)])
def test_each_call_goes_on_from_the_one_before(models: Path, kernel: Kernel, sampler: str, calls: int) -> None:
    """Nothing is left out, so tau rises call by call, also where the sampler goes back to a level."""
    sample(sparse(ours(save(models, "t2v"))), *prompts(), empty_latent(), cfg=1.0, steps=4, sampler_name=sampler)
    layers = len(kernel.taus) // calls
    taus = kernel.taus[::layers]
    assert len(kernel.taus) == layers * calls and taus[:4] == [-1.0, -0.5, 0.0, 0.5]
    assert all(tau == 0.5 for tau in taus[4:])


@pytest.mark.newest
def test_the_device_is_not_asked_where_a_pass_is(models: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first calls, by which the sampler is known, and once for all passes of one."""
    asked: list[float] = []
    step_of = sampler_steps.step_of

    def counted(levels: Any, level: float) -> int:
        asked.append(level)
        return step_of(levels, level)

    monkeypatch.setattr(sampler_steps, "step_of", counted)
    sample(sparse(ours(save(models, "t2v"))), *prompts(), empty_latent(), cfg=3.0, steps=6)
    assert len(asked) == 2


def test_the_result_is_that_of_dense_attention_where_nothing_is_left_out(models: Path, kernel: Kernel) -> None:
    path = save(models, "t2v")
    model = sparse(ours(path))
    got = sample(model, *prompts(), empty_latent(), cfg=1.0)
    want = sample(ours(path), *prompts(), empty_latent(), cfg=1.0)
    assert kernel.calls and relative_error(got, want) < 1e-5
    report = model.engine.report
    assert report is not None and "density" in report.table()


def test_a_bound_of_0_has_the_bits_of_exact_attention(models: Path) -> None:
    path = save(models, "t2v")
    got = sample(sparse(ours(path), bound=0.0), *prompts(), empty_latent(), cfg=1.0)
    assert got.equal(sample(ours(path), *prompts(), empty_latent(), cfg=1.0))


def test_another_model_of_the_loader_stays_dense(models: Path, kernel: Kernel) -> None:
    model = ours(save(models, "t2v"))
    sparse(model)
    sample(model, *prompts(), empty_latent(), cfg=1.0)
    assert not kernel.calls


def test_another_nodes_attention_is_refused_beside_it(models: Path, kernel: Kernel) -> None:
    model = sparse(ours(save(models, "t2v")))
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda original, *a, **n: original(
        *a, **n
    )
    with pytest.raises(ValueError, match="take one of the two nodes out"):
        sample(model, *prompts(), empty_latent(), cfg=1.0)


@pytest.mark.newest
def test_options_that_fail_midway_leave_nothing_of_them_to_the_next_run(models: Path) -> None:
    """Code was made for them, and then there was no sparse attention."""
    plain = ours(save(models, "t2v"))
    want = sample(plain, *prompts(), empty_latent(), cfg=1.0)
    failing = plain.with_options(compile=CompileSettings(backend="eager"), sparse=SparseSettings())
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        sample(failing, *prompts(), empty_latent(), cfg=1.0)
    assert sample(plain, *prompts(), empty_latent(), cfg=1.0).equal(want)
    assert plain.engine.streamed.compiled is None and plain.engine.streamed.model.execution.watch is None


def test_where_it_cannot_run_the_node_says_so(models: Path) -> None:
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        sparse(ours(save(models, "t2v")))
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        SparseAttention.execute(ours(save(models, "t2v")), "top_k", 1.0, -1.0, 25.0, 1, 0)
