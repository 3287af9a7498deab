"""Compiled code as a product: made once for everything that varies, kept over restarts, told of, by profile."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.cli.main import main
from lowvram_video.compilation import profiles
from lowvram_video.compilation.code import CodeMade, CompiledCode
from lowvram_video.compilation.counts import Counts, counts
from lowvram_video.compilation.inductor_cache import InductorCache
from lowvram_video.compilation.profiles import GIB, VideoMemory, settings_of
from lowvram_video.compilation.reading import CompileReading, kept_figures, regressions
from lowvram_video.compilation.saved_code import ENDING, SavedCode, code_folder, key_of, prune
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.compilation.triton_cache import TritonCache
from lowvram_video.memory.plan.footprint import Limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer import workspace
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.rows import num_parts
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.lora.file import LoraChoice
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.utils import fresh_cache

from .loras import make_factors, save_lora
from .tiny import CONFIGS, TEXT_DIM, randomize, save_wan

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ANY_SIZE = CompileSettings(backend="aot_eager", fullgraph=True, dynamic=True)
SIZES = ((2, 12, 16), (2, 14, 16))  # latents [T, H, W]: 96 and 112 tokens
LIMITS = Limits(1 << 40)
STRENGTHS = (1.0, 0.5, 0.0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LOWVRAM_VIDEO_DATA", str(tmp_path / "data"))
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expert(path: Path, lora: Path, compiled: bool) -> StreamedWan:
    model = StreamedWan(path, RunSettings(), loras=[LoraChoice(lora)])
    if compiled:
        model.compile(ANY_SIZE)
    return model


def start(model: StreamedWan, size: tuple[int, int, int], token_chunk: int) -> None:
    """As planned, but for chunks of at most so many rows: plans of larger videos have larger ones."""
    frames, height, width = size
    work = wan_work(model.config, (8 * width, 8 * height, 4 * frames - 3))
    model.start(model.make_plan(work, LIMITS))
    assert model.plan is not None and model.plan.work.rows == frames * height * width // 4
    model.model.execution = replace(model.model.execution, token_chunk=token_chunk)


def test_no_break_and_no_recompile_over_all_that_varies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "FEWEST_PARTS", 2)  # of a pass: the graph is shorter
    lora = save_lora(tmp_path / "lora.safetensors", make_factors())
    files = [save_wan(tmp_path / "high.safetensors"), save_wan(tmp_path / "low.safetensors")]
    plain, compiled = ([expert(path, lora, wanted) for path in files] for wanted in (False, True))
    before, passes, largest = counts(), 0, 0.0
    for size, token_chunk in zip(SIZES, (8192, 16384), strict=True):
        for model in (*plain, *compiled):
            start(model, size, token_chunk)
        for strength in STRENGTHS:
            for model in (*plain, *compiled):
                model.set_lora_strengths([strength])
            for prompt in (0, 1):
                text = draw(prompt, 1, 16, TEXT_DIM)
                for step in range(20):
                    latent, timestep = draw(step, 1, 16, *size), torch.tensor([1000.0 - 49 * step])
                    got = compiled[step >= 10](latent, timestep, text)
                    passes += 1
                    if step in (0, 19):
                        want = plain[step >= 10](latent, timestep, text)
                        largest = max(largest, float((got - want).abs().max() / want.abs().max()))
    made = counts() - before
    again = [reason for model in compiled for reason in model.compiled.reading().again]  # type: ignore[union-attr]
    print(f"{passes} passes: {made}, recompiles {again}, largest relative error {largest:.1e}")
    assert (made.graphs, made.breaks, again) == (1, 0, [])
    assert largest <= 1e-5


def test_sizes_of_other_numbers_of_parts_and_split_queries_are_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "FEWEST_PARTS", 2)
    model = WanModel(CONFIGS["t2v"])
    randomize(model).requires_grad_(False)
    text = draw(0, 1, 16, TEXT_DIM)
    ways = [Execution(token_chunk=60), Execution(token_chunk=60, query_chunk=70, head_groups=2)]
    for own in ways:
        for height, width in ((12, 16), (6, 8), (20, 16), (2, 2)):  # 96, 24, 160 and 2 tokens
            latent = draw(1, 1, 16, 2, height, width)
            model.execution = own
            want = model(latent, torch.tensor([500.0]), text)
            model.execution = Execution(**{**vars(own), "any_size": True})
            got = model(latent, torch.tensor([500.0]), text)
            assert float((got - want).abs().max() / want.abs().max()) < 1e-5, (own, height, width)


def test_ranges_cover_all_rows_in_a_power_of_two_of_parts() -> None:
    for count in (1, 7, 8, 9, 100, 32760, 75600):
        parts = num_parts(count, 4096, 8)
        bounds = [count * index // parts for index in range(parts + 1)]
        sizes = [after - before for before, after in itertools.pairwise(bounds)]
        assert sum(sizes) == count and min(sizes) > 0 and max(sizes) <= 4096 and parts & (parts - 1) == 0
    assert num_parts(20280, 4096, 8) == num_parts(32760, 4096, 8) == 8
    assert num_parts(75600, 4096, 8) == 32


# --- one block first -------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Other(Layer):
    pass


def layers(*kinds: type[Layer]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind().requires_grad_(False) for kind in kinds]


def test_one_block_of_each_kind_runs_before_the_first_pass(tmp_path: Path) -> None:
    blocks = layers(Layer, Layer, Layer, Other, Other)
    code = CompiledCode(blocks, CompileSettings(backend="aot_eager"), CPU, "test", folder=tmp_path)
    ran: list[int] = []

    def passing(stream: object) -> None:
        x = torch.ones(3, 8)
        for index, block in enumerate(stream(blocks)):  # type: ignore[operator]
            ran.append(index)
            x = block(x)

    code.make_first(lambda: passing(code.first_of_each(iter)), rows=3)
    assert ran == [0, 1, 2, 3] and code.reading().counts.graphs == 2
    with code.watching(3):
        passing(iter)
    assert code.reading().counts.graphs == 2, "the others share the code"
    code.make_first(lambda: pytest.fail("it is made once"), rows=3)
    with pytest.raises(CodeMade):
        passing(code.first_of_each(iter))


def test_why_code_was_made_again_is_told(tmp_path: Path) -> None:
    blocks = layers(Layer)
    code = CompiledCode(blocks, CompileSettings(backend="aot_eager", dynamic=False), CPU, "test", folder=tmp_path)
    for rows in (3, 3, 5):
        with code.watching(rows):
            blocks[0](torch.ones(rows, 8))
    reading = code.reading()
    assert reading.counts.graphs == 2 and len(reading.again) == 1 and "expected 3, actual 5" in reading.again[0]
    assert reading.seconds > 0 and any("recompiled, forward" in line for line in reading.lines())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_blocks_that_have_all_versions_they_may_are_told_of(
    fullgraph: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dynamo runs them as plain PyTorch from then on, also in later runs, or gives up where each is to be one graph."""
    settings = CompileSettings(backend="aot_eager", dynamic=False, cache_size_limit=2, fullgraph=fullgraph)
    blocks = layers(Layer)
    code = CompiledCode(blocks, settings, CPU, "test", folder=tmp_path)

    def run(*sizes: int) -> None:
        for rows in sizes:
            with code.watching(rows):
                blocks[0](torch.ones(rows, 8))

    run(3, 4)
    if fullgraph:
        with pytest.raises(ValueError, match=r"fullgraph is on, and none .* \(2 of a function, 128 in all\): set full"):
            run(5)
        return
    assert not code.reading().plain
    run(5, 6)
    for _ in range(2):
        reading = code.reading()
        words, why = (line for line in reading.lines() if line.startswith("not "))
        assert "2 of a function" in words and "set dynamic to true" in words and "expected 4, actual 5" in why
        assert not any("fits" in line and "no code" in line for line in reading.lines())
        code.begin_run()
    assert caplog.text.count("it runs as plain PyTorch there") == 1
    assert len(code.reading().again) == 0


