"""Runs of Wan that were stopped go on to the same latents, bit for bit, and nothing wrong is taken up."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.runtime import host_copies, kept_runs
from lowvram_video.runtime.host_copies import BackgroundWriter
from lowvram_video.runtime.step_record import StepRecord
from lowvram_video.sampling import guidance
from lowvram_video.sampling.samplers import SAMPLERS, select_sampler
from lowvram_video.sampling.schedules import flow_sigmas
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import Conditions, WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from safetensors.torch import load_file, save_file
from torch import Tensor

from .tiny import save_files, save_wan

REQUEST = WanRequest(
    "a red ball moves left", "two cats", width=48, height=32, num_frames=5, seed=3, num_steps=4, shift=3.0, guidance=4.0
)
SETTINGS = {"seed": 3, "picture": torch.arange(4.0)}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to kill is a fork")


def answer_of(record: StepRecord, question: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
    """By one tensor."""
    return record.answers(question, lambda: [compute()])[0]


class Stopped(BaseException):
    """As Ctrl-C."""


class Model:
    """A denoiser that counts its calls, and stops at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.calls == self.stop_at:
            raise Stopped
        self.calls += 1
        return torch.tanh(x * (1 + sigma)) / 2


class Killed(Model):
    """As `kill -9`."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(x, sigma)


def run(root: Path, model: Model, sampler: str = "euler", settings: dict[str, Any] = SETTINGS) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 4, 2, 3, 3, generator=generator)
    with StepRecord.open(root, settings) as record:

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return answer_of(record, {"x": x, "sigma": sigma}, lambda: model(x, sigma))

        return select_sampler(sampler)(denoise, noise, flow_sigmas(6, 3.0), None, generator)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_bit_for_bit_wherever_it_stopped(tmp_path: Path, sampler: str) -> None:
    whole = run(tmp_path / "whole", Model(), sampler)
    for stop_at in range(6):
        root = tmp_path / f"{stop_at}"
        with pytest.raises(Stopped):
            run(root, Model(stop_at), sampler)
        model = Model()
        assert torch.equal(run(root, model, sampler), whole)
        assert model.calls == 6 - stop_at


@needs_fork
def test_a_killed_process_loses_no_step_that_was_written(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Model())
    for stop_at in range(1, 6):
        root = tmp_path / f"{stop_at}"
        child = os.fork()
        if child == 0:
            run(root, Killed(stop_at))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        model = Model()
        assert torch.equal(run(root, model), whole)
        assert 6 - stop_at <= model.calls <= 6 - stop_at + host_copies.MAX_PENDING + 1


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(path: Path) -> None:
    other = path.with_name("step_0003.safetensors")
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


@pytest.mark.parametrize("change", [damage_byte, cut, swap, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_bad_record_ends_what_is_taken_up(tmp_path: Path, change: Callable[[Path], object]) -> None:
    whole = run(tmp_path / "whole", Model())
    with pytest.raises(Stopped):
        run(tmp_path, Model(stop_at=5))
    (step,) = tmp_path.glob("*/step_0002.safetensors")
    change(step)
    model = Model()
    assert torch.equal(run(tmp_path, model), whole)
    assert model.calls == 4


def test_a_record_of_another_question_is_not_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the noise differs though all settings are equal, as on another device."""
    with StepRecord.open(tmp_path, SETTINGS) as record:
        answer_of(record, {"x": torch.zeros(2)}, lambda: torch.ones(2))
        answer_of(record, {"x": torch.ones(2)}, lambda: torch.ones(2))
    with StepRecord.open(tmp_path, SETTINGS) as record:
        assert answer_of(record, {"x": torch.full((2,), 0.5)}, lambda: torch.zeros(2)).sum() == 0
        assert record.num_kept == 1
    assert "answers another question than is asked now: the run goes on from call 0" in caplog.text


def test_settings_tell_runs_apart(tmp_path: Path) -> None:
    run(tmp_path, Model())
    for change in ({"seed": 4}, {"picture": torch.ones(4)}, {"attention": "sage"}):
        model = Model()
        run(tmp_path, model, settings=SETTINGS | change)
        assert model.calls == 6


