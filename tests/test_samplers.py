"""Solvers against diffusers' schedulers on a nonlinear model, and against the closed form of a Gaussian."""

import itertools
import math

import diffusers
import pytest
import torch
from lowvram_video.sampling.samplers import SAMPLERS, select_sampler
from lowvram_video.sampling.schedules import flow_sigmas
from lowvram_video.sampling.solver import Sampler, StepInfo
from torch import Tensor

SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)
STEP_COUNTS = (1, 2, 4, 12, 20)  # 20: at 15 and more DPM++ 2M handles its last steps differently
DETERMINISTIC = ("euler", "unipc", "dpm++_2m")


def toy_velocity(x: Tensor, sigma: float) -> Tensor:
    """Bounded, nonlinear in x and sigma, and mixing neighbours, so that errors cannot hide in symmetry."""
    mixed = 0.6 * x + 0.4 * x.roll(1, dims=-1) - 0.2 * x.roll(1, dims=1)
    return torch.tanh(mixed * (1.5 - sigma)) + 0.3 * torch.sin(3.0 * x + 2.0 * sigma) + 0.5 * sigma * x


def toy_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return x - float(sigma) * toy_velocity(x, float(sigma))


def toy_noise() -> Tensor:
    return torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(7))


def diffusers_scheduler(name: str, shift: float):
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    kind = {"unipc": diffusers.UniPCMultistepScheduler, "dpm++_2m": diffusers.DPMSolverMultistepScheduler}[name]
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero")


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("shift", SHIFTS)
def test_matches_diffusers(name: str, shift: float) -> None:
    errors = {}
    for num_steps in STEP_COUNTS:
        scheduler = diffusers_scheduler(name, shift)
        scheduler.set_timesteps(num_steps)
        scheduler.set_begin_index(0)
        expected = toy_noise()
        for index, timestep in enumerate(scheduler.timesteps):
            velocity = toy_velocity(expected, float(scheduler.sigmas[index]))
            expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
        actual = SAMPLERS[name](toy_denoise, toy_noise(), scheduler.sigmas)
        errors[num_steps] = float((actual - expected).abs().max() / expected.abs().max())
    figures = ", ".join(f"{num_steps} steps {error:.2e}" for num_steps, error in errors.items())
    print(f"{name} shift {shift}: max relative error {figures}")
    assert max(errors.values()) <= 1e-4


def test_second_order_solvers_differ_from_euler() -> None:
    """Guards the comparison above: on this model a wrong order would show."""
    sigmas = flow_sigmas(12, 5.0)
    euler = SAMPLERS["euler"](toy_denoise, toy_noise(), sigmas)
    for name in ("unipc", "dpm++_2m"):
        assert float((SAMPLERS[name](toy_denoise, toy_noise(), sigmas) - euler).abs().max()) > 1e-2


# Data N(MEAN, STD^2) has marginals N((1 - sigma) MEAN, variance(sigma)), the exact denoiser below, and
# probability-flow trajectories along which (x - mean) / std stays constant.
MEAN, STD = 0.7, 0.4


def gaussian_variance(sigma: float) -> float:
    return (1 - sigma) ** 2 * STD**2 + sigma**2


def gaussian_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    s = float(sigma)
    return MEAN + (1 - s) * STD**2 / gaussian_variance(s) * (x - (1 - s) * MEAN)


def gaussian_error(sampler: Sampler, num_steps: int, start: float, end: float) -> float:
    sigmas = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
    x = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    scale = math.sqrt(gaussian_variance(end) / gaussian_variance(start))
    exact = (1 - end) * MEAN + scale * (x - (1 - start) * MEAN)
    return float((sampler(gaussian_denoise, x, sigmas) - exact).abs().max())