def test_a_block_that_is_no_whole_graph_is_refused_with_the_fix(tmp_path: Path) -> None:
    class Broken(Layer):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    blocks = layers(Broken)
    code = CompiledCode(blocks, CompileSettings(backend="eager", fullgraph=True), CPU, "test", folder=tmp_path)
    with pytest.raises(ValueError, match=r"not one graph .*: set fullgraph to false"), code.watching(3):
        blocks[0](torch.ones(3, 8))


def test_another_cards_thread_has_the_limits_that_were_chosen(tmp_path: Path) -> None:
    """Newer versions of PyTorch keep its settings for each thread."""
    model = StreamedWan(save_wan(tmp_path / "wan.safetensors"), RunSettings(others=(CPU,)))
    model.compile(CompileSettings(backend="eager", cache_size_limit=5, recompile_limit=77))
    assert model.several is not None

    def limits(model: StreamedWan, given: None) -> Tensor:
        config = torch._dynamo.config
        return torch.tensor([[config.cache_size_limit, config.accumulated_cache_size_limit]])

    before = torch._dynamo.config.cache_size_limit
    assert model.several.run(2, lambda model, samples: None, limits).tolist() == [[5, 77], [5, 77]]
    assert torch._dynamo.config.cache_size_limit == before
    model.compile(None)
    assert model.several.run(2, lambda model, samples: None, limits).tolist()[1][0] == before
    model.use_cards(())


