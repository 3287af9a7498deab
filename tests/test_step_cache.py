"""TeaCache against FramePack's rule written out; resets, retries, and what it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.sampling.caching.framepack import FRAMEPACK_POLYNOMIAL, TeaCache
from lowvram_video.sampling.caching.rules import relative_l1
from torch import Tensor


def signals(count: int, seed: int = 0, step: float = 0.05, rows: int = 6) -> list[Tensor]:
    """A signal that wanders by about `step` of its size at every step."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(rows, 4, generator=generator)
    found = []
    for _ in range(count):
        signal = signal + step * torch.rand(1, generator=generator) * torch.randn(rows, 4, generator=generator)
        found.append(signal.clone())
    return found


def framepacks_choice(inputs: list[Tensor], threshold: float) -> list[bool]:
    """Which steps FramePack reuses: `HunyuanVideoTransformer3DModelPacked.forward`, in float64."""
    polynomial = np.poly1d([7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02])
    accumulated, reused = 0.0, []
    for index, signal in enumerate(inputs):
        if index in (0, len(inputs) - 1):
            accumulated, compute = 0.0, True
        else:
            previous = inputs[index - 1].double()
            accumulated += polynomial(float((signal.double() - previous).abs().mean() / previous.abs().mean()))
            compute = accumulated >= threshold
            accumulated = 0.0 if compute else accumulated
        reused.append(not compute)
    return reused


def run(cache: TeaCache, inputs: list[Tensor], first: int = 0) -> list[bool]:
    reused = []
    for index, signal in enumerate(inputs, first):
        cache.begin_step(index)
        reused.append(cache.reuse(signal))
        if reused[-1]:
            assert cache.residual is not None
        else:
            cache.residual = torch.full((2, 4), float(index))
    return reused


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    step=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    threshold=st.sampled_from([0.0, 0.1, 0.15, 0.33, 1.0]),
)
def test_chooses_as_framepack(count: int, seed: int, step: float, threshold: float) -> None:
    inputs = signals(count, seed, step)
    cache = TeaCache(count, threshold)
    reused = run(cache, inputs)
    assert reused == framepacks_choice(inputs, threshold)
    assert not reused[0] and not reused[-1]
    if threshold == 0.0:
        assert not any(reused)


def test_the_usual_threshold_reuses_about_half() -> None:
    reused = run(TeaCache(25), signals(25))
    print(f"reused {sum(reused)} of 25 steps")
    assert 8 <= sum(reused) <= 20


def test_the_residual_is_of_the_last_computed_step() -> None:
    inputs = signals(25)
    cache, last = TeaCache(25), -1.0
    for index, signal in enumerate(inputs):
        cache.begin_step(index)
        if cache.reuse(signal):
            assert float(cache.residual[0, 0]) == last
        else:
            cache.residual = torch.full((2, 4), float(index))
            last = float(index)


def test_a_section_begins_afresh() -> None:
    first, second = signals(12, 1), signals(12, 2)
    cache = TeaCache(12)
    run(cache, first)
    cache.begin_section()
    assert cache.residual is None
    assert run(cache, second) == framepacks_choice(second, 0.15)
    cache.begin_section()
    run(cache, first[:5])  # interrupted, then another section with more rows
    cache.begin_section()
    longer = signals(12, 3, rows=9)
    assert run(cache, longer) == framepacks_choice(longer, 0.15)


def test_two_objects_share_nothing() -> None:
    """cond and uncond in turn choose as each would alone."""
    cond_inputs, uncond_inputs = signals(20, 4, 0.02), signals(20, 5, 0.3)
    cond, uncond = TeaCache(20), TeaCache(20)
    pairs = zip(cond_inputs, uncond_inputs, strict=True)
    chosen = [(run(cond, [a], step)[0], run(uncond, [b], step)[0]) for step, (a, b) in enumerate(pairs)]
    assert [a for a, _ in chosen] == framepacks_choice(cond_inputs, 0.15)
    assert [b for _, b in chosen] == framepacks_choice(uncond_inputs, 0.15)
    assert cond.residual is not uncond.residual


def test_the_model_may_overwrite_its_signal() -> None:
    inputs = signals(15)
    cache, buffer, reused = TeaCache(15), torch.empty(6, 4), []
    for index, signal in enumerate(inputs):
        cache.begin_step(index)
        buffer.copy_(signal)
        reused.append(cache.reuse(buffer))
        buffer.fill_(float("nan"))
        if not reused[-1]:
            cache.residual = torch.zeros(2, 4)
    assert reused == framepacks_choice(inputs, 0.15)


def test_a_failed_pass_is_run_again() -> None:
    inputs = signals(10)
    cache = TeaCache(10)
    cache.begin_step(0)
    assert not cache.reuse(inputs[0])  # out of memory before the residual came
    assert not cache.reuse(inputs[0])
    cache.residual = torch.zeros(2, 4)
    rest = run(cache, inputs[1:], 1)
    assert [False, *rest] == framepacks_choice(inputs, 0.15)


@pytest.mark.parametrize("repeated", range(20))
@pytest.mark.parametrize("before_it_ends", [True, False], ids=["by its model", "by its solver"])
def test_a_repeated_step_counts_once(repeated: int, before_it_ends: bool) -> None:
    """A pass fails behind its blocks and is run again, with or without the solver's knowing."""
    inputs = signals(20, 4)
    cache, reused = TeaCache(20), run(TeaCache(20), inputs)
    assert reused == framepacks_choice(inputs, 0.15)
    chosen = run(cache, inputs[:repeated])
    for again in range(3):
        if not (again and before_it_ends):
            cache.begin_step(repeated)
        assert cache.reuse(inputs[repeated]) == reused[repeated]
        if not reused[repeated]:
            cache.residual = torch.zeros(2, 4)
    rest = run(cache, inputs[repeated + 1 :], repeated + 1)
    assert [*chosen, reused[repeated], *rest] == reused


def test_a_broken_signal_is_computed() -> None:
    cache = TeaCache(5)
    steps = [torch.zeros(6, 4), torch.zeros(6, 4), torch.full((6, 4), float("nan")), torch.ones(6, 4), torch.ones(6, 4)]
    assert not any(run(cache, steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relative_l1_in_chunks(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    previous = torch.randn(5000, 64, generator=generator).to(dtype)
    signal = (previous.float() + 0.01 * torch.randn(5000, 64, generator=generator)).to(dtype)
    exact = float((signal.double() - previous.double()).abs().mean() / previous.double().abs().mean())
    error = abs(relative_l1(signal, previous) - exact) / exact
    print(f"{dtype}: relative error {error:.1e}")
    assert error < 1e-5


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        inputs = signals(10)
        assert run(TeaCache(10), inputs) == framepacks_choice(inputs, 0.15)


def test_polynomial_and_errors() -> None:
    assert FRAMEPACK_POLYNOMIAL == (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
    with pytest.raises(ValueError, match="num_steps is 0"):
        TeaCache(0)
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"threshold is .* expected 0"):
            TeaCache(10, threshold)
