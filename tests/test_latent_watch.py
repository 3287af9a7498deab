"""Latents that are no use are told after the first step and at the end, and made once more on the safe path."""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.cli.main import main
from lowvram_video.framepack.request import Sampling
from lowvram_video.runtime.latent_watch import BadLatents, LatentWatch
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest, check_request
from safetensors.torch import load_file, save_file
from torch import Tensor

from .test_cli import arguments, refusal
from .tiny import save_files

GOOD = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
REQUEST = WanRequest("a red ball", "two cats", width=48, height=32, num_frames=5, num_steps=3, guidance=4.0)


def bad(value: float) -> Tensor:
    latent = GOOD.clone()
    latent[1, 2, 3] = value
    return latent


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "NaN or infinite numbers"),
        (-math.inf, "NaN or infinite"),
        (-3e29, r"values up to 3e\+29, where some"),
    ],
)
def test_bad_latents_are_told_after_the_first_step_and_at_the_end(value: float, words: str) -> None:
    watch = LatentWatch("the weather")
    watch.step(0, 3, bad(value), GOOD)
    with pytest.raises(BadLatents, match=rf"{words}.* after its first step: likely the weather"):
        watch.step(1, 3, GOOD, GOOD)
    watch = LatentWatch("the weather")
    watch.step(0, 2, GOOD, GOOD)
    with pytest.raises(BadLatents, match=rf"{words}.* after its last step"):
        watch.step(1, 2, GOOD, bad(value))
    with pytest.raises(BadLatents, match="last step"):
        LatentWatch("").step(0, 1, GOOD, bad(value))


@pytest.mark.parametrize("value", [math.nan, 1e9])
def test_bad_latents_are_told_at_the_step_that_made_them(value: float) -> None:
    watch = LatentWatch("the weather")
    for index in range(3):
        watch.step(index, 9, GOOD, GOOD)
    watch.step(3, 9, bad(value), GOOD)
    with pytest.raises(BadLatents, match=r"after step 4 of 9: likely the weather") as told:
        watch.step(4, 9, GOOD, GOOD)
    assert told.value.step == 3


@pytest.mark.parametrize("latents", [torch.zeros(2, 4, 3, 2, 2), torch.full((1, 16, 2, 4, 4), -3.5)])
@pytest.mark.parametrize("index", [0, 4, 8])
def test_latents_that_are_all_alike_are_told(latents: Tensor, index: int) -> None:
    watch = LatentWatch("")
    with pytest.raises(BadLatents, match=r"are all alike \(a standard deviation of 0, where about 1 is usual\)"):
        for number in range(index, min(index + 2, 9)):
            watch.step(number, 9, latents, GOOD)


def test_one_video_of_a_batch_that_collapsed_is_told() -> None:
    batch = torch.randn(3, 16, 2, 4, 4)
    batch[1] = 0.5
    with pytest.raises(BadLatents, match="all alike"):
        LatentWatch("").step(8, 9, torch.randn(3, 16, 2, 4, 4), batch)


def test_a_black_video_is_none_that_collapsed() -> None:
    """Its channels are constant, and differ."""
    channels = torch.linspace(-1, 1, 16).view(1, 16, 1, 1, 1)
    LatentWatch("").step(8, 9, channels.expand(1, 16, 3, 4, 4), GOOD)


def test_what_is_in_bounds_is_nobodys_business() -> None:
    watch = LatentWatch("")
    for index in range(4):
        watch.step(index, 4, bad(500.0), bad(-500.0).bfloat16())


def test_the_first_look_is_at_the_latent_as_it_was() -> None:
    watch, latent = LatentWatch(""), bad(math.nan)
    watch.step(0, 3, latent, GOOD)
    latent.zero_()
    with pytest.raises(BadLatents):
        watch.step(1, 3, GOOD, GOOD)


@pytest.mark.parametrize(
    ("seconds", "warned"), [([9, 9, 30, 31], True), ([9, 9, 30, 9, 9], False), ([9, 9, 20, 26], False)]
)
def test_steps_that_become_slow_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: list[float], warned: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = LatentWatch("")
    for index, took in enumerate([0.0, *seconds, 9, 9]):  # the first was recorded
        now[0] += took
        watch.step(index, 99, GOOD, GOOD)
    assert (caplog.text.count("steps take") == 1) == warned
    assert not warned or ("steps take 31 s, and 9 s before" in caplog.text and "Sysmem Fallback" in caplog.text)


# --- in a run --------------------------------------------------------------------------------------------


class Sick(Sdpa):
    """An attention kernel that overflows."""

    name = "sick"

    def attend(self, *arguments, **named):  # type: ignore[no-untyped-def]
        return super().attend(*arguments, **named) * math.inf


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("files"))