def test_a_model_that_ran_plain_compiles_its_next_run(tmp_path: Path) -> None:
    """Starting it is no pass: blocks are made of the pass's stream, and its stream stays."""
    model = StreamedWan(save_wan(tmp_path / "wan.safetensors"), RunSettings())
    plan = model.make_plan(wan_work(model.config, (64, 48, 5)), LIMITS)

    def run() -> Tensor:
        model.start_fitting(plan)
        assert model.model.stream is model.streamer, "weights arrive"
        return model(draw(0, 1, 16, 2, 6, 8), torch.tensor([500.0]), draw(1, 1, 16, TEXT_DIM))

    want = run()
    model.compile(CompileSettings(backend="aot_eager"))
    assert torch.allclose(run(), want, atol=1e-5)
    assert model.compiled is not None
    reading = model.compiled.reading()
    assert reading.counts.graphs == 1 and reading.pass_seconds is None, "one pass"


def test_settings_that_cannot_be_leave_a_model_as_it_was(tmp_path: Path) -> None:
    model = StreamedWan(save_wan(tmp_path / "wan.safetensors"), RunSettings())
    for before in (None, ANY_SIZE):
        model.compile(before)
        with pytest.raises(ValueError, match="tensorrt"):
            model.compile(CompileSettings(backend="tensorrt", dynamic=True))
        assert model.model.execution.any_size == (before is not None) == (model.compiled is not None)
        assert all((block._compiled_call_impl is not None) == (before is not None) for block in model.blocks)


def test_a_backend_that_is_broken_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is there, and of another PyTorch."""
    (tmp_path / "torch_tensorrt.py").write_text("raise OSError('libtorch.so: undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be imported \(.*undefined symbol.*pip install torch-tensorrt anew"):
        CompiledCode(layers(Layer), CompileSettings(backend="tensorrt"), CPU, "test", folder=tmp_path)


# --- kept code -------------------------------------------------------------------------------------------


KEPT = CompileSettings(dynamic=False)
OTHER = replace(KEPT, fullgraph=True, cache_size_limit=4, recompile_limit=32)  # of another profile, of the same code
STARTS = (((3, 5), KEPT), ((3,), OTHER), ((5,), KEPT), ((3, 5), OTHER))  # rows of each pass
# the compiler compiles what the processor has: inductor would try each width of vectors first, for ten seconds
TRUSTED = torch._inductor.config.patch({"cpp.vec_isa_ok": True})


def kept_code(folder: Path, sizes: Sequence[int] = (3,), settings: CompileSettings = KEPT) -> CompiledCode:
    """Code of a module, made (or taken from what is kept) as in a new process."""
    torch._dynamo.reset()
    blocks = layers(Layer)
    code = CompiledCode(blocks, settings, CPU, "test", folder=folder)
    code.make_first(lambda: blocks[0](torch.ones(sizes[0], 8)), rows=sizes[0])
    for rows in sizes[1:]:
        with code.watching(rows):
            blocks[0](torch.ones(rows, 8))
    return code


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CompileReading]]:
    """The file of code that several starts of a process have kept, and what each of them did."""
    folder, readings = tmp_path_factory.mktemp("kept"), []
    for sizes, settings in STARTS:
        with fresh_cache(), torch.inference_mode(), TRUSTED:
            readings.append(kept_code(folder, sizes, settings).reading())
            left = InductorCache.here()
            made = {path.name for path in left.folder.iterdir() if path.is_dir()} - {"cache", "locks", "triton"}
            assert {path.name for path in left.parts()} == made and left.nbytes()
            own = InductorCache(left.folder.rename(left.folder.with_name("torchinductor_me")))
            assert own.parts() == [path for path in sorted(own.folder.iterdir()) if path.is_dir()]
            own.folder.rename(left.folder)
    (file,) = folder.iterdir()
    return file, readings


def test_the_next_start_finds_the_code(starts: tuple[Path, list[CompileReading]]) -> None:
    _, (first, second, *_) = starts
    print(f"misses {first.counts.misses}, then hits {second.counts.hits} of {second.saved_bytes} bytes")
    assert first.counts.hits == 0 < first.counts.misses and not first.saved_bytes
    assert second.counts.misses == 0 and second.counts.hits == second.counts.graphs == 1 and second.saved_bytes


def test_code_of_every_pass_is_found_again_whatever_the_starts_between_used(
    starts: tuple[Path, list[CompileReading]],
) -> None:
    """One pass makes the blocks' code, another one the head's or another size's; a start may need one of them alone."""
    hits = [(each.counts.misses, each.counts.hits > 0, each.saved_bytes) for each in starts[1]]
    print(hits)
    assert hits[0][0] > 0 and hits[0][1:] == (False, 0)
    assert [each[:2] for each in hits[1:]] == [(0, True)] * 3, "all of it was found"
    assert len({saved for *_, saved in hits[1:]}) == 1, "nothing is kept twice"