def test_what_is_written_later_is_not_recorded(tmp_path: Path) -> None:
    """Samplers of others may write into what the model gave them."""
    with StepRecord.open(tmp_path, SETTINGS) as record:
        x = torch.zeros(3)
        made = answer_of(record, {"x": x}, lambda: torch.ones(3))
        made.mul_(5)
        x.add_(1)
    with StepRecord.open(tmp_path, SETTINGS) as record:
        assert answer_of(record, {"x": torch.zeros(3)}, lambda: torch.full((3,), 9.0)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_numbers_is_never_kept(tmp_path: Path, value: float) -> None:
    def asked(record: StepRecord, index: int, made: float) -> Tensor:
        return answer_of(record, {"x": torch.full((2,), float(index))}, lambda: torch.full((2,), made))

    with StepRecord.open(tmp_path, SETTINGS) as record:
        for index, made in enumerate([1.0, value, 2.0]):
            asked(record, index, made)
        record.finish(latent=torch.tensor([value]))
        assert record.num_kept == 1 and not record.is_finished
    with StepRecord.open(tmp_path, SETTINGS) as record:
        assert [float(asked(record, index, 5.0)[0]) for index in range(3)] == [1, 5, 5]


def test_steps_that_are_no_use_are_forgotten(tmp_path: Path) -> None:
    """Two calls a step, as of a solver of second order; the third step is no use."""

    def step(record: StepRecord, made: float) -> list[float]:
        answers = [answer_of(record, {"x": torch.zeros(1)}, lambda: torch.full((1,), made)) for _ in range(2)]
        record.end_step()
        return [float(answer) for answer in answers]

    with StepRecord.open(tmp_path, SETTINGS) as record:
        for number in range(4):
            step(record, float(number))
        record.forget_step(2)
        assert record.num_kept == 4
        assert [step(record, 9.0) for _ in range(3)] == [[0, 0], [1, 1], [9, 9]]
    with StepRecord.open(tmp_path, SETTINGS) as record:
        assert [step(record, 7.0) for _ in range(4)] == [[0, 0], [1, 1], [9, 9], [7, 7]]
        record.forget_step(0)
        assert record.num_kept == 0


def test_a_run_that_was_given_up_says_so_until_it_is_removed(tmp_path: Path) -> None:
    run(tmp_path, Model())
    with StepRecord.open(tmp_path, SETTINGS) as record:
        assert not record.is_unsound
        record.give_up("black")
    with StepRecord.open(tmp_path, SETTINGS) as record:
        assert record.is_unsound and record.num_kept == 0
    record.remove()
    assert not tmp_path.exists()


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with (
        StepRecord.open(tmp_path, SETTINGS),
        pytest.raises(ValueError, match=r"is in use \(process \d+ since .*change a setting such as the seed"),
    ):
        StepRecord.open(tmp_path, SETTINGS)
    StepRecord.open(tmp_path, SETTINGS).close()


@pytest.mark.parametrize("fails", ["write_file", "clean_runs"])
def test_a_run_that_could_not_be_opened_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Also while somebody has the error, as ComfyUI keeps it to show it."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises((ValueError, OSError)) as caught:
        patched.setattr(kept_runs, fails, full)
        StepRecord.open(tmp_path, SETTINGS)
    StepRecord.open(tmp_path, SETTINGS).close()
    assert "No space left on device" in str(caught.value)


def test_a_full_disk_stops_recording_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole", Model())
    wrote: list[Path] = []

    def full(path: Path, data: bytes) -> None:
        wrote.append(path)
        if len(wrote) > 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("lowvram_video.runtime.step_record.write_file", full)
    assert torch.equal(run(tmp_path, Model()), whole)
    assert caplog.text.count("no more steps of this run can be kept ([Errno 28] No space left on device)") == 1
    monkeypatch.undo()
    model = Model()
    assert torch.equal(run(tmp_path, model), whole)
    assert model.calls == 4


def test_a_record_that_kept_nothing_is_removed_without_a_word(tmp_path: Path) -> None:
    with StepRecord.open(tmp_path, SETTINGS) as record:
        pass
    record.remove()
    assert not list(tmp_path.glob("*"))


def test_latents_that_are_finished_take_the_place_of_steps(tmp_path: Path) -> None:
    run(tmp_path, Model())
    latent = torch.randn(2, 3)
    with StepRecord.open(tmp_path, SETTINGS) as record:
        record.finish(latent=latent)
        assert not list(record.folder.glob("step_*"))
    with StepRecord.open(tmp_path, SETTINGS) as record:
        kept = record.finished()
        assert kept is not None and torch.equal(kept["latent"], latent)
    damage_byte(next(tmp_path.glob("*/finished.safetensors")))
    with StepRecord.open(tmp_path, SETTINGS) as record:
        assert record.finished() is None
        record.remove()
    assert not tmp_path.exists()


def test_runs_are_kept_for_a_fortnight_and_32_of_them(tmp_path: Path) -> None:
    def used(seed: int, days: float) -> Path:
        with StepRecord.open(tmp_path, {"seed": seed}) as record:
            answer_of(record, {"x": torch.zeros(1)}, lambda: torch.ones(1))
            past = time.time() - days * 24 * 3600
            os.utime(record.folder / kept_runs.MARK, (past, past))
            return record.folder

    (tmp_path / "0123456789abcdef").mkdir()
    (tmp_path / "my notes").mkdir()
    old, recent = used(0, 14.1), used(1, 13.9)
    with StepRecord.open(tmp_path, {"seed": 2}) as held:
        os.utime(held.folder / kept_runs.MARK, (0, 0))
        used(3, 0)
        assert not old.exists() and recent.exists() and held.folder.exists()
    runs = [used(seed, 1 + seed / 100) for seed in range(10, 50)]
    used(4, 0)
    kept = [run for run in runs if run.exists()]
    assert kept == runs[: len(kept)] and len(list(tmp_path.glob("*/run.json"))) <= kept_runs.MOST_RUNS + 1
    assert (tmp_path / "0123456789abcdef").is_dir() and (tmp_path / "my notes").is_dir()


def test_a_run_that_was_killed_while_it_was_removed_goes_at_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / "fedcba9876543210"
    left.mkdir()
    (left / "lock").touch()
    StepRecord.open(tmp_path, {"seed": 1}).close()
    assert left.exists(), "perhaps one that begins"
    os.utime(left, (time.time() - 100,) * 2)
    StepRecord.open(tmp_path, {"seed": 1}).close()
    assert not left.exists()


def test_a_slow_disk_holds_the_run_rather_than_its_memory() -> None:
    writer, done = BackgroundWriter(), []
    most = 0
    for index in range(6):
        writer.submit(lambda index=index: (time.sleep(0.01), done.append(index))[1])  # type: ignore[misc]
        most = max(most, index + 1 - len(done))
    writer.close()
    assert done == list(range(6)) and most <= host_copies.MAX_PENDING + 1


# --- in the pipeline -------------------------------------------------------------------------------------


class Watched(WanPipeline):
    """Stops before a step, and says what was encoded, run by which expert and decoded."""

    stop_at: int | None = None
    encoded = 0
    latent: Tensor

    def _encode(self, *arguments: Any) -> Conditions:
        self.encoded += 1
        return super()._encode(*arguments)

    def _decode(self, latent: Tensor, *arguments: Any) -> Any:
        self.latent = latent.clone()
        return super()._decode(latent, *arguments)

    def watch(self) -> list[str]:
        """The passes that run from now on, by their expert."""
        passes: list[str] = []

        def note(name: str) -> Callable[..., None]:
            def before(*_: object) -> None:
                if len(passes) == self.stop_at:
                    raise Stopped
                passes.append(name)

            return before

        self.high.model.register_forward_pre_hook(note("high"))
        if self.low is not None:
            self.low.model.register_forward_pre_hook(note("low"))
        return passes


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("experts"), experts=True)


