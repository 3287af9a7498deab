"""Classifier-free guidance and the expert switch, driven by a small nonlinear velocity model."""

import pytest
import torch
from lowvram_video.sampling.guidance import (
    ExpertSwitch,
    Guidance,
    classifier_free,
    velocity_to_denoised,
)
from lowvram_video.sampling.samplers import sample_euler, sample_unipc
from lowvram_video.sampling.schedules import flow_sigmas
from torch import Tensor

COND = torch.linspace(-1.0, 1.0, 12).reshape(1, 3, 4)
UNCOND = torch.linspace(0.5, -0.3, 12).reshape(1, 3, 4)


class RecordingVelocity:
    """A velocity model that remembers the batch size, timesteps and contexts it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.calls: list[tuple[int, Tensor, Tensor]] = []

    def __call__(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        assert timestep.shape == (len(latent),)
        assert context.shape == (len(latent), 3, 4)
        self.calls.append((len(latent), timestep, context))
        gain = (context.mean(dim=(1, 2)) + context[:, 0, 0] + timestep / 1000).view(-1, 1, 1)
        return torch.tanh(latent * gain + context[:, 1, :1].unsqueeze(-1)).to(self.dtype)


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 5, generator=torch.Generator().manual_seed(5))


def test_classifier_free_and_velocity_by_hand() -> None:
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert classifier_free(cond, uncond, 5.0).item() == 11.0
    assert classifier_free(cond, uncond, 1.0).item() == 3.0
    assert classifier_free(cond, uncond, 0.0).item() == 1.0
    denoised = velocity_to_denoised(torch.tensor([2.0]), torch.tensor([4.0]).bfloat16(), 0.25)
    assert denoised.item() == 1.0
    assert denoised.dtype == torch.float32


@pytest.mark.parametrize("batched", [True, False])
def test_equals_guiding_the_velocity(batched: bool) -> None:
    velocity, x, sigma = RecordingVelocity(), noise(), torch.tensor(0.8)
    timestep = torch.full((2,), 800.0)
    v_cond = velocity(x, timestep, COND.expand(2, -1, -1))
    v_uncond = velocity(x, timestep, UNCOND.expand(2, -1, -1))
    expected = x - 0.8 * (v_uncond + 5.0 * (v_cond - v_uncond))
    actual = Guidance(velocity, COND, UNCOND, 5.0, batched)(x, sigma)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_batched_equals_in_turn(batch: int) -> None:
    batched, in_turn = RecordingVelocity(), RecordingVelocity()
    sigmas = flow_sigmas(6, 5.0)
    together = sample_unipc(Guidance(batched, COND, UNCOND, 4.0, batched=True), noise(batch), sigmas)
    apart = sample_unipc(Guidance(in_turn, COND, UNCOND, 4.0, batched=False), noise(batch), sigmas)
    error = float((together - apart).abs().max() / apart.abs().max())
    print(f"batch {batch}: batched against in turn, max relative error {error:.2e}")
    assert error <= 1e-5
    assert [size for size, _, _ in batched.calls] == [2 * batch] * 6
    assert [size for size, _, _ in in_turn.calls] == [batch] * 12


@pytest.mark.parametrize("batched", [True, False])
def test_scale_one_never_runs_uncond(batched: bool) -> None:
    velocity = RecordingVelocity()
    x = sample_euler(Guidance(velocity, COND, UNCOND, 1.0, batched), noise(), flow_sigmas(4, 5.0))
    assert [size for size, _, _ in velocity.calls] == [2] * 4
    assert all(torch.equal(context, COND.expand(2, -1, -1)) for _, _, context in velocity.calls)
    assert torch.equal(x, sample_euler(Guidance(RecordingVelocity(), COND), noise(), flow_sigmas(4, 5.0)))


def test_timestep_is_sigma_times_1000() -> None:
    velocity = RecordingVelocity(torch.bfloat16)
    x = sample_euler(Guidance(velocity, COND), noise().bfloat16(), flow_sigmas(4, 5.0))
    timesteps = [float(timestep[0]) for _, timestep, _ in velocity.calls]
    assert timesteps == pytest.approx([1000.0, 937.5, 2500 / 3, 625.0])
    assert all(timestep.dtype == torch.float32 for _, timestep, _ in velocity.calls)
    assert x.dtype == torch.float32


def test_context_of_the_right_size_arrives_as_the_same_object() -> None:
    """A step cache may then tell cond from uncond by identity."""
    velocity = RecordingVelocity()
    Guidance(velocity, COND, UNCOND, 3.0)(noise(1), torch.tensor(0.5))
    assert [context is given for (_, _, context), given in zip(velocity.calls, (COND, UNCOND), strict=True)] == [
        True,
        True,
    ]


# The counts are worked out by hand in test_schedules.py: 26 of 40 and 15 of 40 steps are high-noise ones.
@pytest.mark.parametrize(("shift", "boundary", "num_high"), [(12.0, 0.875, 26), (5.0, 0.9, 15)])
def test_each_expert_gets_its_steps_and_one_switch_happens(shift: float, boundary: float, num_high: int) -> None:
    high, low = RecordingVelocity(), RecordingVelocity()
    switches: list[tuple[str, int, int]] = []
    denoise = ExpertSwitch(
        high=Guidance(high, COND, UNCOND, 4.0, batched=True),
        low=Guidance(low, COND, UNCOND, 3.0, batched=True),
        boundary=boundary,
        on_switch=lambda expert: switches.append((expert, len(high.calls), len(low.calls))),
    )
    whole = sample_euler(denoise, noise(), flow_sigmas(40, shift))
    assert len(high.calls) == num_high
    assert len(low.calls) == 40 - num_high
    assert switches == [("low", num_high, 0)]  # after the last high-noise step, before the first low-noise one

    sigmas = flow_sigmas(40, shift)
    middle = sample_euler(denoise.high, noise(), sigmas[: num_high + 1])
    assert torch.equal(sample_euler(denoise.low, middle, sigmas[num_high:]), whole)


def test_a_second_run_switches_back() -> None:
    switches: list[str] = []
    experts = [Guidance(RecordingVelocity(), COND), Guidance(RecordingVelocity(), COND)]
    denoise = ExpertSwitch(*experts, boundary=0.9, on_switch=switches.append)
    for _ in range(2):
        sample_euler(denoise, noise(), flow_sigmas(4, 5.0))
    assert switches == ["low", "high", "low"]


@pytest.mark.parametrize(("loaded", "expected"), [("high", ["low"]), ("low", [])])
def test_a_run_below_the_boundary_loads_at_most_once(loaded, expected: list[str]) -> None:
    switches: list[str] = []
    low = Guidance(RecordingVelocity(), COND)
    denoise = ExpertSwitch(low, low, 0.875, switches.append, loaded)
    sample_euler(denoise, noise(), flow_sigmas(40, 5.0)[20:])  # from 0.83 down
    assert switches == expected


def test_a_failed_switch_is_tried_again() -> None:
    attempts: list[str] = []

    def fail_once(expert: str) -> None:
        attempts.append(expert)
        if len(attempts) == 1:
            raise OSError("weights unreadable")

    denoise = ExpertSwitch(Guidance(RecordingVelocity(), COND), Guidance(RecordingVelocity(), COND), 0.9, fail_once)
    with pytest.raises(OSError, match="unreadable"):
        denoise(noise(), torch.tensor(0.5))
    denoise(noise(), torch.tensor(0.5))
    assert attempts == ["low", "low"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Guidance(RecordingVelocity(), COND, None, 5.0), "scale is 5.0 but there is no uncond"),
        (lambda: Guidance(RecordingVelocity(), COND, UNCOND, float("nan")), "scale is nan"),
        (lambda: Guidance(RecordingVelocity(), COND, UNCOND[:, :2], 5.0, True), r"\[1, 2, 4\] cannot share a batch"),
        (lambda: Guidance(RecordingVelocity(), COND.expand(3, -1, -1))(noise(), torch.tensor(0.5)), "3 samples"),
        (lambda: ExpertSwitch(noise, noise, 900), "boundary is 900"),
        (lambda: ExpertSwitch(noise, noise, 0.9, None, "middle"), "loaded is 'middle'"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