def test_code_that_is_damaged_is_made_anew(
    starts: tuple[Path, list[CompileReading]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / starts[0].name
    content = starts[0].read_bytes()
    for damaged in (content[:-7], b"", content[:100] + bytes([content[100] ^ 1]) + content[101:], b"PK\x03\x04"):
        file.write_bytes(damaged)
        caplog.clear()
        saved = SavedCode(key_of(KEPT, CPU, "test"), tmp_path)
        assert saved.path == file and saved.load() == 0
        assert "ignored" in caplog.text
    assert not [path for path in starts[0].parent.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("text", ["[" * 60000, '{"a":' * 9000, '{"misses": 1' + "0" * 5000 + "}", "[]", "\0", '"x"'])
def test_figures_of_the_last_run_that_were_damaged_are_none(tmp_path: Path, text: str) -> None:
    saved = SavedCode(key_of(CompileSettings(), CPU, "test"), tmp_path)
    saved.keep_last({"seconds": 2.0, "misses": 3})
    assert saved.last() == {"seconds": 2.0, "misses": 3}
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert saved.last() == {}
    file.write_text(json.dumps({"misses": "3", "seconds": [1], "rows": 4}))
    assert saved.last() == {"rows": 4}


def test_code_of_anything_else_is_another_file() -> None:
    key = key_of(CompileSettings(), CPU, "a")
    stems = {key.stem, key_of(CompileSettings(dynamic=True), CPU, "a").stem, key_of(CompileSettings(), CPU, "b").stem}
    for name in ("torch", "triton", "gpu", "package"):
        stems.add(type(key)(**{**vars(key), name: "another"}).stem)
    assert len(stems) == 7
    noted = CompileSettings(profile="high", notes=("a note",))
    assert key_of(noted, CPU, "a") == key, "names of settings change no code"
    of_profiles = {key_of(settings_of(name, noted, VideoMemory(0, 1)), CPU, "a") for name in ("high", "mid", "low")}
    assert of_profiles == {key_of(CompileSettings(dynamic=True), CPU, "a")}, "what free VRAM chose finds others' code"


def test_files_used_longest_ago_go_first(tmp_path: Path) -> None:
    for index in range(4):
        path = tmp_path / f"{index}{ENDING}"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + index, 1000 + index))
    prune(tmp_path, tmp_path / f"0{ENDING}", most_bytes=250)
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["0", "3"]


def test_a_folder_that_cannot_be_written_costs_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with fresh_cache():
        kept_code(blocked / "below")
    assert "cannot be kept" in caplog.text


def kernel(folder: Path, name: str, version: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "kernel.json").write_text(json.dumps({"triton_version": version}))
    (folder / name / "kernel.cubin").write_bytes(bytes(1000))


def test_cache_shows_and_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triton = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("lowvram_video.compilation.triton_cache.triton_version", lambda: "3.5.0")
    kernel(triton, "old", "3.1.0")
    kernel(triton, "new", "3.5.0+git1")
    (triton / "unknown").mkdir()
    (triton / "damaged").mkdir()
    (triton / "damaged" / "a.json").write_text("[" * 100_000)
    code_folder().mkdir(parents=True)
    (code_folder() / f"a{ENDING}").write_bytes(bytes(5000))
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "1 files" in shown and "1 of another version" in shown and str(triton) in shown
    assert main(["cache", "--clear"]) == 0
    assert "1 kernels of another Triton" in capsys.readouterr().out
    assert sorted(path.name for path in triton.iterdir()) == ["damaged", "new", "unknown"]
    assert not list(code_folder().iterdir())
    monkeypatch.setattr("lowvram_video.compilation.triton_cache.triton_version", lambda: "none")
    assert TritonCache.here().stale() == []


def test_clearing_takes_what_inductor_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code that was kept comes back from there: the next start would find it all the same."""
    inductor = tmp_path / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inductor))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for name in ("fxgraph", "aotautograd", "cutedsl", "2x"):
        (inductor / name / "below").mkdir(parents=True)
        (inductor / name / "below" / "file").write_bytes(bytes(5000))
    (inductor / "2x" / "c2xabc.py").write_bytes(b"")
    for name in ("photos", "db", "cache", "triton"):  # the user's, beside it in a folder that the user chose
        (inductor / name).mkdir()
        (inductor / name / "mine.txt").write_text("mine")
    (inductor / "notes.txt").write_text("mine")
    (inductor / "my" / "folder").mkdir(parents=True)
    (inductor / "ab").symlink_to(inductor / "photos")
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert f"19.5 KiB, in {inductor}" in shown and " GB" not in shown and " MB" not in shown and " kB" not in shown
    assert main(["cache", "--clear"]) == 0
    left = sorted(path.name for path in inductor.iterdir())
    assert left == ["ab", "cache", "db", "my", "notes.txt", "photos", "triton"]


def test_inductors_folder_is_where_pytorch_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for user in ("me", r"DOMAIN\me", 'a:b*?"<>|'):
        monkeypatch.setattr("getpass.getuser", lambda user=user: user)
        assert str(InductorCache.here().folder) == default_cache_dir()


def test_files_that_go_while_they_are_listed_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process may prune or clear at the same time."""
    triton = tmp_path / "triton"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton))
    monkeypatch.setattr("lowvram_video.compilation.triton_cache.triton_version", lambda: "3.5.0")
    kernel(triton, "gone", "3.1.0")
    kernel(triton, "there", "3.1.0")
    (triton / "there" / "below").mkdir()
    code_folder().mkdir(parents=True)
    (code_folder() / f"there{ENDING}").write_bytes(bytes(5000))
    (code_folder() / f"gone{ENDING}").symlink_to(tmp_path / "nothing")  # is listed, and cannot be looked at
    scandir = os.scandir

    def vanishing(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(path).name in ("gone", "below"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert main(["cache"]) == 0
    assert "compiled code: 2 files, " in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert "deleted: " in capsys.readouterr().out


def test_kernels_of_this_triton_are_known_under_the_version_of_its_package(tmp_path: Path) -> None:
    """triton-windows 3.5.0.post21 and pytorch-triton 3.5.0+gitX call themselves 3.5.0 in what they write."""
    kernel(tmp_path, "mine", "3.5.0")
    kernel(tmp_path, "other", "3.5.1")
    for version in ("3.5.0", "3.5.0.post21", "3.5.0+git1", "3.5.0.dev2025"):
        assert [path.name for path in TritonCache(tmp_path, version).stale()] == ["other"], version


# --- profiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "total", "chosen"),
    [(80, 140, "high"), (24, 24, "high"), (23, 24, "mid"), (12, 16, "mid"), (11, 12, "low"), (30, 141, "low")],
)  # fmt: skip
def test_auto_goes_by_free_memory(free: int, total: int, chosen: str) -> None:
    made = settings_of("auto", CompileSettings(), VideoMemory(free * GIB, total * GIB))
    by_hand = settings_of(chosen, CompileSettings(), VideoMemory(0, 1))
    assert made.profile.startswith(f"auto ({chosen}:")
    assert CompileSettings(**{**vars(made), "profile": chosen}) == by_hand


def test_profiles_are_corrected_with_a_note_and_custom_is_not() -> None:
    memory, own = VideoMemory(GIB, GIB), CompileSettings(mode="max-autotune", cache_size_limit=7)
    assert settings_of("custom", own, memory) == own
    high, mid, low = (settings_of(name, own, memory) for name in ("high", "mid", "low"))
    assert (high.mode, high.fullgraph, high.transformer_blocks_only) == ("default", True, True)
    assert (mid.mode, mid.dynamic, low.mode) == ("default", True, "default")
    assert all(each.dynamic and "autotune" not in each.mode for each in (high, mid, low))
    limits = [(each.recompile_limit, each.cache_size_limit) for each in (high, mid, low)]
    assert limits == [(128, 8), (64, 4), (32, 2)]
    assert [len(each.notes) for each in (high, mid, low)] == [3, 1, 0]
    assert "arrive one after the other" in high.notes[0] and "CUDA graphs" in mid.notes[0]
    assert "CUDA graphs (mode max-autotune)" in high.notes[1] and "tuned (mode max-autotune)" in high.notes[2]
    for name in profiles.PROFILES:
        other = settings_of(name, CompileSettings(backend="cudagraphs"), memory)
        other.check()
        assert other.backend == "cudagraphs" and other.mode == "default"
        assert other.notes == (high.notes[:1] if other.profile.endswith("high") else ()), "modes are inductor's alone"
    with pytest.raises(ValueError, match="use one of custom, auto, high, mid, low"):
        settings_of("huge", own, memory)


@pytest.mark.parametrize(
    "path", [f"locales/{lang}/nodeDefs.json" for lang in ("en", "zh", "ja")]
    + [f"web/docs/LowVRAMTorchCompile{page}.md" for page in ("", "/zh", "/ja")],
)  # fmt: skip
def test_free_memory_is_in_one_unit_in_texts_and_in_why_a_profile_was_chosen(path: str) -> None:
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".json"):
        text = json.loads(text)["LowVRAMTorchCompile"]["inputs"]["profile"]["tooltip"]
    _, why = profiles.choose(VideoMemory(30 * GIB, 40 * GIB))
    assert "30 GiB" in why and "24 GiB" in text and not re.search(r"\d GB", text)


