"""Runs on the disk: keys, sections, what a crash leaves, and two processes at once."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lowvram_video.framepack.run.folder import RunError, RunStore, StoredSection
from lowvram_video.system.content_key import run_key
from lowvram_video.system.run_lock import RunLock
from torch import Tensor

SETTINGS = {"prompt": "she waves", "seed": 31337, "cfg": 1.0, "start": torch.arange(6.0).view(1, 2, 3)}
TOTAL = 4
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to kill is a fork")


def sample(generator: torch.Generator, history: Tensor) -> Tensor:
    """A stand-in for a section: its latents depend on all before it and on the generator."""
    noise = torch.randn(1, 16, 3, 4, 6, generator=generator)
    return torch.tanh(noise + history[:, :, :3]) / 3


def generate(root: Path, settings: dict[str, Any] = SETTINGS, stop_before: int = TOTAL) -> list[StoredSection]:
    """A run as the pipeline makes it: goes on after the sections that are there."""
    generator, history = torch.Generator().manual_seed(7), torch.zeros(1, 16, 3, 4, 6)
    with RunStore.open(root, settings, TOTAL) as run:
        for index in range(min(run.completed, stop_before)):
            section = run.load(index)
            generator.set_state(section.generator_state)
            history = torch.cat([section.latents, history], dim=2)[:, :, :19]
        for index in range(run.completed, stop_before):
            latents = sample(generator, history)
            history = torch.cat([latents, history], dim=2)[:, :, :19]
            run.save_section(index, latents, generator.get_state())
        if run.completed == TOTAL:
            run.finish()
        return [run.load(index) for index in range(run.completed)]


def same(a: StoredSection, b: StoredSection) -> bool:
    pairs = [(a.latents, b.latents), (a.generator_state, b.generator_state)]
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def is_finished(run: RunStore) -> bool:
    return json.loads((run.folder / "settings.json").read_text(encoding="utf-8"))["finished"] is not None


def folder_of(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


# --- keys -------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@hypothesis_settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=4), values, max_size=6), st.randoms(use_true_random=False))
def test_keys_do_not_depend_on_order(settings: dict[str, Any], shuffler: random.Random) -> None:
    items = list(settings.items())
    shuffler.shuffle(items)
    assert run_key(dict(items)) == run_key(settings)
    assert run_key(settings | {"one more": 1}) != run_key(settings)


@given(values, values)
def test_keys_differ_where_values_do(a: Any, b: Any) -> None:
    assert (run_key({"x": a}) == run_key({"x": b})) == (repr_of(a) == repr_of(b))


def repr_of(value: Any) -> str:
    """Python's own text of a value, dicts sorted: independent of JSON."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{repr_of(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(repr_of, value)) + "]"
    return repr(value)


@hypothesis_settings(max_examples=50)
@given(
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn]),
    st.randoms(use_true_random=False),
)
def test_tensor_keys_are_their_type_shape_and_bytes(shape: list[int], dtype: torch.dtype, rng: random.Random) -> None:
    count = torch.Size(shape).numel()
    tensor = torch.tensor([rng.randint(0, 1) for _ in range(count)], dtype=torch.float32).to(dtype).view(shape)
    key = run_key({"t": tensor})
    assert key == run_key({"t": tensor.clone()})
    assert key != run_key({"t": tensor[None]})
    assert key != run_key({"t": tensor.to(torch.float64)})
    for one in tensor.reshape(-1)[:1]:
        assert run_key({"t": one.expand(1)}) == run_key({"t": one.clone()[None]})  # with no stride, as ComfyUI's sigmas
    if tensor.ndim >= 2:
        assert key == run_key({"t": tensor.transpose(0, 1).contiguous().transpose(0, 1)})
    if count:
        assert key != run_key({"t": (1 - tensor.float()).to(dtype)})


