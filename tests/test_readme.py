"""README and docs/benchmarks.md against what they speak of: figures and their files, links, nodes, flags, tables."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lowvram_video.benchmarks.card_table import LANGUAGES, MARKS, card_table
from lowvram_video.cli.main import make_parser

from .faults.table import MARKS as FAULT_MARKS
from .faults.table import readme_table
from .test_help import commands
from .test_search_words import found_by

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL_LANGUAGES = {name: (ROOT / words.readme).read_text(encoding="utf-8") for name, words in LANGUAGES.items()}
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
ALL_PAGES = {**ALL_LANGUAGES, "benchmarks": BENCHMARKS.read_text(encoding="utf-8")}
RESULTS_FILE = re.compile(r"`((?:[\w/]+/)?[\w-]+_(?:h200|cpu)_\d{4}-\d\d-\d\d\.json)`")
FIGURE = re.compile(r"(?<![\w.×,-])\d+\.\d{2,3}(?![\w.]|, \d\.\d)")  # two decimals and more were measured
LONGEST_LIST = 12  # of leaves that a figure is looked for among: longer lists are samples
VERSIONS = {"3.10", "0.33"}  # of Python and ComfyUI


# --- figures ---------------------------------------------------------------------------------------------


@cache
def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def leaves(value: Any) -> Iterator[float]:
    """All numbers of a results file, those in its tables of text too."""
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list) and (len(value) <= LONGEST_LIST or not _is_samples(value)):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(number) for number in re.findall(r"\d+\.\d+", value))


def _is_samples(value: list[Any]) -> bool:
    return all(isinstance(each, (int, float)) for each in value)


def row(rows: list[dict[str, Any]], name: str, key: str = "step") -> float:
    """A figure of the row of that name."""
    return float(next(each for each in rows if each["name"] == name)[key])


IN_480P, IN_8_BITS = "exact_step_480p_h200_2026-11-30.json", "exact_step_720p_8_bits_h200_2026-11-30.json"


def exact(name: str, limit: str, file: str = "exact_step_h200_2026-11-30.json") -> float:
    """A step by its limit, the quicker of those before and after it."""
    found = next(each for each in load(file)["files"] if any(row["name"] == name for row in each["rows"]))
    return row(found["rows"], name) / min(found["limits"][limit], found["limits_after"][limit])


def alike(*figures: float) -> float:
    """A figure that several rows have, to three decimals."""
    assert len({f"{figure:.3f}" for figure in figures}) == 1, figures
    return figures[0]


def in_pieces(way: int) -> float:
    """A step at 720p cut one way, by its limit."""
    found = load("pieces_720p_h200_2026-11-30.json")
    return float(found["steps"][way]["step"] / found["limit"])


def by_resident(file: str, name: str = "480p in 2.6", resident: str = "480p resident") -> float:
    """A streamed step by the resident one."""
    rows = load(file)["files"][0]["rows"]
    return row(rows, name) / row(rows, resident)


def by_bytes(name: str, file: str) -> float:
    """A step by the time of its blocks' bytes on the bus."""
    found = next(row for each in load(file)["files"] for row in each["rows"] if row["name"] == name)
    return float(found["step"] * found["h2d_gbps"] * 1e9 / found["streamed_bytes"])


def form(name: str, beside: str = "fp8, bf16 products") -> float:
    """A step of a form by one of another form."""
    rows = load("quantized_runs_h200_2026-11-28.json")["cases"]
    return row(rows, name) / row(rows, beside)


def framepack_limit(file: str) -> float:
    """Seconds of a step's products and attention."""
    case = load(file)["cases"][0]
    products, attention = case["sustained_tflops"]
    return float(case["products_tflop"] / products + case["attention_tflop"] / attention)


def added_by(part: str, rows: list[dict[str, Any]], key: str = "reserved_peak_gib") -> float:
    """GiB that a run with a step cache takes beside an uncached one."""
    return row(rows, part, key) - row(rows, "uncached", key)


