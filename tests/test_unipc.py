"""UniPC bh1 and bh2 against the published algorithm written out, quadrature, and FramePack's own figures."""

import itertools
import math

import numpy as np
import pytest
import torch
from lowvram_video.sampling.guidance import RescaledGuidance, rescale_to_cond
from lowvram_video.sampling.samplers import SAMPLERS
from lowvram_video.sampling.schedules import flow_sigmas, framepack_shift, framepack_sigmas
from lowvram_video.sampling.solver import StepInfo
from lowvram_video.sampling.unipc import sample_unipc_bh1, sample_unipc_bh2
from torch import Tensor

BOTH = ("unipc_bh1", "unipc_bh2")


def toy_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * torch.tanh(x) + 0.1 * float(sigma)


def toy_start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 2, 8, dtype=dtype)


def test_framepacks_toy_values() -> None:
    expected = [-0.365221, -0.302477, -0.195845, -0.029123, 0.168570, 0.324342, 0.420246, 0.475767]
    actual = sample_unipc_bh1(toy_denoise, toy_start(), framepack_sigmas(8, math.log(7)))
    error = float((actual - torch.tensor(expected)).abs().max())
    longer = sample_unipc_bh1(toy_denoise, toy_start(), framepack_sigmas(25, math.log(7)))
    print(f"toy values: largest difference {error:.1e}; 25 steps {abs(float(longer[0]) + 0.283328):.1e}")
    assert error < 1e-6
    assert abs(float(longer[0]) + 0.283328) < 1e-6