def test_a_key_is_the_same_in_every_process() -> None:
    """The text is fixed, so that a run is found again by a later version; hash seeds do not matter."""
    code = (
        "from lowvram_video.system.content_key import run_key; import torch; "
        "print(run_key({'b': {'y', }.pop(), 'a': [1, 2.5, None, True, torch.arange(3.)]}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    key = run_key({"a": [1, 2.5, None, True, torch.arange(3.0)], "b": "y"})
    tensor = hashlib.sha256(struct.pack("<3f", 0, 1, 2)).hexdigest()
    text = f'{{"a": ["list", 1, 2.5, null, true, ["tensor", "torch.float32", [3], "{tensor}"]], "b": "y"}}'
    assert found.stdout.strip() == key == hashlib.sha256(text.encode()).hexdigest()


def test_what_looks_alike_differs() -> None:
    tensor = torch.arange(2.0)
    alike = [tensor, ["tensor", "torch.float32", [2], "abc"], [0.0, 1.0], [0, 1], "[0, 1]", {"0": 0, "1": 1}, None, 1]
    alike += [True, 1.0, "1", [1], [[1]], [], {}, "", tensor.double(), tensor.int(), -tensor, [tensor], {"list": [1]}]
    assert len({run_key({"x": value}) for value in alike}) == len(alike)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": [{"b": {1, 2}}]}, r"settings\['a'\]\[0\]\['b'\] is a set; what tells runs apart are strings"),
        ({"a": {1: 2}}, r"settings\['a'\] has the key 1; keys are strings"),
        ({"a": Path("x")}, r"settings\['a'\] is a \w*Path"),
    ],
)
def test_what_has_no_key(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RunStore.open(tmp_path / "runs", settings, TOTAL)
    assert not (tmp_path / "runs").exists()


# --- sections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latents",
    [
        torch.tensor([float("nan"), -0.0, 1e-45, float("inf"), 1 / 3]).repeat(2, 2)[:, ::2],  # not contiguous
        torch.linspace(-1, 1, 3).bfloat16(),
        torch.zeros(0, 4),
        torch.tensor(3),
    ],
)
def test_sections_come_back_bit_for_bit(tmp_path: Path, latents: Tensor) -> None:
    state = torch.Generator().manual_seed(5).get_state()
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        run.save_section(0, latents, state)
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        section = run.load(0)
    assert (section.latents.dtype, section.latents.shape) == (latents.dtype, latents.shape)
    bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (section.latents, latents)]
    assert torch.equal(*bits)
    assert torch.equal(section.generator_state, state)


@pytest.mark.parametrize("stop_before", range(TOTAL + 1))
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, stop_before: int) -> None:
    whole = generate(tmp_path / "whole")
    generate(tmp_path / "stopped", stop_before=stop_before)
    with RunStore.open(tmp_path / "stopped", SETTINGS, TOTAL) as run:
        assert (run.completed, is_finished(run)) == (stop_before, stop_before == TOTAL)
    resumed = generate(tmp_path / "stopped")
    assert len(resumed) == TOTAL and all(map(same, whole, resumed))


def test_the_folder_is_readable(tmp_path: Path) -> None:
    generate(tmp_path)
    folder = folder_of(tmp_path)
    description = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert description["key"].startswith(folder.name) and description["total_sections"] == TOTAL
    assert description["settings"]["prompt"].startswith("text of 9 characters, ")
    assert description["settings"]["start"].startswith("float32 [1, 2, 3] ")
    assert description["finished"] >= description["started"]
    names = sorted(os.listdir(folder))
    assert names == ["lock", *[f"section_{index:03d}.safetensors" for index in range(TOTAL)], "settings.json"]
    generate(tmp_path)
    assert json.loads((folder / "settings.json").read_text(encoding="utf-8")) == description


def test_half_a_character_in_a_prompt_is_no_problem(tmp_path: Path) -> None:
    RunStore.open(tmp_path, {"prompt": "wave \ud83d", "cfg": float("inf")}, 1).close()
    written = json.loads((folder_of(tmp_path) / "settings.json").read_text())
    assert written["settings"]["prompt"].startswith("text of 6 characters, ")


def test_sections_come_in_order(tmp_path: Path) -> None:
    state = torch.Generator().get_state()
    with RunStore.open(tmp_path, SETTINGS, 2) as run:
        for index in (-1, 1):
            with pytest.raises(ValueError, match=r"of 2 sections the next is number 0"):
                run.save_section(index, torch.zeros(1), state)
        with pytest.raises(ValueError, match="has no section 0: 0 are there"):
            run.load(0)
        with pytest.raises(ValueError, match="is not finished: it has 0 of 2 sections"):
            run.finish()
        run.save_section(0, torch.zeros(1), state)
        run.save_section(1, torch.ones(1), state)
        with pytest.raises(ValueError, match="cannot be stored"):
            run.save_section(2, torch.ones(1), state)
        run.save_section(0, torch.full((1,), 2.0), state)
        assert run.completed == 1
    with RunStore.open(tmp_path, SETTINGS, 2) as run:
        assert run.completed == 1, "section 1 followed another section 0"