# What follows from figures of results files rather than being one of them.
DERIVED: dict[str, Callable[[], float]] = {
    "0.94": lambda: added_by("teacache", load("step_cache_runs_h200_2026-11-29.json")["rows"]),
    "0.803": lambda: framepack_limit("framepack_h200_2026-11-28.json"),
    "0.801": lambda: framepack_limit("framepack_h200_2026-11-29.json"),
    "1.09": lambda: load("framepack_h200_2026-11-28.json")["cases"][0]["step"] / DERIVED["0.803"](),
    "1.047": lambda: load("framepack_h200_2026-11-29.json")["cases"][0]["step"] / DERIVED["0.801"](),
    "1.016": lambda: alike(
        exact("480p resident", "81x480x832 bf16", IN_480P), exact("720p fp8_fast", "81x720x1280 fp8", IN_8_BITS)
    ),
    "1.038": lambda: by_resident("exact_step_before_first_queries_h200_2026-11-29.json"),
    "1.028": lambda: by_resident("exact_step_first_queries_h200_2026-11-29.json"),
    "0.999": lambda: exact("720p resident", "81x720x1280 bf16"),
    "1.005": lambda: exact("720p in 4.0", "81x720x1280 bf16"),
    "1.046": lambda: exact("480p in 2.6", "81x480x832 bf16", "exact_step_first_queries_h200_2026-11-29.json"),
    "1.039": lambda: exact("480p in 2.6", "81x480x832 bf16", IN_480P),
    "1.036": lambda: exact("480p fp8_fast", "81x480x832 fp8", IN_480P),
    "1.059": lambda: exact("480p 8-bit k and v in 2.3", "81x480x832 fp8", IN_480P),
    "1.033": lambda: exact("720p 8-bit k and v in 3.5", "81x720x1280 fp8", IN_8_BITS),
    "1.022": lambda: by_resident(IN_480P),
    "1.021": lambda: by_resident(IN_480P, "480p 8-bit k and v in 2.3", "480p fp8_fast"),
    "1.017": lambda: by_resident(IN_8_BITS, "720p 8-bit k and v in 3.5", "720p fp8_fast"),
    "1.052": lambda: in_pieces(0),
    "1.013": lambda: in_pieces(1),
    "1.034": lambda: in_pieces(2),
    "1.008": lambda: alike(
        in_pieces(3), exact("480p Q4_K fp8_fast", "81x480x832 fp8", "exact_step_q4_k_h200_2026-11-29.json")
    ),
    "0.998": lambda: by_bytes("clip bf16 in 4", "exact_step_clip_h200_2026-11-30.json"),
    "0.975": lambda: exact("480p Q4_K", "81x480x832 bf16", "exact_step_q4_k_h200_2026-11-29.json"),
    "1.014": lambda: 1 / row(load("several_cards_two_h200_2026-11-29.json")["rows"], "480p parked", "speed_up"),
    "0.854": lambda: form("fp8_fast"),
    "0.892": lambda: form("int8"),
    "0.977": lambda: form("Q8_0"),
    "0.959": lambda: form("Q4_K"),
    "1.027": lambda: form("fp8 + LoRA r64"),
    "1.029": lambda: form("fp8 + 4 LoRAs r64"),
    "1.045": lambda: form("fp8_fast + LoRA r64", "fp8_fast"),
    "1.074": lambda: form("fp8_fast + 4 LoRAs", "fp8_fast"),
}


def sections(page: str) -> list[tuple[str, str]]:
    """(heading, text) of a page without code and the table of cards."""
    text = re.sub(r"```.*?```|<!-- cards.*?<!-- end of cards -->", "", ALL_PAGES[page], flags=re.DOTALL)
    parts = re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)
    return list(zip(["", *parts[1::2]], parts[::2], strict=True))


SECTIONS = {f"{page}: {heading}": text for page in ("en", "benchmarks") for heading, text in sections(page)}


@pytest.mark.parametrize("heading", SECTIONS)
def test_figures_are_those_of_the_results_files_that_are_named(heading: str) -> None:
    text = SECTIONS[heading]
    named = [Path(name).name for name in RESULTS_FILE.findall(text)]
    gone = [name for name in named if not (RESULTS / name).is_file()]
    assert not gone, f"{heading}: no such results file: {gone}"
    numbers = [number for name in named for number in leaves(load(name))]
    unknown = []
    for figure in dict.fromkeys(FIGURE.findall(text)):
        decimals = len(figure.partition(".")[2])
        known = {f"{value:.{decimals}f}" for number in numbers for value in (number, number / 2**30, number / 1000)}
        if figure in DERIVED:
            known.add(f"{DERIVED[figure]():.{decimals}f}")
        if figure not in known and figure not in VERSIONS:
            unknown.append(figure)
    assert not unknown, f"{heading}: {unknown} are in none of {named or 'no results file'}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_cards_is_what_plans_say(language: str) -> None:
    shown = ALL_LANGUAGES[language].partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert shown == card_table(language), "run python benchmarks/card_table.py --write"


def test_the_table_of_faults_is_that_of_its_results_file() -> None:
    shown = README.partition(FAULT_MARKS[0])[2].partition(FAULT_MARKS[1])[0]
    (named,) = re.findall(r"`(faults_cpu_[\d-]+\.json)`", shown)
    assert shown == readme_table(RESULTS / named), "run python -m tests.faults --readme --out FILE"