def test_tensorrt_is_refused_with_the_command() -> None:
    with pytest.raises(ValueError, match="pip install torch-tensorrt"):
        CompiledCode(layers(Layer), CompileSettings(backend="tensorrt"), CPU, "test")


def test_inductor_on_a_card_without_triton_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Triton is missing: install it .*triton-windows"):
        CompiledCode(layers(Layer), CompileSettings(), torch.device("cuda"), "test")


# --- what is shown ---------------------------------------------------------------------------------------


def test_what_is_worse_than_before_is_told() -> None:
    last = CompileReading("a", 2.0, Counts(1, 0, 2, 0), pass_seconds=1.0)
    now = CompileReading("a", 40.0, Counts(2, 1, 0, 2), ("forward: x",), pass_seconds=1.2)
    words = " / ".join(regressions(now.figures(96), last.figures(96)))
    assert "compiling took 40.0 s, 2.0 s in the last run: the code was not found in the cache" in words
    assert "1 recompiles, 0" in words and "1 graph breaks, 0" in words and "a pass takes 1.20 s, 1.00 s" in words
    assert regressions(last.figures(96), now.figures(96)) == ()
    other_size = regressions(CompileReading("a", pass_seconds=9.0).figures(100), last.figures(96))
    assert other_size == () == regressions(now.figures(96), {"seconds": "damaged", "rows": 96, "again": None})


