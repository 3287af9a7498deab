"""Noise schedules: published lists, ComfyUI's and diffusers' spacings, the expert boundary, and their properties."""

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.sampling.schedules import (
    SPACINGS,
    add_noise,
    check_sigmas,
    flow_sigmas,
    is_high_noise,
    sigmas_from_timesteps,
)


def comfyui_simple(num_steps: int, shift: float) -> torch.Tensor:
    """ComfyUI 0.33: a table of 1000 shifted sigmas read at int(step * 1000 / steps)."""
    t = torch.arange(1, 1001) / 1000
    table = shift * t / (1 + (shift - 1) * t)
    return torch.tensor([float(table[-(1 + int(x * 1000 / num_steps))]) for x in range(num_steps)] + [0.0])


@settings(deadline=None, max_examples=200)
@given(
    num_steps=st.integers(1, 200),
    shift=st.floats(0.1, 50.0),
    spacing=st.sampled_from(SPACINGS),
)
def test_levels_strictly_decrease_from_the_start_to_zero(num_steps: int, shift: float, spacing: str) -> None:
    sigmas = flow_sigmas(num_steps, shift, spacing)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert bool((sigmas.diff() < 0).all())
    assert sigmas[-1] == 0.0
    assert sigmas[0] == 1.0


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 4, 20, 40])
def test_uniform_is_wans_own_spacing(num_steps: int, shift: float) -> None:
    base = np.linspace(1, 0, num_steps + 1)  # get_sampling_sigmas of Wan 2.2
    expected = torch.tensor(shift * base / (1 + (shift - 1) * base), dtype=torch.float32)
    torch.testing.assert_close(flow_sigmas(num_steps, shift), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_uniform_is_within_a_timestep_of_diffusers_unipc(shift: float) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(30)
    difference = float((flow_sigmas(30, shift) - scheduler.sigmas).abs().max())
    print(f"shift {shift}: largest sigma difference from diffusers {difference:.2e}")
    assert difference < 0.001 * shift  # its unshifted levels end at 0.001; the shift is that steep near 0


@pytest.mark.parametrize("num_steps", [3, 4, 7, 10, 20, 30])
@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_simple_is_comfyuis(num_steps: int, shift: float) -> None:
    expected = comfyui_simple(num_steps, shift)
    torch.testing.assert_close(flow_sigmas(num_steps, shift, "simple"), expected, rtol=1e-6, atol=0.0)


def test_distilled_lists_are_a_schedule() -> None:
    wanted = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
    assert sigmas_from_timesteps([1000, 937.5, 1000 * 5 / 6, 625]).tolist() == pytest.approx(wanted, rel=1e-7)
    assert flow_sigmas(4, 5.0).tolist() == pytest.approx(wanted, rel=1e-7)
    torch.testing.assert_close(
        sigmas_from_timesteps([1000, 937.5, 833.3, 625]), flow_sigmas(4, 5.0), rtol=0.0, atol=1e-4
    )


def num_high_steps(sigmas: torch.Tensor, boundary: float) -> int:
    return sum(is_high_noise(sigma, boundary) for sigma in sigmas[:-1])


# By hand: 12 s / (1 + 11 s) >= 0.875 <=> s >= 7/19 = 0.36842, and s = 1 - i/40 there for i <= 25: 26 steps.
# 5 s / (1 + 4 s) >= 0.9 <=> s >= 9/14 = 0.64286, i <= 14: 15 steps. 4 steps at shift 5: 1, 0.9375 | 0.8333, 0.625.
# shift 1, 10 steps, 0.9: the second level is the boundary itself and still a high-noise one.
@pytest.mark.parametrize(
    ("num_steps", "shift", "boundary", "num_high"),
    [(40, 12.0, 0.875, 26), (40, 5.0, 0.9, 15), (4, 5.0, 0.9, 2), (4, 5.0, 0.5, 4), (10, 1.0, 0.9, 2)],
)
def test_boundary_counts(num_steps: int, shift: float, boundary: float, num_high: int) -> None:
    assert num_high_steps(flow_sigmas(num_steps, shift), boundary) == num_high


def test_a_run_can_lie_wholly_in_the_low_expert() -> None:
    assert num_high_steps(flow_sigmas(40, 5.0)[20:], 0.875) == 0


def test_add_noise_runs_from_clean_to_noise() -> None:
    clean, noise = torch.full((2,), 3.0), torch.full((2,), -1.0)
    assert torch.equal(add_noise(clean, noise, 0.0), clean)
    assert torch.equal(add_noise(clean, noise, 1.0), noise)
    assert torch.equal(add_noise(clean, noise, 0.25), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow_sigmas(0, 5.0), "num_steps is 0"),
        (lambda: flow_sigmas(4, 0.0), "shift is 0.0"),
        (lambda: flow_sigmas(4, float("nan")), "shift is nan"),
        (lambda: flow_sigmas(4, 5.0, "karras"), "'karras'; expected one of uniform, simple"),
        (lambda: flow_sigmas(1200, 5.0), "num_steps is 1200"),
        (lambda: flow_sigmas(500, 1e7), "milder shift"),
        (lambda: sigmas_from_timesteps([]), "empty"),
        (lambda: sigmas_from_timesteps([1.0, 0.75, 0.5]), "look like sigmas"),
        (lambda: sigmas_from_timesteps([1001, 500]), "1001"),
        (lambda: sigmas_from_timesteps([1000, 500, 0]), "final 0 is added"),
        (lambda: sigmas_from_timesteps([500, 750]), r"sigmas\[0\] = 0.5 is followed by 0.75"),
        (lambda: num_high_steps(flow_sigmas(4, 5.0), 875), "boundary is 875"),
        (lambda: is_high_noise(torch.tensor(0.5), 0.0), "boundary is 0.0"),
        (lambda: check_sigmas(torch.tensor([1.0])), r"\[1\]"),
        (lambda: check_sigmas(torch.tensor([1, 0])), "int64"),
        (lambda: check_sigmas(torch.tensor([14.6, 0.0])), "14.6"),
        (lambda: check_sigmas(torch.tensor([1.0, float("nan"), 0.0])), "nan"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