def make(pipeline: Watched, request: WanRequest) -> Tensor:
    list(pipeline.generate(request))
    return pipeline.latent


@pytest.mark.parametrize("sampler", ["unipc", "lcm"])
@pytest.mark.parametrize("two", [False, True])
def test_a_pipeline_goes_on_bit_for_bit(experts: WanFiles, tmp_path: Path, two: bool, sampler: str) -> None:
    files = experts if two else replace(experts, model_low=None)
    request = replace(REQUEST, sampler=sampler, **({"boundary": 0.8} if two else {}))
    whole = make(Watched(files), request)
    for stop_at in (3, 6):
        stopped = Watched(files, runs=tmp_path)
        stopped.stop_at = stop_at
        passes = stopped.watch()
        with pytest.raises(Stopped):
            make(stopped, request)
        again = Watched(files, runs=tmp_path)
        passes = again.watch()
        assert torch.equal(make(again, request), whole)
        assert len(passes) == 8 - stop_at // 2 * 2
        if two and stop_at == 6:
            assert set(passes) == {"low"}, "the expert whose steps are all there is not read"
        again.forget()
        assert list(tmp_path.iterdir()) == [] if tmp_path.exists() else True


def test_finished_latents_are_kept_until_the_video_is_whole(experts: WanFiles, tmp_path: Path) -> None:
    files, runs = replace(experts, model_low=None), tmp_path / "wan"
    stopped = Watched(files, runs=runs)
    frames = stopped.generate(REQUEST)
    next(frames)
    frames.close()  # as where the encoder of the video dies
    again = Watched(files, runs=runs)
    passes = again.watch()
    assert torch.equal(make(again, REQUEST), stopped.latent)
    assert passes == [] and again.encoded == 0
    again.forget()
    assert not runs.exists()


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("kept", [False, True])
def test_out_of_memory_between_passes_costs_a_step(
    experts: WanFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, kept: bool
) -> None:
    """Where guidance mixes two passes: no leaner plan helps there."""
    files, calls, mix = replace(experts, model_low=None), [], guidance.classifier_free
    whole = make(Watched(files), REQUEST)

    def full(*given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == at + 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return mix(*given)

    monkeypatch.setattr(guidance, "classifier_free", full)
    pipeline = Watched(files, runs=tmp_path if kept else None)
    passes = pipeline.watch()
    if at and not kept:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            make(pipeline, REQUEST)
        return
    assert torch.equal(make(pipeline, REQUEST), whole)
    assert len(passes) == 8 + 2, "only that step was made again"


@pytest.mark.parametrize("what", ["seed", "prompt", "model", "batched", "dtype"])
def test_another_run_takes_nothing_up(experts: WanFiles, tmp_path: Path, what: str) -> None:
    """All that latents depend on is in the key."""
    files = replace(experts, model_low=None)
    first = Watched(files, runs=tmp_path)
    first.stop_at = 5
    first.watch()
    with pytest.raises(Stopped):
        make(first, REQUEST)
    request, settings = REQUEST, first.settings
    if what in ("seed", "prompt"):
        request = replace(REQUEST, **{what: {"seed": 8, "prompt": "two cats"}[what]})
    elif what == "model":
        files = replace(files, model=save_wan(tmp_path / "other.safetensors", seed=5))
    elif what == "dtype":
        settings = replace(settings, dtype=torch.bfloat16)
    else:
        settings = replace(settings, batched_guidance=True)
    other = Watched(files, settings, runs=tmp_path)
    passes = other.watch()
    make(other, request)
    assert len(passes) == 4 if what == "batched" else 8


def test_weights_that_differ_anywhere_are_another_run(experts: WanFiles, tmp_path: Path) -> None:
    """Also beyond the bytes that a fingerprint samples."""
    model = tmp_path / "wan.safetensors"
    tensors = load_file(experts.model)
    save_file(tensors, model)
    files = replace(experts, model=model, model_low=None)
    stopped = Watched(files, runs=tmp_path / "runs")
    stopped.stop_at = 4
    stopped.watch()
    with pytest.raises(Stopped):
        make(stopped, REQUEST)
    name, largest = max(tensors.items(), key=lambda item: item[1].numel())
    largest.view(-1)[-1] += 1
    save_file(tensors | {name: largest}, model)
    other = Watched(files, runs=tmp_path / "runs")
    passes = other.watch()
    make(other, REQUEST)
    assert len(passes) == 8


def test_steps_are_told_also_where_they_were_recorded(experts: WanFiles, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    class Progress:
        def begin(self, title: str) -> None: ...
        def end(self) -> None: ...
        def update(self, done: int, total: int) -> None:
            told.append((done, total))

    files = replace(experts, model_low=None)
    stopped = Watched(files, runs=tmp_path)
    stopped.stop_at = 4
    stopped.watch()
    with pytest.raises(Stopped):
        make(stopped, REQUEST)
    make(Watched(files, progress=Progress(), runs=tmp_path), REQUEST)
    assert told[:4] == [(step, 4) for step in range(1, 5)]


def test_a_run_begins_though_another_has_just_removed_the_empty_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, root = os.mkdir, tmp_path / "wan"
    left = [root] * 3

    def removed_at_once(path: Any, *arguments: Any, **more: Any) -> None:
        mkdir(path, *arguments, **more)
        if left and Path(path) == left[-1]:
            left.pop().rmdir()

    monkeypatch.setattr(os, "mkdir", removed_at_once)
    with StepRecord.open(root, SETTINGS) as steps:
        assert steps.folder.is_dir()
    assert not left
