"""The scenarios of comfyui_queue.py: what is queued, and what must hold of the server's memory meanwhile."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import GIB
from queue_server import ON_GPU, Bench, State

FLAT_SHARE = 0.01
RSS_NOISE_BYTES = 32 * 2**20  # a server's own garbage comes and goes; more than 1 % of a tiny model's server
FAULTS = (OSError, RuntimeError, ValueError, LookupError, TypeError, AssertionError, http.client.HTTPException)


@dataclass
class Record:
    """What a scenario found: its figures, checks, and what went wrong."""

    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    error: str = ""
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, what: str, passed: bool, figure: object = None) -> None:
        self.checks.append({"check": what, "passed": bool(passed), "figure": figure})

    @property
    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        return "ok" if not self.error and all(check["passed"] for check in self.checks) else "FAILED"


# --- scenarios -------------------------------------------------------------------------------------------


def turns(bench: Bench, record: Record) -> None:
    """Two workflows in turn, each `num_turns` times: memory after each is the same from the third turn on.

    One prompt at a time, to look at the memory between them; at last four that are queued at once.
    """
    bench.server()
    rows = record.figures["rows"] = []
    models = {"large": bench.size.large, "small": bench.size.small}
    for turn in range(bench.size.num_turns):
        for name, model in models.items():
            ran = bench.run(bench.workflow(model, seed=turn, budget_gib=bench.size.budget_gib))
            bench.latent(ran)
            row = {"workflow": name, "turn": turn, "seconds": ran.seconds, "peak_bytes": ran.peak_bytes}
            rows.append(row | bench.state())
    for name in models:
        late = [row for row in rows if row["workflow"] == name][2:]
        for kind in ("vram_bytes", "rss_bytes", "pinned_bytes"):
            values = [row[kind] for row in late if row[kind] is not None] or [0]
            spread = max(values) - min(values)
            noise = RSS_NOISE_BYTES if kind == "rss_bytes" else 0
            flat = spread <= max(FLAT_SHARE * max(values), noise)
            record.check(
                f"{name}: {kind} flat within 1 %{' or 32 MiB' if noise else ''}", flat, spread / max(1, *values)
            )
    pair = [bench.workflow(model, seed=1, budget_gib=bench.size.budget_gib) for model in models.values()]
    again = [bench.workflow(model, seed=1, budget_gib=bench.size.budget_gib) for model in models.values()]
    prompts = [bench.queue(graph) for graph in (*pair, *again)]
    record.figures["queued"] = len(bench.server_now.get("/queue")["queue_pending"])
    ends = [bench.wait(prompt).status for prompt in prompts]
    record.check("four prompts queued at once", ends == ["success"] * 4, ends)
    _check_budget(bench, record, max(row["peak_bytes"] for row in rows))


def interrupt(bench: Bench, record: Record) -> None:
    """An interrupt while the weights are read, and one in mid-step: memory returned, the next prompt as before."""
    bench.server()
    budget = bench.size.budget_gib
    reference = bench.latent(bench.run(bench.workflow(bench.size.large, budget_gib=budget)))
    two_steps = bench.run(bench.workflow(bench.size.large, budget_gib=budget)).seconds
    loaded, freed = bench.state(), bench.free()
    record.figures |= {"loaded": loaded, "freed": freed}
    for moment, step, pause in (("while weights are read", 0, 0.3), ("in mid-step", 1, two_steps / 4)):
        prompt = bench.queue(bench.workflow(bench.size.large, steps=bench.size.endless_steps, budget_gib=budget))
        _wait_for_step(bench, prompt, step)
        time.sleep(pause)
        began = time.monotonic()
        bench.server_now.post("/interrupt", {})
        ran = bench.wait(prompt)
        seconds = time.monotonic() - began
        time.sleep(0.5)
        after = bench.state()
        record.figures[moment] = {"seconds": seconds, **after}
        interrupted = any(kind == "execution_interrupted" for kind, _ in ran.messages)
        record.check(f"{moment}: interrupted within 5 s", interrupted and seconds < 5, seconds)
        _check_returned(record, f"{moment}, interrupted", loaded, after, freed)
        again = bench.run(bench.workflow(bench.size.large, budget_gib=budget))
        error = _difference(bench.latent(again), reference)
        record.check(f"{moment}: the next prompt gives the same latent", error <= 1e-2, error)


def eviction(bench: Bench, record: Record) -> None:
    """Our large model and the small one with core's loader in turn on a small card: each evicts the other."""
    server = bench.server()
    bench.free()
    rows = record.figures["rows"] = []
    with bench.small_card():
        for turn in range(3):
            for name, graph in (
                ("ours", bench.workflow(bench.size.large, seed=turn)),
                ("core", bench.workflow(bench.size.small, seed=turn, core=True)),
            ):
                ran = bench.run(graph)
                bench.latent(ran)
                row = {"model": name, "turn": turn, "seconds": ran.seconds, "peak_bytes": ran.peak_bytes}
                rows.append(row | bench.state())
        freed = bench.free()
    record.figures["freed"] = freed
    held = {
        name: [sum(size for kind, size in row["loaded"] if (kind == OUR_PATCHER) is mine) for row in rows]
        for name, mine in (("ours", True), ("core", False))
    }
    record.figures["loaded_bytes"] = held
    record.check("the log has no error", "Traceback" not in server.log_text())
    if ON_GPU:
        record.check("core evicts ours", all(held["ours"][i + 1] < held["ours"][i] for i in (0, 2, 4)), held["ours"])
        record.check("ours evicts core", all(held["core"][i + 1] < held["core"][i] for i in (1, 3)), held["core"])
    loaded = max(rows, key=lambda row: row["vram_bytes"])
    _check_returned(record, "POST /free", loaded, freed, bench.idle)