def test_a_run_that_made_no_code_is_not_what_making_it_is_compared_with(tmp_path: Path) -> None:
    """A process makes code in its first run, and the next process does so again: that is no worse than before."""
    figures = [CompileReading("a", 9.0, Counts(1, 0, 0, 1)), CompileReading("a"), CompileReading("a", 8.0, Counts(1))]
    last: dict[str, object] = {}
    for reading in figures:
        assert regressions(reading.figures(96), last) == ()
        last = kept_figures(reading, 96, last)
    slower = CompileReading("a", 30.0, Counts(1, 1, 0, 1))
    words = " / ".join(regressions(slower.figures(96), last))
    assert "compiling took 30.0 s, 8.0 s" in words and "1 graph breaks, 0" in words


def test_a_run_is_compared_with_the_last_one(tmp_path: Path) -> None:
    blocks = layers(Layer)
    code = CompiledCode(blocks, CompileSettings(backend="aot_eager"), CPU, "test", folder=tmp_path)
    for pause in (0.01, 0.05):
        code.begin_run()
        for _ in range(5):
            with code.watching(3):
                blocks[0](torch.ones(3, 8))
                time.sleep(pause)
        shown = code.reading().lines()
        code.end_run()
    assert any("worse than before: a pass takes" in line for line in shown), shown