@pytest.mark.parametrize(("name", "expected_order"), [("euler", 1.0), ("unipc", 2.0), ("dpm++_2m", 2.0)])
def test_convergence_order(name: str, expected_order: float) -> None:
    # Many steps: UniPC's last one is first order and uncorrected, so with few steps two error terms mix.
    errors = [gaussian_error(SAMPLERS[name], num_steps, 0.95, 0.05) for num_steps in (256, 512, 1024)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    print(f"{name}: errors {[f'{e:.1e}' for e in errors]}, measured order {orders[-1]:.2f}")
    assert all(order > expected_order - 0.1 for order in orders)
    if name == "euler":
        assert orders[-1] < 1.1


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_full_run_reaches_the_exact_sample(name: str) -> None:
    errors = [gaussian_error(SAMPLERS[name], num_steps, 1.0, 0.0) for num_steps in (50, 200)]
    print(f"{name}: from pure noise, error {errors[0]:.1e} with 50 steps, {errors[1]:.1e} with 200")
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 1e-2


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_reported_and_nothing_is_overwritten(name: str) -> None:
    sigmas = flow_sigmas(5, 3.0)
    seen: list[tuple[StepInfo, Tensor, Tensor]] = []
    noise = toy_noise()

    def on_step(info: StepInfo) -> None:
        seen.append((info, info.x.clone(), info.denoised.clone()))

    result = SAMPLERS[name](toy_denoise, noise, sigmas, on_step, torch.Generator().manual_seed(1))
    assert [info.index for info, _, _ in seen] == [0, 1, 2, 3, 4]
    assert {info.num_steps for info, _, _ in seen} == {5}
    assert [info.sigma for info, _, _ in seen] == sigmas.tolist()[:-1]
    assert [info.sigma_next for info, _, _ in seen] == sigmas.tolist()[1:]
    assert all(torch.equal(info.x, x) and torch.equal(info.denoised, d) for info, x, d in seen)
    assert torch.equal(seen[-1][0].x, result)
    assert torch.equal(result, seen[-1][0].denoised)  # the step to sigma 0 lands on the denoised latent
    assert torch.equal(noise, toy_noise())


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_arguments_give_the_same_bits(name: str) -> None:
    runs = [
        SAMPLERS[name](toy_denoise, toy_noise(), flow_sigmas(6, 5.0), None, torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_euler_resumes_exactly_from_a_reported_step() -> None:
    sigmas = flow_sigmas(6, 5.0)
    states: list[Tensor] = []
    whole = SAMPLERS["euler"](toy_denoise, toy_noise(), sigmas, lambda info: states.append(info.x))
    assert torch.equal(SAMPLERS["euler"](toy_denoise, states[2], sigmas[3:]), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_is_float32_for_a_bfloat16_model(name: str) -> None:
    dtypes: list[torch.dtype] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        assert sigma.ndim == 0
        assert sigma.device.type == "cpu"
        return toy_denoise(x, sigma).bfloat16()

    x = SAMPLERS[name](denoise, toy_noise().bfloat16(), flow_sigmas(3, 5.0), None, torch.Generator())
    assert x.dtype == torch.float32
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_run_may_end_above_zero(name: str) -> None:
    for sigmas in (flow_sigmas(40, 12.0)[:27], flow_sigmas(4, 5.0)[:3]):  # the high-noise expert's share
        assert SAMPLERS[name](toy_denoise, toy_noise(), sigmas).isfinite().all()


def test_lcm_renoises_along_the_flow_path() -> None:
    sigmas = flow_sigmas(4, 5.0)
    generator = torch.Generator().manual_seed(11)
    expected = toy_noise()
    for index in range(4):
        clean = toy_denoise(expected, sigmas[index])
        level = float(sigmas[index + 1])
        expected = clean
        if level > 0:
            expected = (1 - level) * clean + level * torch.randn(clean.shape, generator=generator)
    actual = SAMPLERS["lcm"](toy_denoise, toy_noise(), sigmas, None, torch.Generator().manual_seed(11))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    other = SAMPLERS["lcm"](toy_denoise, toy_noise(), sigmas, None, torch.Generator().manual_seed(12))
    assert not torch.allclose(actual, other)


def test_table_and_errors() -> None:
    assert list(SAMPLERS) == ["euler", "unipc", "dpm++_2m", "lcm", "unipc_bh1", "unipc_bh2"]
    assert select_sampler("unipc") is SAMPLERS["unipc"]
    with pytest.raises(ValueError, match=r"'ddim' does not exist; choose one of euler, unipc, dpm\+\+_2m, lcm"):
        select_sampler("ddim")
    with pytest.raises(ValueError, match="manual_seed"):
        SAMPLERS["lcm"](toy_denoise, toy_noise(), flow_sigmas(4, 5.0))
    with pytest.raises(TypeError):
        SAMPLERS["mine"] = SAMPLERS["euler"]  # type: ignore[index]
    for name in DETERMINISTIC:
        with pytest.raises(ValueError, match="strictly decrease"):
            SAMPLERS[name](toy_denoise, toy_noise(), torch.tensor([0.5, 0.5, 0.0]))