def compiled(bench: Bench, record: Record) -> None:
    """Compiled blocks together with streaming, three seeds: no recompile after the first, and its speed."""
    server = bench.server()
    options = {"steps": 3, "budget_gib": bench.size.budget_gib}
    bench.latent(bench.run(bench.workflow(bench.size.large, **options)))
    plain = bench.run(bench.workflow(bench.size.large, **options))
    runs, recompiles = [], []
    for seed in (1, 2, 3):
        ran = bench.run(bench.workflow(bench.size.large, seed=seed, compiled=True, **options))
        latent = bench.latent(ran)
        if seed == 1:
            record.figures["difference_from_eager"] = _difference(latent, bench.latent(plain))
        runs.append(ran)
        recompiles.append(server.log_text().count("Recompiling function"))
    seconds = [ran.seconds for ran in runs]
    speed = {"seconds_per_step": seconds[-1] / 3, "eager_seconds_per_step": plain.seconds / 3}
    record.figures |= {"seconds": seconds, "recompiles": recompiles, **speed, **bench.state()}
    record.check("no recompile after the first seed", recompiles[-1] == recompiles[0], recompiles)
    record.check("the log has no error", "Traceback" not in server.log_text())
    _check_budget(bench, record, max(ran.peak_bytes for ran in runs))


def flagged(bench: Bench, record: Record, *flags: str, budget: bool = True) -> None:
    """The large model under ComfyUI's flags: speed once loaded, peaks, and the Memory Report."""
    bench.server(*flags)
    budget_gib = bench.size.budget_gib if budget else None
    first = bench.run(bench.workflow(bench.size.large, steps=1, budget_gib=budget_gib))
    graph = bench.workflow(bench.size.large, steps=4, budget_gib=budget_gib)
    ran = bench.run(graph)
    bench.latent(first)
    bench.latent(ran)
    state = bench.state()
    peak = max(first.peak_bytes, ran.peak_bytes)
    record.figures |= {"flags": flags, "seconds_per_step": ran.seconds / 4, "first_seconds": first.seconds}
    record.figures |= {"peak_bytes": peak, **state, "report": bench.report(graph).splitlines()}
    if budget:
        _check_budget(bench, record, peak)


def default(bench: Bench, record: Record) -> None:
    """No flags, within Block Swap's budget."""
    flagged(bench, record)


def reserve_vram(bench: Bench, record: Record) -> None:
    """So much reserved that a card of `reserve_leaves_gib` is left; no Block Swap."""
    if not ON_GPU:
        flagged(bench, record, "--reserve-vram", "1", budget=False)
        return
    bench.stop()
    free, _ = torch.cuda.mem_get_info()
    reserve = round(free / GIB - bench.size.reserve_leaves_gib, 1)
    flagged(bench, record, "--reserve-vram", str(reserve), budget=False)
    left = (free - record.figures["peak_bytes"]) / GIB
    record.check(f"{reserve} GiB stay free at the peak", left >= reserve, left)


def highvram(bench: Bench, record: Record) -> None:
    """All blocks stay on the card."""
    flagged(bench, record, "--highvram", budget=False)
    size = (bench.base / "models" / "diffusion_models" / bench.size.large.file).stat().st_size
    # the text's keys and values are made once, and the weights for that (a seventh) need not stay
    record.check("all blocks are in VRAM", record.figures["allocated_bytes"] >= 0.8 * size)