def test_what_is_said_of_fuzzing_and_queueing_is_in_their_results_files() -> None:
    section = SECTIONS["en: When something goes wrong"]
    fuzz, queue = (
        load(re.search(rf"`({name}_cpu_[\d-]+\.json)`", section)[1])  # type: ignore[index]
        for name in ("fuzz", "long_queue")
    )
    said = " ".join(section.split())
    refused, readers = fuzz["kinds"]["refused"], len(fuzz["readers"])
    assert f"{fuzz['files']:,} damaged files through {readers} readers" in said and f"{refused:,} refusals" in said
    assert not fuzz["wrong"] and set(fuzz["kinds"]) == {"refused", "accepted"} and fuzz["files"] >= 10**5
    counts = {kind["kind"]: kind["count"] for kind in queue["kinds"]}
    assert "{runs} runs, {interrupts} interrupts, {frees} frees and {pauses} pauses".format(**counts) in said
    assert all(kind["flat"] for kind in queue["kinds"]) and not queue["tracebacks_in_the_log"]


# --- links, files, names ---------------------------------------------------------------------------------

PLACES_OF_OTHERS = ("output/", "models/", "custom_nodes/", "user/", "tmp/", "ComfyUI/")  # made by a run or in ComfyUI


def anchors(text: str) -> set[str]:
    """The names by which headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    text, folder = ALL_PAGES[page], BENCHMARKS.parent if page == "benchmarks" else ROOT
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        led = text if not path else (folder / path).read_text(encoding="utf-8") if anchor else ""
        if not (folder / path).exists() or (anchor and anchor not in anchors(led)):
            broken.append(target)
    assert not broken, f"{page}: links to nothing: {broken}"


@pytest.mark.parametrize("page", ALL_PAGES)
def test_files_of_this_repository_are_there(page: str) -> None:
    text = ALL_PAGES[page]
    named = set(re.findall(r"(?:`|python )((?:benchmarks|docs|tests|web|locales|\.github|\.ci)/[\w./-]*)", text))
    gone = sorted(name for name in named if not (ROOT / name).exists())
    assert not gone, f"{page}: no such files: {gone}"


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_workflows_are_named_as_they_are(language: str) -> None:
    text = ALL_LANGUAGES[language]
    there = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
    named = {
        name
        for name in re.findall(r"`((?:wan2\.[12]|framepack|flashvsr)_\w[\w.]*)`", text)
        if not name.endswith(("tensors", "_vae"))
    }
    assert named <= there, f"README {language}: no such workflows: {sorted(named - there)}"
    if language == "en":
        assert there <= named | {"demo", "doctor"}, f"README's table of workflows lacks {sorted(there - named)}"


@pytest.mark.parametrize("page", ALL_PAGES)
def test_flags_are_those_of_the_command_line(page: str) -> None:
    flags = {
        flag for _, parser in commands(make_parser()) for action in parser._actions for flag in action.option_strings
    }
    others = {"--index-url", "--no-deps", "--upgrade", "--num", "--bf16", "--small", "--comfyui", "--result", "--size"}
    others |= {
        "--scenarios",
        "--work",
        "--out",
        "--write",
        "--readme",
        "--disable-metadata",
        "--preview-method",
        "--reserve-vram",
        "--fast",
        "--local-dir",
    }
    text = ALL_PAGES[page]
    unknown = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - flags - others)
    assert not unknown, f"{page}: no such flags: {unknown}"


@pytest.mark.parametrize("page", ALL_PAGES)
def test_commands_are_taken(page: str) -> None:
    """Those that are written out whole; "..." stands for what is left out."""
    parser = make_parser()
    blocks = re.findall(r"```bash\n(.*?)```", ALL_PAGES[page], re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["lowvram-video"] and "..." not in words:
            parser.parse_args(words[1:])


def test_nodes_are_called_as_they_are() -> None:
    ours = {texts[1].removesuffix(" (low vram)") for texts in found_by().values()}
    named = {name.lower() for name in re.findall(r"\*([A-Z][\w ]+?(?: \(Low VRAM\)))\*", README)}
    unknown = sorted(name for name in named if name.removesuffix(" (low vram)") not in ours)
    assert not unknown, f"README: no such nodes: {unknown}"


def test_every_node_is_spoken_of_in_the_readme() -> None:
    """By its name, or a part of it such as "Block Swap" of "Block Swap (Low VRAM)"."""
    text = re.sub(r"\s+", " ", README).lower()
    silent = [texts[1] for texts in found_by().values() if re.sub(r" \(.*\)$", "", texts[1]) not in text]
    assert not silent, f"README speaks of no {silent}"


def test_every_command_is_spoken_of_in_the_readme() -> None:
    names = {name for name, _ in commands(make_parser()) if name}
    silent = sorted(name for name in names if f"lowvram-video {name}" not in README)
    assert not silent, f"README speaks of no {silent}"