def phi(k: int, z: float) -> float:
    """phi_k of exponential integrators by its integral, phi_0 = exp."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u = (nodes + 1) / 2
    return float(np.sum(weights / 2 * np.exp((1 - u) * z) * u ** (k - 1)) / math.factorial(k - 1))


def published_step(
    x: Tensor, levels: list[float], known: list[Tensor], end: float, new: Tensor | None, variant: str
) -> Tensor:
    """One UniP (new None) or UniC step as in the paper, R a = b in NumPy; lambda = -log(sigma), alpha = 1."""
    begin = levels[-1]
    h = math.log(begin / end)
    b_of_h = h if variant == "unipc_bh1" else 1 - math.exp(-h)
    ratios = [math.log(begin / level) / h for level in reversed(levels[:-1])]
    differences = [denoised - known[-1] for denoised in reversed(known[:-1])]
    if new is not None:
        ratios, differences = [*ratios, 1.0], [*differences, new - known[-1]]
    count = len(ratios)
    if count == 1:
        a = np.array([0.5])
    elif count:
        r = np.array([[ratio**power for ratio in ratios] for power in range(count)])
        b = np.array([math.factorial(k) * h * phi(k + 1, -h) / b_of_h for k in range(1, count + 1)])
        a = np.linalg.solve(r, b)
    result = math.exp(-h) * x + (1 - math.exp(-h)) * known[-1]
    for m in range(count):
        result = result + b_of_h * float(a[m]) * differences[m] / ratios[m]
    return result


def published(denoise, x: Tensor, sigmas: list[float], variant: str) -> Tensor:
    """Zhao et al. 2023, algorithms 5 to 8 for a multistep run to sigma 0; returns the last denoised latent."""
    num_steps = len(sigmas) - 1
    order = min(3, num_steps - 1)
    known = [denoise(x, torch.tensor(sigmas[0]))]
    for i in range(1, num_steps):
        p = min(i, order)
        before, window = sigmas[i - p : i], known[i - p : i]
        predicted = published_step(x, before, window, sigmas[i], None, variant)
        new = denoise(predicted, torch.tensor(sigmas[i]))
        x = published_step(x, before, window, sigmas[i], new, variant)
        known.append(new)
    return known[-1]


def bent_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    s = float(sigma)
    return torch.tanh((0.7 * x + 0.4 * x.roll(1)) * (1.5 - s)) + 0.3 * torch.sin(3 * x + 2 * s)


@pytest.mark.parametrize("name", BOTH)
def test_equals_the_published_algorithm(name: str) -> None:
    worst = 0.0
    for num_steps, shift in itertools.product((2, 3, 4, 5, 8, 25), (1.0, 3.0, 7.0)):
        sigmas = framepack_sigmas(num_steps, math.log(shift)).double()
        expected = published(bent_denoise, toy_start(torch.float64), sigmas.tolist(), name)
        actual = SAMPLERS[name](bent_denoise, toy_start(torch.float64), sigmas)
        worst = max(worst, float((actual - expected).abs().max()))
    print(f"{name}: largest difference to the published algorithm {worst:.1e}")
    assert worst < 1e-10


def test_bh1_and_bh2_differ_and_so_does_wans() -> None:
    sigmas = framepack_sigmas(6, math.log(7))
    results = [SAMPLERS[name](bent_denoise, toy_start(torch.float64), sigmas) for name in (*BOTH, "unipc")]
    for one, other in itertools.combinations(results, 2):
        assert float((one - other).abs().max()) > 1e-6


# Data N(MEAN, STD^2): the exact denoiser, and trajectories along which (x - mean) / std stays constant.
MEAN, STD = 0.7, 0.4


def variance(sigma: float) -> float:
    return (1 - sigma) ** 2 * STD**2 + sigma**2


def gaussian_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    s = float(sigma)
    return MEAN + (1 - s) * STD**2 / variance(s) * (x - (1 - s) * MEAN)


def gaussian_error(name: str, num_steps: int) -> float:
    sigmas = torch.linspace(0.95, 0.1, num_steps + 1, dtype=torch.float64)
    x = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    scale = math.sqrt(variance(0.1) / variance(0.95))
    exact = 0.9 * MEAN + scale * (x - 0.05 * MEAN)
    return float((SAMPLERS[name](gaussian_denoise, x, sigmas) - exact).abs().max())


@pytest.mark.parametrize("name", BOTH)
def test_fourth_order_in_a_run_that_ends_above_zero(name: str) -> None:
    # The paper's theorem 3.1: three known levels predict with order 3, and the correction raises that by one.
    errors = [gaussian_error(name, num_steps) for num_steps in (64, 128, 256)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    print(f"{name}: errors {[f'{error:.1e}' for error in errors]}, measured order {orders[-1]:.2f}")
    assert 3.7 < orders[-1] < 4.3


@pytest.mark.parametrize("name", BOTH)
def test_one_evaluation_a_step_and_the_last_is_the_result(name: str) -> None:
    for num_steps in (1, 2, 3, 9):
        evaluated: list[float] = []
        seen: list[StepInfo] = []

        def denoise(x: Tensor, sigma: Tensor, evaluated: list[float] = evaluated) -> Tensor:
            evaluated.append(float(sigma))
            return bent_denoise(x, sigma)

        sigmas = framepack_sigmas(num_steps, 1.0)
        result = SAMPLERS[name](denoise, toy_start(), sigmas, seen.append)
        assert evaluated == sigmas.tolist()[:-1]
        assert torch.equal(result, seen[-1].denoised)
        assert torch.equal(result, seen[-1].x)
        assert [info.index for info in seen] == list(range(num_steps))


@pytest.mark.parametrize("name", BOTH)
def test_very_fine_and_very_coarse_runs(name: str) -> None:
    """Short steps cancel in the usual recursions of phi; long ones in their series."""
    error = gaussian_error(name, 2000)
    print(f"{name}: error {error:.1e} with 2000 steps")
    assert error < 1e-8
    coarse = torch.tensor([1.0, 0.5, 1e-3, 1e-6, 1e-20, 0.0], dtype=torch.float64)
    assert SAMPLERS[name](bent_denoise, toy_start(), coarse).isfinite().all()


def test_framepacks_sigmas() -> None:
    sigmas = framepack_sigmas(25, math.log(7))
    for index, expected in {0: 1, 1: 0.994083, 2: 0.987730, 22: 0.488372, 23: 0.378378, 24: 0.225806, 25: 0}.items():
        assert float(sigmas[index]) == pytest.approx(expected, abs=1e-6)
    t = torch.linspace(1, 0, 31)
    for mu in (0.0, 0.5, 1.3, math.log(7), math.log(15)):
        theirs = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
        torch.testing.assert_close(framepack_sigmas(30, mu), theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(framepack_sigmas(12, math.log(5)), flow_sigmas(12, math.exp(math.log(5))))


def test_framepacks_shift() -> None:
    assert framepack_shift(256) == pytest.approx(0.5)
    assert framepack_shift(4096) == pytest.approx(1.15)
    assert framepack_shift(2176) == pytest.approx(0.825)
    assert framepack_shift(9 * 38 * 40) == math.log(7)  # 640x608: the cap
    assert framepack_shift(1) == pytest.approx(0.5 - 255 * 0.65 / 3840)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        framepack_shift(0)


def test_strength_starts_the_run_part_way() -> None:
    full = framepack_sigmas(10, 1.5)
    assert torch.equal(framepack_sigmas(10, 1.5, 1.0), full)
    for strength in (1e-6, 0.1, 0.5, 0.999):
        sigmas = framepack_sigmas(10, 1.5, strength)
        assert len(sigmas) == 11
        assert float(sigmas[0]) == pytest.approx(strength)
        assert bool((sigmas.diff() < 0).all())
        torch.testing.assert_close(sigmas, full * strength)
        for name in BOTH:
            assert SAMPLERS[name](toy_denoise, toy_start(), sigmas).isfinite().all()


@pytest.mark.parametrize("sampler", [sample_unipc_bh1, sample_unipc_bh2])
def test_strength_zero_returns_the_input(sampler) -> None:
    def never(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    sigmas = framepack_sigmas(10, 1.5, 0.0)
    assert sigmas.tolist() == [0.0]
    result = sampler(never, toy_start().bfloat16(), sigmas, never)
    assert result.dtype == torch.float32
    assert torch.equal(result, toy_start().bfloat16().float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: framepack_sigmas(0, 1.0), "num_steps is 0"),
        (lambda: framepack_sigmas(10, float("nan")), r"mu is nan; expected a finite number: ln\(shift\)"),
        (lambda: framepack_sigmas(10, 1.0, 1.2), "strength is 1.2; expected 0"),
        (lambda: framepack_sigmas(10, 1.0, float("nan")), "strength is nan"),
        (lambda: sample_unipc_bh1(toy_denoise, toy_start(), torch.tensor([0.5, 0.5, 0.0])), "strictly decrease"),
        (lambda: RescaledGuidance(toy_denoise, None, 4.0), "scale is 4.0 but there is no uncond"),
        (lambda: RescaledGuidance(toy_denoise, None, math.inf), "scale is inf"),
        (lambda: RescaledGuidance(toy_denoise, toy_denoise, 4.0, 1.5), "rescale is 1.5; expected 0"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_rescale_is_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    generator = torch.Generator().manual_seed(3)
    cond, uncond = (torch.randn(2, 16, 3, 4, 5, generator=generator) for _ in range(2))
    for scale, rescale in itertools.product((1.5, 4.0, 8.0), (0.0, 0.3, 0.7, 1.0)):
        guided = uncond + scale * (cond - uncond)
        expected = rescale_noise_cfg(guided, cond, rescale)
        torch.testing.assert_close(rescale_to_cond(guided, cond, rescale), expected, rtol=1e-5, atol=1e-5)
    whole = rescale_to_cond(guided, cond, 1.0)
    torch.testing.assert_close(whole.std(dim=(1, 2, 3, 4)), cond.std(dim=(1, 2, 3, 4)))
    x, sigma = torch.randn(2, 16, 3, 4, 5, generator=generator), torch.tensor(0.6)
    denoised = RescaledGuidance(lambda *_: cond, lambda *_: uncond, 8.0, 1.0)(x, sigma)
    torch.testing.assert_close(denoised, x - 0.6 * whole)


def test_scale_one_skips_uncond() -> None:
    calls: list[str] = []

    def velocity(name: str, value: float):
        def run(x: Tensor, sigma: Tensor) -> Tensor:
            calls.append(name)
            return torch.full_like(x, value).bfloat16()

        return run

    cond, uncond = velocity("cond", 2.0), velocity("uncond", 1.0)
    sigma, x = torch.tensor(0.5), torch.ones(1, 4)
    denoised = RescaledGuidance(cond, uncond, 1.0, 0.7)(x, sigma)
    assert calls == ["cond"]
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, torch.zeros(1, 4))
    assert torch.equal(RescaledGuidance(cond, uncond, 3.0)(x, sigma), x - 0.5 * (1.0 + 3.0 * (2.0 - 1.0)))
    assert calls == ["cond", "cond", "uncond"]