def test_a_section_made_again_exactly_keeps_its_followers(tmp_path: Path) -> None:
    whole = generate(tmp_path)
    (folder_of(tmp_path) / "section_001.safetensors").write_bytes(b"")
    generate(tmp_path, stop_before=2)
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        assert run.completed == TOTAL and same(run.load(3), whole[3])


# --- other runs and damage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"seed": 31338}, {"prompt": "she waves "}, {"cfg": 1}, {"start": torch.arange(6.0).view(1, 3, 2)}, {"new": None}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_never_continue_a_run(tmp_path: Path, change: dict[str, Any]) -> None:
    generate(tmp_path, stop_before=2)
    with RunStore.open(tmp_path, SETTINGS | change, TOTAL) as other:
        assert other.completed == 0
    with RunStore.open(tmp_path, SETTINGS, TOTAL + 1) as longer:
        assert longer.completed == 0
    assert len(list(tmp_path.iterdir())) == 3
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        assert run.completed == 2


def test_files_of_another_run_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generate(tmp_path / "a")
    generate(tmp_path / "b", SETTINGS | {"seed": 1}, stop_before=1)
    ours, theirs = folder_of(tmp_path / "b"), folder_of(tmp_path / "a")
    for index in range(TOTAL):
        name = f"section_{index:03d}.safetensors"
        shutil.copy(theirs / name, ours / name)
    with RunStore.open(tmp_path / "b", SETTINGS | {"seed": 1}, TOTAL) as run:
        assert run.completed == 0 and not is_finished(run)
    assert "section_000.safetensors is of a run with other settings: the run goes on from section 0" in caplog.text


def test_sections_that_changed_places_are_not_taken(tmp_path: Path) -> None:
    generate(tmp_path)
    folder = folder_of(tmp_path)
    os.replace(folder / "section_002.safetensors", folder / "section_001.safetensors")
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        assert run.completed == 1


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_damage_ends_the_chain_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("run")
    whole = generate(root)
    victim = data.draw(st.integers(0, TOTAL - 1))
    path = folder_of(root) / f"section_{victim:03d}.safetensors"
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "gone", "zeros", "longer", "text"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    elif kind == "gone":
        path.unlink()
    elif kind == "zeros":
        path.write_bytes(bytes(len(content)))
    elif kind == "longer":
        path.write_bytes(content + b"0")
    else:
        path.write_bytes(data.draw(st.binary(max_size=64)))
    with RunStore.open(root, SETTINGS, TOTAL) as run:
        # a flipped bit of a name that nobody reads harms nothing
        assert run.completed == victim or (kind == "flip" and all(same(run.load(i), whole[i]) for i in range(TOTAL)))
    assert all(map(same, whole, generate(root)))
    shutil.rmtree(root)


def test_damage_after_opening_is_reported(tmp_path: Path) -> None:
    generate(tmp_path)
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        (folder_of(tmp_path) / "section_001.safetensors").write_bytes(b"x")
        with pytest.raises(RunError, match=r"section_001.* cannot be read .*: start again, and the run goes on from"):
            run.load(1)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"key": 3, "finished": "yes"}'])
def test_the_description_is_only_for_people(tmp_path: Path, content: bytes) -> None:
    generate(tmp_path, stop_before=2)
    (folder_of(tmp_path) / "settings.json").write_bytes(content)
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        assert run.completed == 2 and not is_finished(run)
    assert json.loads((folder_of(tmp_path) / "settings.json").read_text())["settings"]["seed"] == 31337


# --- crashes ----------------------------------------------------------------------------------------------


