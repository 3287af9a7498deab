"""The choice of attention by measurement: timed at a run's own size, kept by card, versions and size."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_video.attention import select
from lowvram_video.attention.backend import AttentionSpec, Backend
from lowvram_video.attention.probe import Machine
from lowvram_video.attention.select import select_attention, select_fastest
from lowvram_video.attention.timing import AttentionSize, attention_seconds
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.card_profile import AttentionRow, CardKey, CardProfile
from lowvram_video.wanvideo.streamed import StreamedWan

from . import tiny
from .inexact_packages import int8, sage_3
from .test_attention import CPU, SPEC, flash, machine, right

SIZE = AttentionSize(32760, 40)
PACKAGES = {"flash_attn": flash(), **int8(right), **sage_3(right)}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWVRAM_VIDEO_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "attention.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, AttentionSize]]]:
    """Backends take so many seconds; returns what was timed."""

    def use(**seconds: float) -> list[tuple[str, AttentionSize]]:
        calls: list[tuple[str, AttentionSize]] = []

        def fake(backend: Backend, spec: AttentionSpec, size: AttentionSize) -> float:
            calls.append((backend.name, size))
            return seconds[backend.name]

        monkeypatch.setattr(select, "attention_seconds", fake)
        return calls

    return use


def on(**versions: str) -> Machine:
    return replace(machine((12, 0), **PACKAGES), versions=lambda: versions)


SECONDS = {"sdpa": 2.0, "flash_attn_2": 3.0, "int8_attention": 1.0, "sageattn_3": 0.5}


def test_auto_times_exact_backends_at_the_runs_size_once(timed: Any, caplog: pytest.LogCaptureFixture) -> None:
    calls = timed(**SECONDS)
    assert select_fastest("auto", SPEC, SIZE, on()).name == "sdpa"
    assert calls == [("flash_attn_2", SIZE), ("sdpa", SIZE)]
    with caplog.at_level(logging.INFO):
        assert select_fastest("auto", SPEC, SIZE, on()).name == "sdpa"
    assert len(calls) == 2, "what was fastest is kept"
    assert "the fastest when it was timed for 32760 tokens, 40 heads" in caplog.text


def test_auto_fast_takes_8_bits_within_the_stated_error_and_not_4(timed: Any) -> None:
    timed(**SECONDS)
    assert select_fastest("auto_fast", SPEC, SIZE, on()).name == "int8_attention"
    assert select_fastest("auto", SPEC, SIZE, on()).name == "sdpa"


@pytest.mark.parametrize(
    "spec, size, where",
    [
        (SPEC, AttentionSize(75600, 40), on()),
        (SPEC, AttentionSize(32760, 24), on()),
        (replace(SPEC, dtype=torch.float16), SIZE, on()),
        (replace(SPEC, head_dim=64), SIZE, on()),
        (SPEC, SIZE, on(triton="3.6.0")),
    ],
)
def test_another_size_dtype_or_version_is_timed_anew(spec: Any, size: Any, where: Machine, timed: Any) -> None:
    calls = timed(**SECONDS)
    select_fastest("auto", SPEC, SIZE, on())
    before = len(calls)
    select_fastest("auto", spec, size, where)
    assert len(calls) == 2 * before


def test_what_cannot_run_any_more_is_not_taken(timed: Any) -> None:
    calls = timed(**SECONDS)
    assert select_fastest("auto_fast", SPEC, SIZE, on()).name == "int8_attention"
    without = replace(machine((12, 0), flash_attn=flash()), versions=dict)
    assert select_fastest("auto_fast", SPEC, SIZE, without).name == "sdpa"
    assert calls[-1][0] == "sdpa"


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"format": 9}', b'{"format": 1, "choices": [1]}', b"\xff" * 9, b"[" * 10**5]
)
def test_a_damaged_file_is_made_anew(damage: bytes, data: Path, timed: Any) -> None:
    timed(**SECONDS)
    data.parent.mkdir(parents=True)
    data.write_bytes(damage)
    assert select_fastest("auto", SPEC, SIZE, on()).name == "sdpa"
    assert list(json.loads(data.read_bytes())["choices"].values()) == ["sdpa"]


def test_a_file_that_names_no_backend_is_not_believed(data: Path, timed: Any) -> None:
    timed(**SECONDS)
    select_fastest("auto", SPEC, SIZE, on())
    found = json.loads(data.read_bytes())
    data.write_text(json.dumps({**found, "choices": {key: "int8_attention" for key in found["choices"]}}))
    assert select_fastest("auto", SPEC, SIZE, on()).name == "sdpa", "auto never takes an inexact one"


def test_a_folder_that_cannot_be_written_only_costs_time(data: Path, timed: Any) -> None:
    calls = timed(**SECONDS)
    data.parent.parent.mkdir(exist_ok=True)
    data.parent.write_text("no folder")
    for _ in range(2):
        assert select_fastest("auto", SPEC, SIZE, on()).name == "sdpa"
    assert len(calls) == 4


def test_memory_that_runs_out_while_timing_is_no_choice_for_good(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> float:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(select, "attention_seconds", short)
    assert select_fastest("auto", SPEC, SIZE, on()).exact
    assert not data.exists()


def test_memory_that_runs_out_while_what_is_kept_is_tried_stops_no_run(
    timed: Any, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    timed(**SECONDS)
    assert select_fastest("auto_fast", SPEC, SIZE, on()).name == "int8_attention"
    kept = data.read_bytes()

    def short(*_: Any) -> str | None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(select, "find_disagreement", short)
    assert select_fastest("auto_fast", SPEC, SIZE, on()).name == "sdpa"
    assert data.read_bytes() == kept


def test_a_backend_that_came_after_the_card_was_measured_is_timed_too(timed: Any) -> None:
    rows = (
        AttentionRow("sdpa", 24, 8192, 8192, 1.0, 50.0, 0.002),
        AttentionRow("flash_attn_2", 24, 8192, 8192, problem="missing"),
    )
    card = CardProfile(1, CardKey("x", "", "", ""), "2026-11-29", 1, True, True, attention=rows)
    where = replace(on(), card=lambda _: card)
    calls = timed(**{**SECONDS, "flash_attn_2": 1.0})
    assert select_attention("auto", SPEC, where).name == "flash_attn_2"
    assert {name for name, _ in calls} == {"sdpa", "flash_attn_2"}
    calls.clear()
    still_missing = replace(machine((12, 0)), card=lambda _: card)
    assert select_attention("auto", SPEC, still_missing).name == "sdpa"
    assert not calls


def test_a_backend_is_timed_by_calls_of_few_heads() -> None:
    shapes = []

    class Seen:
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(q.shape))
            return q

    backend: Any = SimpleNamespace(attend=Seen().attend)
    assert attention_seconds(backend, SPEC, AttentionSize(500, 40)) >= 0
    assert set(shapes) == {(1, 500, 4, 128)}


def test_the_choice_is_part_of_what_a_run_is_told_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU: another choice is another run, and by hand nothing is timed."""
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    chosen = SimpleNamespace(name="quick", exact=True, error=0.01, workspace=None)
    asked: list[tuple[str, AttentionSize]] = []

    def fastest(mode: str, spec: AttentionSpec, size: AttentionSize) -> Any:
        asked.append((mode, size))
        return chosen

    monkeypatch.setattr("lowvram_video.runtime.attending.select_fastest", fastest)
    model = StreamedWan(path, RunSettings())
    before = model.arithmetic["attention"]
    model.choose_attention(1000)
    assert model.arithmetic["attention"] == before and not asked, "nothing is timed on a CPU"
    monkeypatch.setattr(StreamedWan, "_may_time", property(lambda self: True))
    for _ in range(2):
        model.choose_attention(1000)
    assert asked == [("auto", AttentionSize(1000, 1))]
    assert model.arithmetic["attention"] == "quick" != before
    by_hand = StreamedWan(path, RunSettings(attention_mode="sdpa"))
    by_hand.choose_attention(1000)
    assert len(asked) == 1
    assert CPU.type == "cpu"


@pytest.mark.parametrize("late", [False, True], ids=["chosen on one card", "chosen on two"])
def test_cards_attend_by_what_all_of_them_have(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the choice is ours no card refuses what nobody asked it for; with one card the choice is made again."""
    caplog.set_level(logging.INFO)
    chosen = SimpleNamespace(name="quick", exact=True, error=0.01, workspace=None)
    monkeypatch.setattr("lowvram_video.runtime.attending.select_fastest", lambda *_: chosen)
    monkeypatch.setattr(StreamedWan, "_may_time", property(lambda self: True))
    model = StreamedWan(tiny.save_wan(tmp_path / "wan.safetensors"), RunSettings())
    for step in (model.use_cards, model.choose_attention)[:: 1 if late else -1]:
        step((CPU,) if step == model.use_cards else 1000)
    names = {each.model.execution.attention.name for each in (model, *model._others)}
    assert names == {"sdpa"}
    assert "attention: sdpa on all cards, as one of them has no quick" in caplog.text
    model.use_cards(())
    model.choose_attention(1000)
    assert model.model.execution.attention.name == "quick"