def test_a_run_is_made_once_more_on_the_safe_path(
    files: WanFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = torch.cat(list(WanPipeline(files).generate(REQUEST)))
    pipeline = WanPipeline(files, runs=tmp_path)
    model = pipeline.high.model
    model.execution = replace(model.execution, attention=Sick(torch.device("cpu")))
    with caplog.at_level(logging.WARNING):
        frames = torch.cat(list(pipeline.generate(REQUEST)))
    assert torch.equal(frames, whole)
    assert (
        "NaN or infinite numbers after its first step: likely guidance of 4 or the attention backend sick"
        in caplog.text
    )
    assert "begins anew with exact attention" in caplog.text
    assert pipeline.high.model.execution.attention.name == "sick", "the next run begins as its settings say"
    assert len(list(tmp_path.glob("*/run.json"))) == 2, "what computes otherwise is another run"

    again = WanPipeline(files, runs=tmp_path)  # its video was not placed: the latent of the safe path is there
    again.high.model.execution = replace(again.high.model.execution, attention=Sick(torch.device("cpu")))
    passes: list[int] = []
    again.high.model.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(torch.cat(list(again.generate(REQUEST))), whole)
    assert passes == [], "both paths' steps were kept"


def test_a_damaged_model_is_named_and_no_video_is_made(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(files.model)
    tensors["blocks.1.ffn.0.weight"][0, 0] = math.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    words = arguments(replace(files, model=tmp_path / "nan.safetensors"), tmp_path / "a.mp4")
    assert main(words) == 2
    assert "NaN or infinite numbers" in (err := capsys.readouterr().err)
    assert "damaged weights in nan.safetensors (download it again)" in err
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("leaf", ["alpha", "lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_lora_that_is_no_numbers_is_refused(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], leaf: str, value: float
) -> None:
    layer, generator = "diffusion_model.blocks.0.self_attn.q", torch.Generator().manual_seed(3)
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(4, 128, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(128, 4, generator=generator),
        f"{layer}.alpha": torch.tensor(4.0),
    }
    tensors[f"{layer}.{leaf}"].view(-1)[-1] = value
    save_file(tensors, tmp_path / "lora.safetensors")
    assert main(arguments(files, tmp_path / "a.mp4", "--lora", tmp_path / "lora.safetensors")) == 2
    err = capsys.readouterr().err
    assert f"lora.safetensors: {layer}.{leaf}" in err and "download the LoRA again, or leave it out" in err
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("flag", ["--guidance", "--guidance-high"])
@pytest.mark.parametrize("value", ["1e30", "-1e9", "nan", "inf"])
def test_absurd_guidance_is_refused(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    line = refusal(capsys, arguments(files, tmp_path / "a.mp4", flag, value))
    assert "use a finite number, such as 5" in line or "expected one argument" in line or "model-low" in line


def test_values_are_checked_when_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"guidance is 1e\+30: use a finite number"):
        check_request(replace(REQUEST, guidance=1e30))
    for name in ("guidance", "cfg", "shift", "strength", "cfg_rescale", "cache_threshold"):
        with pytest.raises(ValueError, match="use a number from 0"):
            Sampling(**{name: math.nan}).check()  # type: ignore[arg-type]


# --- a fault that passes, and records ---------------------------------------------------------------------


class Transient:
    """A network whose answer is no numbers in one pass of all, as after a bit that flipped."""

    def __init__(self, pipeline: WanPipeline, at: int, value: float = math.nan, times: int = 1) -> None:
        self.passes, self.at, self.times, self.value = 0, at, times, value
        pipeline.high.model.register_forward_hook(self._after)

    def _after(self, module: object, given: object, made: Tensor) -> Tensor:
        self.passes += 1
        if self.passes <= self.at or not self.times:
            return made
        self.times -= 1
        return torch.full_like(made, self.value)


@pytest.mark.parametrize("value", [math.nan, 1e9])
def test_a_fault_that_passes_costs_the_step_and_is_not_kept(
    files: WanFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    """One bad pass at the last step of three; PyTorch's attention in fp32 is the safest path already."""
    whole = torch.cat(list(WanPipeline(files).generate(REQUEST)))
    pipeline = WanPipeline(files, runs=tmp_path)
    fault = Transient(pipeline, at=4, value=value)
    assert torch.equal(torch.cat(list(pipeline.generate(REQUEST))), whole)
    assert "the run goes on from the 2 calls of the model before" in caplog.text
    assert fault.passes == 8, "only the last step was made again"


def test_a_fault_that_stays_is_told_and_what_was_right_is_kept(
    files: WanFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = torch.cat(list(WanPipeline(files).generate(REQUEST)))
    pipeline = WanPipeline(files, runs=tmp_path)
    Transient(pipeline, at=4, times=99)
    with pytest.raises(BadLatents, match="after its last step") as told:
        list(pipeline.generate(REQUEST))
    assert told.value.num_kept == 2
    assert len(list(tmp_path.glob("*/step_*"))) == 2
    again = WanPipeline(files, runs=tmp_path)
    passes: list[int] = []
    again.high.model.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(torch.cat(list(again.generate(REQUEST))), whole)
    assert len(passes) == 2, "nothing wrong was kept"


def test_a_killed_run_on_the_safe_path_goes_on_there(files: WanFiles, tmp_path: Path) -> None:
    """Also where the fault has passed: the video is that of the run that was not killed."""
    pipeline = WanPipeline(files, runs=tmp_path)
    pipeline.high.model.execution = replace(pipeline.high.model.execution, attention=Sick(torch.device("cpu")))
    passes: list[int] = []

    def count(*_: object) -> None:
        passes.append(1)
        if len(passes) == 7:  # the second step on the safe path is done
            raise KeyboardInterrupt

    pipeline.high.model.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        list(pipeline.generate(REQUEST))
    again = WanPipeline(files, runs=tmp_path)
    again.high.model.execution = replace(again.high.model.execution, attention=Sick(torch.device("cpu")))
    made: list[str] = []
    again.high.model.register_forward_pre_hook(lambda *_: made.append(again.high.model.execution.attention.name))
    list(again.generate(REQUEST))
    assert set(made) == {"sdpa"} and len(made) < 6
    again.forget()
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