def lowvram(bench: Bench, record: Record) -> None:
    """All blocks are streamed."""
    flagged(bench, record, "--lowvram", budget=False)
    size = (bench.base / "models" / "diffusion_models" / bench.size.large.file).stat().st_size
    record.check("a fraction of the model is in VRAM", record.figures["allocated_bytes"] < 0.5 * size)


def disable_pinned_memory(bench: Bench, record: Record) -> None:
    """Streaming from pageable memory."""
    flagged(bench, record, "--disable-pinned-memory")
    record.check("nothing is pinned", record.figures["pinned_bytes"] == 0, record.figures["pinned_bytes"])


def cuda_malloc(bench: Bench, record: Record) -> None:
    """The driver's allocator, where it is not ComfyUI's default here."""
    if "cudaMallocAsync" in str(bench.servers.get("", {}).get("device")):
        record.skipped = "it is the default here"
    else:
        flagged(bench, record, "--cuda-malloc")


def disable_cuda_malloc(bench: Bench, record: Record) -> None:
    """PyTorch's own allocator."""
    flagged(bench, record, "--disable-cuda-malloc")


@dataclass(frozen=True)
class Scenario:
    """What runs, and for how long at most."""

    action: Callable[[Bench, Record], None]
    seconds: float
    on_cpu: bool = True
    own_server: bool = False


SCENARIOS = {
    "turns": Scenario(turns, 120),
    "default": Scenario(default, 60),
    "interrupt": Scenario(interrupt, 90),
    "eviction": Scenario(eviction, 90),
    "compiled": Scenario(compiled, 150),
    "reserve-vram": Scenario(reserve_vram, 75, own_server=True),
    "highvram": Scenario(highvram, 75, on_cpu=False, own_server=True),
    "lowvram": Scenario(lowvram, 75, on_cpu=False, own_server=True),
    "disable-pinned-memory": Scenario(disable_pinned_memory, 75, own_server=True),
    "disable-cuda-malloc": Scenario(disable_cuda_malloc, 75, own_server=True),
    "cuda-malloc": Scenario(cuda_malloc, 75, own_server=True),
}
OUR_PATCHER = "StreamedModelPatcher"


# --- parts of scenarios ----------------------------------------------------------------------------------


def _check_budget(bench: Bench, record: Record, peak_bytes: int) -> None:
    if ON_GPU:
        budget = bench.size.budget_gib
        record.check(f"never above the budget of {budget} GiB", peak_bytes <= budget * GIB, peak_bytes / GIB)


LIBRARY_BYTES = 384 << 20


def _check_returned(record: Record, what: str, loaded: State, after: State, empty: State) -> None:
    """Nothing pinned, nothing loaded, and 95 % of the VRAM between `loaded` and `empty` free again."""
    record.check(f"{what}: nothing is pinned", after["pinned_bytes"] == 0, after["pinned_bytes"])
    resident = sum(size for _, size in after["loaded"])
    record.check(f"{what}: nothing is loaded", resident == 0, resident)
    if ON_GPU:
        taken = loaded["vram_bytes"] - empty["vram_bytes"]
        share = (loaded["vram_bytes"] - after["vram_bytes"]) / max(1, taken)
        # what libraries took meanwhile (cuBLAS, core's own loader) stays in the process
        left = after["vram_bytes"] - empty["vram_bytes"]
        record.check(f"{what}: VRAM is returned", share >= 0.95 or left <= LIBRARY_BYTES, share)


def _wait_for_step(bench: Bench, prompt: str, step: int) -> None:
    """Until the sampler of a prompt has done so many steps (0: has begun)."""
    while time.monotonic() < bench.deadline:
        progress = bench.server_now.get("/bench/state")["progress"]
        if progress["prompt"] == prompt and progress.get("sample", -1) >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached in the scenario's time")


def _difference(latent: torch.Tensor, reference: torch.Tensor) -> float:
    return float((latent - reference).abs().max() / reference.abs().max())


def run_scenario(bench: Bench, name: str, seconds_left: float) -> Record:
    """Run one; what goes wrong is in the record."""
    scenario, record, began = SCENARIOS[name], Record(), time.monotonic()
    if not ON_GPU and not scenario.on_cpu:
        record.skipped = "ComfyUI takes this flag on a GPU only"
        return record
    if seconds_left < 5:
        record.skipped = "no time is left"
        return record
    bench.deadline = began + min(scenario.seconds, seconds_left)
    if bench.launched is not None:
        bench.launched.mark = bench.launched.log.stat().st_size
    try:
        scenario.action(bench, record)
    except FAULTS as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.verdict == "FAILED" and bench.launched is not None:
        record.log = bench.launched.tail()
    if record.error:
        bench.stop()
    record.seconds = time.monotonic() - began
    return record
