"""Reports: interval arithmetic against brute force, JSON, the monitor, the timeline."""

import json
import os
import pickle
import threading
import time
from dataclasses import asdict, replace
from io import BytesIO
from itertools import combinations, pairwise
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowvram_video.memory.plan.footprint import GIB
from lowvram_video.memory.report.intervals import intersect, length, merge, split, subtract
from lowvram_video.memory.report.report import MemoryMonitor, MemorySample, PhaseReport, RunReport
from lowvram_video.memory.report.stream_log import KEPT_PASSES, CopyTimes, StreamLog
from lowvram_video.memory.report.timeline import FILE, NODE, Shape, draw_timeline, timeline_canvas
from lowvram_video.memory.stream.streams import Span
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

ticks = st.integers(0, 40)
interval_lists = st.lists(st.tuples(ticks, ticks).map(lambda pair: (min(pair), max(pair))), max_size=8)


def covered(intervals) -> set[int]:
    """Unit ticks under the intervals, the slow way."""
    return {tick for start, end in intervals for tick in range(start, end)}


def spans_of_a_pass(begin: float) -> list[Span]:
    """A pass of 50 ms over streamed blocks 0 and 2."""
    spans = [Span("copy", 0, 0, 5, 10**6), Span("copy", 2, 5, 40, 7 * 10**6)]
    spans += [Span("stall", 0, 0, 5), Span("compute", 0, 5, 20), Span("stall", 2, 30, 40), Span("compute", 2, 40, 50)]
    return [replace(span, begin=begin + span.begin / 1e3, end=begin + span.end / 1e3) for span in spans]


class TestIntervals:
    @given(interval_lists, interval_lists)
    def test_against_brute_force(self, a, b):
        assert covered(merge(a)) == covered(a)
        assert covered(subtract(a, b)) == covered(a) - covered(b)
        assert covered(intersect(a, b)) == covered(a) & covered(b)
        assert length(a) == len(covered(a))

    @given(interval_lists, ticks)
    def test_parts_before_and_after(self, a, at):
        before, after = split(a, at)
        assert covered(before) == {tick for tick in covered(a) if tick < at}
        assert covered(after) == {tick for tick in covered(a) if tick >= at}

    @given(interval_lists, interval_lists)
    def test_results_are_sorted_and_disjoint(self, a, b):
        for result in (merge(a), subtract(a, b), intersect(a, b)):
            assert all(start < end for start, end in result)
            assert all(left[1] < right[0] for left, right in pairwise(result))

    @given(interval_lists, interval_lists, interval_lists)
    def test_overlap_and_stall_against_brute_force(self, copies, computes, passes):
        stream = CopyTimes.of(copies, computes, passes).report(len(passes), 5 * 10**9)
        copied, exposed = covered(copies), covered(copies) - covered(computes)
        assert stream.copy_seconds == len(copied)
        if copied:
            assert stream.gbps == pytest.approx(5 / len(copied))
            assert stream.overlap_percent == pytest.approx(100 * (1 - len(exposed) / len(copied)))
        if passes:
            stalled = len(exposed & covered(passes))
            assert stream.stall_ms_per_pass == pytest.approx(1000 * stalled / len(passes))

    def test_a_pass_with_one_late_block(self):
        copies = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.5)]  # the third block arrives 0.5 s after the second is done
        computes = [(1.0, 2.0), (2.0, 3.0), (3.5, 4.5)]
        stream = CopyTimes.of(copies, computes, [(1.0, 4.5)]).report(1, 7 * 10**9)
        assert stream.gbps == pytest.approx(2.0)
        assert stream.stall_ms_per_pass == pytest.approx(500)
        assert stream.overlap_percent == pytest.approx(100 * 2.0 / 3.5)

    def test_spans_of_timed_streams(self):
        """Two passes over streamed blocks 0 and 2; block 1 is resident and only shows as time between them."""
        log = StreamLog()
        for begin in (3.0, 3.1):
            log.add(spans_of_a_pass(begin))
        assert log.passes == [(pytest.approx(3.0), pytest.approx(3.05)), (pytest.approx(3.1), pytest.approx(3.15))]
        stream = log.report()
        assert stream.bytes_streamed == 16 * 10**6
        assert stream.num_passes == 2
        assert stream.stall_ms_per_pass == pytest.approx(15)
        assert stream.overlap_percent == pytest.approx(100 * 25 / 40)
        assert stream.gbps == pytest.approx(16e6 / 0.080 / 1e9)

    def test_a_long_run_keeps_its_totals_and_its_last_passes(self):
        """A million spans; the second copy of a pass begins 0, 1 or 2 ms late, behind compute."""
        num_passes = 166_668
        log = StreamLog()
        for number in range(num_passes):
            begin, late = number / 10, number % 3 / 1e3
            log.add([Span("copy", 0, begin, begin + 0.005, 10**6), Span("stall", 0, begin, begin + 0.005)])
            log.add([Span("copy", 2, begin + 0.005 + late, begin + 0.04, 7 * 10**6)])
            log.add([Span("compute", 0, begin + 0.005, begin + 0.02), Span("stall", 2, begin + 0.03, begin + 0.04)])
            log.add([Span("compute", 2, begin + 0.04, begin + 0.05)])
        held_bytes = len(pickle.dumps(log))
        print(f"{6 * num_passes} spans: {held_bytes} bytes are held")
        assert held_bytes < 2**12
        stream = log.report()
        assert (stream.bytes_streamed, stream.num_passes) == (num_passes * 8 * 10**6, num_passes)
        assert stream.copy_seconds == pytest.approx(num_passes * 0.039, rel=1e-9)  # 40, 39 or 38 ms
        assert stream.overlap_percent == pytest.approx(100 * 24 / 39)
        assert stream.stall_ms_per_pass == pytest.approx(15)
        assert KEPT_PASSES <= len(log.passes) <= 2 * KEPT_PASSES
        last = (num_passes - 1) / 10
        assert log.passes[-1] == (pytest.approx(last), pytest.approx(last + 0.05))

    def test_nothing_streamed(self):
        stream = CopyTimes.of([], [(0.0, 1.0)], [(0.0, 1.0)]).report(1, 0)
        assert (stream.gbps, stream.overlap_percent, stream.stall_ms_per_pass) == (0.0, 100.0, 0.0)