def generate_and_die(root: Path, stop_at: int) -> None:
    """A run whose process ends, as if killed, at the `stop_at`-th step on the disk."""
    left = [stop_at]

    def counted(call):
        def step(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return step

    # this is the process that dies: nothing else sees the change
    os.replace, os.fsync, os.ftruncate = counted(os.replace), counted(os.fsync), counted(os.ftruncate)
    generate(root)


@needs_fork
def test_killed_at_any_step_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    whole = generate(tmp_path / "whole")
    stop_at, kept, survived = 0, [], False
    while not survived:
        root = tmp_path / str(stop_at)
        process = context.Process(target=generate_and_die, args=(root, stop_at))
        process.start()
        process.join()
        survived = process.exitcode == 0
        assert survived or process.exitcode == -signal.SIGKILL
        with RunStore.open(root, SETTINGS, TOTAL) as run:
            kept.append(run.completed)
            assert all(same(run.load(index), whole[index]) for index in range(run.completed))
        assert all(map(same, whole, generate(root)))
        assert not list(folder_of(root).glob("*.partial"))
        stop_at += 1
    print(f"killed at {stop_at - 1} steps; sections kept: {kept}")
    assert kept == sorted(kept) and set(kept) == set(range(TOTAL + 1))


def save_forever(root: Path, size: int) -> None:
    with RunStore.open(root, {"size": size}, 10**6) as run:
        for index in range(run.completed, 10**6):
            run.save_section(index, torch.full((size,), float(index)), torch.Generator().get_state())


@needs_fork
def test_killed_at_random_times_what_is_there_is_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    clock, size, counts = random.Random(3), 200_000, [0]
    for _ in range(12):
        process = context.Process(target=save_forever, args=(tmp_path, size))
        process.start()
        time.sleep(clock.uniform(0.02, 0.15))
        process.kill()
        process.join()
        with RunStore.open(tmp_path, {"size": size}, 10**6) as run:
            counts.append(run.completed)
            files = sorted(path.name for path in run.folder.glob("section_*"))
            assert len(files) == run.completed, "a file is there whole or not at all"
            if run.completed:
                last = run.load(run.completed - 1)
                assert torch.equal(last.latents, torch.full((size,), run.completed - 1.0))
    print(f"sections after each kill: {counts[1:]}")
    assert counts == sorted(counts) and counts[-1] > 0


def test_a_full_disk_keeps_the_sections_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path, stop_before=2)
    state = torch.Generator().get_state()
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(RunError, match=r"section 2 cannot be stored \(No space left .* 2 sections before it"):
                run.save_section(2, torch.zeros(3), state)
            with pytest.raises(RunError, match=r"settings.json cannot be written"):
                run._describe(SETTINGS)
        assert run.completed == 2 and not list(run.folder.glob("*.partial"))
        run.save_section(2, torch.zeros(3), state)


# --- locks ------------------------------------------------------------------------------------------------

Pipe = namedtuple("Pipe", "ours theirs")


def hold(root: Path, ready: Any) -> None:
    run = RunStore.open(root, SETTINGS, TOTAL)
    ready.send(os.getpid())
    time.sleep(60)
    run.close()


@needs_fork
def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    pipe = Pipe(*context.Pipe())
    process = context.Process(target=hold, args=(tmp_path, pipe.theirs))
    process.start()
    try:
        pid = pipe.ours.recv()
        with pytest.raises(ValueError, match=rf"is in use \(process {pid} since 20\d\d-.*\): wait until that ends"):
            RunStore.open(tmp_path, SETTINGS, TOTAL)
        with RunStore.open(tmp_path, SETTINGS | {"seed": 1}, TOTAL) as other:
            assert other.completed == 0
    finally:
        process.kill()
        process.join()
    caplog.set_level("INFO")
    RunStore.open(tmp_path, SETTINGS, TOTAL).close()
    assert "lock was left by a process that has ended" in caplog.text


def test_one_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        with pytest.raises(ValueError, match=rf"is in use \(process {os.getpid()} "):
            RunStore.open(tmp_path, SETTINGS, TOTAL)
        run.close()
        run.close()
        RunStore.open(tmp_path, SETTINGS, TOTAL).close()


def test_a_place_without_locks_is_only_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = OSError(95, "Operation not supported")
    monkeypatch.setattr(FileLock, "acquire", lambda _: (_ for _ in ()).throw(refusal))
    RunLock(tmp_path / "lock").release()
    assert "cannot be locked (Operation not supported): do not start this run twice" in caplog.text


# --- room ------------------------------------------------------------------------------------------------


def test_room_is_checked_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generate(tmp_path, stop_before=2)
    usage = namedtuple("usage", "total used free")
    with RunStore.open(tmp_path, SETTINGS, TOTAL) as run:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 * 2**30))
        run.check_free_space(2**28)
        assert not caplog.text
        run.check_free_space(2**30, 2**29)
        assert "this run leaves about 0.50 GiB free" in caplog.text
        with pytest.raises(ValueError, match=r"has room for 3.00 GiB, and this run needs about 3.50 GiB: free some"):
            run.check_free_space(2**30, 3 * 2**29)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.*\): check the free space and the rights, or choose"):
        RunStore.open(tmp_path / "file", SETTINGS, TOTAL)