def example_report() -> RunReport:
    samples = tuple(MemorySample(t / 10, (1 + t % 5) * GIB, t % 5 * GIB, 2 * GIB) for t in range(100))
    phases = (
        PhaseReport("encode", 0.0, 2.0, 3 * GIB, 2 * GIB, 2 * GIB),
        PhaseReport("denoise", 2.0, 6.0, 5 * GIB, 4 * GIB, 3 * GIB, predicted_bytes=int(4.6 * GIB)),
        PhaseReport("decode", 8.0, 2.0, 4 * GIB, 3 * GIB, 2 * GIB),
    )
    copies = [(2 + 0.1 * i, 2.08 + 0.1 * i) for i in range(59)]
    computes = [(2.1 + 0.1 * i, 2.2 + 0.1 * i) for i in range(58)]
    passes = [(2.0 + 2 * i, 4.0 + 2 * i) for i in range(3)]
    return RunReport(
        phases, samples, CopyTimes.of(copies, computes, passes).report(len(passes), 10**10),
        tuple(copies), tuple(computes), tuple(passes), pinned_bytes=GIB, other_bytes=GIB // 2, budget_bytes=5 * GIB,
    )  # fmt: skip


def scaled_report(time: float, memory: float) -> RunReport:
    """The example, that many times as long and as large."""
    report = example_report()
    samples = tuple(
        replace(sample, seconds=sample.seconds * time, device_bytes=int(sample.device_bytes * memory))
        for sample in report.samples
    )
    phases = tuple(
        replace(
            phase, start=phase.start * time, seconds=phase.seconds * time,
            device_peak_bytes=int(phase.device_peak_bytes * memory),
            predicted_bytes=phase.predicted_bytes and int(phase.predicted_bytes * memory),
        ) for phase in report.phases
    )  # fmt: skip
    copies, computes, passes = (
        tuple((start * time, end * time) for start, end in intervals)
        for intervals in (report.copies, report.computes, report.passes)
    )
    stream = CopyTimes.of(copies, computes, passes).report(1000, 10**13)
    return replace(
        report, samples=samples, phases=phases, stream=stream, copies=copies, computes=computes, passes=passes,
        other_bytes=int(report.other_bytes * memory), budget_bytes=int(report.budget_bytes * memory),
    )  # fmt: skip


def drawn_texts(figure: Figure) -> list[Text]:
    """All letters of a figure that was drawn: matplotlib also has labels of ticks beyond the axes' ends."""
    hidden = {
        tick_label
        for axis in figure.findobj(Axis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for tick_label in (tick.label1, tick.label2)
    }
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


class TestRunReport:
    def test_json_holds_it_all(self, tmp_path: Path):
        for report in (example_report(), RunReport(())):
            report.save(tmp_path / "report.json")
            held = json.loads((tmp_path / "report.json").read_text())
            assert held == json.loads(json.dumps(asdict(report)))
        assert os.listdir(tmp_path) == ["report.json"]

    def test_table(self):
        report = example_report()
        table = report.table()
        print(table)
        assert report.vram_peak_bytes == int(4.5 * GIB)
        denoise = next(line for line in table.splitlines() if line.startswith("denoise"))
        assert "4.50 GiB" in denoise and "4.60 GiB" in denoise and "-2.2 %" in denoise
        assert "budget 5.00 GiB, used at most 4.50 GiB" in table
        assert "streamed 10.0 GB in 3 passes" in table
        assert "pinned 1.00 GiB, RAM peak 3.00 GiB" in table
        assert max(len(line) for line in table.splitlines()[: 1 + len(report.phases)]) <= 66  # a node's width


class FakeDevice:
    """Memory that a test sets; optionally lost after some reads."""

    def __init__(self, fails_after: int | None = None):
        self.used, self.reserved, self.reads, self.fails_after = 0, 0, 0, fails_after

    def __call__(self) -> tuple[int, int]:
        self.reads += 1
        if self.fails_after is not None and self.reads > self.fails_after:
            raise RuntimeError("device lost")
        return self.used, self.reserved


class TestMemoryMonitor:
    def test_peaks_belong_to_their_phase(self):
        device = FakeDevice()
        with MemoryMonitor(period_seconds=0.002, read_device=device) as monitor:
            for name, used in (("encode", 3), ("denoise", 7), ("decode", 5)):
                with monitor.phase(name):
                    device.used, device.reserved = used, used - 1
                    time.sleep(0.03)
                    device.used, device.reserved = 1, 1
        report = monitor.report()
        peaks = {phase.name: (phase.device_peak_bytes, phase.reserved_peak_bytes) for phase in report.phases}
        assert peaks == {"encode": (3, 2), "denoise": (7, 6), "decode": (5, 4)}
        assert all(phase.seconds >= 0.03 for phase in report.phases)
        assert [phase.start for phase in report.phases] == sorted(phase.start for phase in report.phases)
        assert all(phase.rss_peak_bytes > 0 for phase in report.phases)

    def test_a_phase_entered_again_adds_up(self):
        device = FakeDevice()
        with MemoryMonitor(period_seconds=10, read_device=device) as monitor:
            for used in (9, 4):
                device.used = used
                with monitor.phase("denoise"):
                    time.sleep(0.01)
        (phase,) = monitor.report().phases
        assert phase.device_peak_bytes == 9 and phase.seconds >= 0.02

    def test_phases_do_not_nest(self):
        nested = pytest.raises(ValueError, match="'decode' was begun inside phase 'denoise'")
        with MemoryMonitor() as monitor, monitor.phase("denoise"), nested, monitor.phase("decode"):
            pass

    def test_an_exception_passes_through_and_the_thread_ends(self):
        monitor = MemoryMonitor(period_seconds=0.001)
        with pytest.raises(KeyError), monitor, monitor.phase("denoise"):
            raise KeyError("in the run")
        assert "memory-monitor" not in {thread.name for thread in threading.enumerate()}
        assert [phase.name for phase in monitor.report().phases] == ["denoise"]
        with monitor, monitor.phase("decode"):  # usable again
            pass

    def test_a_lost_device_ends_the_watching_only(self):
        device = FakeDevice(fails_after=3)
        with MemoryMonitor(period_seconds=0.001, read_device=device) as monitor, monitor.phase("denoise"):
            time.sleep(0.02)
        assert monitor.fault == "RuntimeError: device lost"
        assert device.reads == 4
        assert len(monitor.report().samples) == 3

    def test_long_runs_are_thinned_to_their_peaks(self):
        monitor = MemoryMonitor(read_device=(device := FakeDevice()))
        for index in range(40_000):
            device.used = 100 if index == 23_456 else index % 7
            monitor._sample()
        samples = monitor.report().samples
        assert len(samples) <= 2000
        assert max(sample.device_bytes for sample in samples) == 100
        assert [s.seconds for s in samples] == sorted(s.seconds for s in samples)

    def test_cost_of_a_look(self):
        monitor = MemoryMonitor()
        start = time.perf_counter()
        for _ in range(500):
            monitor._sample()
        cost = (time.perf_counter() - start) / 500
        print(f"one sample takes {1e6 * cost:.0f} us, of a period of 10,000 us")
        assert cost < 1e-3

    def test_rss_agrees_with_psutil(self):
        with MemoryMonitor() as monitor:
            pass
        assert monitor.report().samples[-1].rss_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


class TestTimeline:
    @pytest.mark.parametrize("streamed", [True, False])
    def test_is_a_picture_of_the_expected_size(self, streamed: bool):
        report = example_report()
        if not streamed:
            report = replace(report, stream=None, copies=(), computes=(), passes=(), budget_bytes=None)
        with Image.open(BytesIO(draw_timeline(report))) as image:
            image.load()
            assert (image.format, image.size) == ("PNG", (1200, 960))
            colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
        # copy stream, compute stream and budget line are there exactly where there is something to show
        for color in ((0xF0, 0xA8, 0x4B), (0x6C, 0xC0, 0x7E), (0xFF, 0x7B, 0x72)):
            assert (color in colors) == streamed
        assert (0x6E, 0xA8, 0xFE) in colors
        assert (0xFF, 0xD8, 0x66) in colors, "the peak that was predicted"

    def test_a_run_on_the_processor_shows_its_ram(self):
        report = example_report()
        phases = tuple(replace(phase, device_peak_bytes=0, predicted_bytes=None) for phase in report.phases)
        samples = tuple(replace(sample, device_bytes=0) for sample in report.samples)
        axes = timeline_canvas(replace(report, phases=phases, samples=samples)).figure.axes[0]
        (curve,) = (line for line in axes.lines if line.get_label() == "RAM")
        assert max(curve.get_ydata()) == 2  # GiB, of the example
        assert "VRAM" not in replace(report, phases=phases, samples=samples, budget_bytes=None).table()

    @pytest.mark.parametrize("shape", [FILE, NODE], ids=["file", "node"])
    @pytest.mark.parametrize("starts", [(0.0, 2.0, 8.0), (0.0, 0.1, 9.9), (0.0, 9.8, 9.9), (0.0, 0.01, 0.02)])
    def test_names_of_phases_never_collide(self, starts: tuple[float, ...], shape: Shape):
        report = example_report()
        phases = tuple(replace(phase, start=start) for phase, start in zip(report.phases, starts, strict=True))
        canvas = timeline_canvas(replace(report, phases=phases), shape)
        canvas.draw()
        axes = canvas.figure.axes[0]
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == len(phases)
        assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
        assert all(box.x0 >= 0 and box.x1 <= 1200 for box in boxes)

    @pytest.mark.parametrize(("seconds", "gib"), [(0.004, 90.0), (10.0, 5.0), (4000.0, 0.02)])
    def test_everything_is_legible_in_a_node(self, seconds: float, gib: float):
        """In one 500 pixels wide, whose picture is 445 or more: no letters below 11 pixels, none on others."""
        canvas = timeline_canvas(scaled_report(seconds / 10, gib / 5), NODE)
        canvas.draw()
        width, height = canvas.get_width_height()
        assert width / height > 2, "the node's picture is wide, as its room is"
        texts = drawn_texts(canvas.figure)
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) > 15
        over = [(one, other) for one, other in combinations(range(len(boxes)), 2) if boxes[one].overlaps(boxes[other])]
        assert [(texts[one].get_text(), texts[other].get_text()) for one, other in over] == []
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
        assert min(text.get_fontsize() for text in texts) * canvas.figure.dpi / 72 * 445 / width >= 11

    def test_an_empty_run(self):
        assert len(draw_timeline(RunReport(()))) > 1000
