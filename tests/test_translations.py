"""Help pages and names in Chinese and Japanese: all there, all inputs named, and no English sentence left."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
from lowvram_video.memory.plan.footprint import GIB, WorkSize
from lowvram_video.memory.plan.table import ROWS, describe
from lowvram_video.memory.report.report import PhaseReport, RunReport
from lowvram_video.memory.report.stream_log import StreamReport

from .shown_texts import examinations, loras, plans_of_several_cards, refusals, reports, statuses
from .test_packaging import sources
from .test_plan import BF16, FP8, H200, LONG_480P, limits, plan_or_none

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "web" / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
LANGUAGES = ("zh", "ja")
# four words and more in a row, but for what stands as it is in the program: code, quoted messages, names in italics
SENTENCE = re.compile(r"(?:[A-Za-z][A-Za-z'’-]+[ ,;:]+){4,}[A-Za-z][A-Za-z'’-]+")
QUOTED = re.compile(r"```.*?```|`[^`\n]*`|\*\*.+?\*\*|\*[^*\n]+\*|\[[^\]]*\]|\]\([^)]*\)|https?://\S+", re.DOTALL)
# a word -> why it is not used here
WRONG_WORDS = {
    "zh": {"VRAM": "显存", "频闪": "闪烁", "显卡内存": "显存", "视讯": "视频", "档案": "文件"},
    "ja": {"ビデオ": "動画", "メモリー": "メモリ"},
}
FEWEST_MESSAGES = 20
LONGEST_NAME = 2  # words, such as those of a model
# of the pack and its nodes, and of ComfyUI's own, which have the words that it chose
NAMES = re.compile(r"Low ?VRAM|LowVRAM|VRAM Plan|VRAM プラン|ビデオを(?:読み込む|保存)|ビデオコンポーネントの取得")


def page(node: str, language: str) -> str:
    path = DOCS / node / f"{language}.md"
    assert path.is_file(), f"web/docs/{node}/{language}.md is missing: translate web/docs/{node}.md"
    return path.read_text(encoding="utf-8")


def names(language: str) -> dict[str, dict[str, object]]:
    return dict(json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_its_help_page(language: str) -> None:
    missing = [node for node in PAGES if not (DOCS / node / f"{language}.md").is_file()]
    assert not missing, f"no help page in {language}: {missing}"
    loose = [path.parent.name for path in DOCS.glob(f"*/{language}.md") if path.parent.name not in PAGES]
    assert not loose, f"these help pages are of no node: {loose}"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", PAGES)
def test_a_page_is_the_english_one_translated(node: str, language: str) -> None:
    text, english = page(node, language), (DOCS / f"{node}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {names(language)[node]['display_name']}\n"), f"{node}: its name is another"
    inputs = set(re.findall(r"^\| `(\w+)`", english, re.MULTILINE)) | set(
        re.findall(r"^- `(\w+)`", english, re.MULTILINE)
    )
    absent = sorted(name for name in inputs if f"`{name}`" not in text)
    assert not absent, f"{node} in {language} says nothing of {absent}"
    headings, translated = (len(re.findall(r"^## ", each, re.MULTILINE)) for each in (english, text))
    assert translated >= headings, f"{node} in {language}: {headings - translated} sections are missing"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_english_sentence_is_left_in_help(language: str) -> None:
    left = {
        node: found
        for node in PAGES
        if (found := SENTENCE.findall(QUOTED.sub(" ", page(node, language)))) or _lines_of_english(page(node, language))
    }
    assert not left, f"not translated into {language}: {left}"


def _lines_of_english(text: str) -> list[str]:
    """Lines of prose without a letter of the language."""
    lines = [QUOTED.sub("", line) for line in text.splitlines()]
    return [line for line in lines if len(re.findall(r"[A-Za-z]{3,}", line)) > 6 and not re.search(r"[぀-鿿]", line)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_english_sentence_is_left_in_names_and_tooltips(language: str) -> None:
    left = {}
    for node, entry in names(language).items():
        texts = [entry["display_name"], entry["description"]]
        for group in ("inputs", "outputs"):
            values = entry.get(group, {})
            assert isinstance(values, dict)
            texts += [value["tooltip"] for value in values.values() if "tooltip" in value]
        if wrong := [text for text in map(str, texts) if not re.search(r"[぀-鿿]", text) or SENTENCE.search(text)]:
            left[node] = wrong
    assert not left, f"not translated into {language}: {left}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_are_those_that_are_used_there(language: str) -> None:
    texts = {f"{node}/{language}.md": QUOTED.sub(" ", page(node, language)) for node in PAGES}
    texts["nodeDefs.json"] = "\n".join(map(str, _strings(names(language))))
    wrong = [
        f"{place}: {word} for {instead}"
        for place, text in texts.items()
        for word, instead in WRONG_WORDS[language].items()
        if word in NAMES.sub("", text)
    ]
    assert not wrong, wrong


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in _strings(each)]
    return [value] if isinstance(value, str) else []


# --- texts that the page translates -----------------------------------------------------------------------


def plans_and_reports() -> list[str]:
    """Texts of VRAM Plan and Memory Report in their cases."""
    swapped = [limits(gib, **H200, **more) for gib in (4, 8, 12, 24) for more in ({}, {"blocks_to_swap": 40})]
    from_disk = [limits(gib, ram_budget_bytes=6 * GIB) for gib in (4, 24)]
    allowed = [*swapped, *from_disk, limits(4, pinned_cap_bytes=2 * GIB)]
    works = [
        (model, work) for model in (FP8, BF16) for work in (LONG_480P, WorkSize(17, 480, 832), WorkSize(1, 480, 832))
    ]
    plans = [plan_or_none(model, work, each) for model, work in works for each in allowed]
    texts = [describe(plan) for plan in plans if plan is not None]
    assert len(texts) > 30
    phases = tuple(PhaseReport("denoise", 0.0, 1.0, GIB, GIB, predicted, GIB) for predicted in (0, GIB))
    report = RunReport(phases, stream=StreamReport(*range(1, 7)), budget_bytes=GIB, pinned_bytes=GIB)
    return [*texts, report.table(), RunReport((PhaseReport("decode", 0.0, 1.0, 0, 0, 0, GIB),)).table()]


@cache
def page_texts(language: str) -> dict[str, dict[str, str]]:
    return dict(json.loads((ROOT / "web" / "texts" / f"{language}.json").read_text(encoding="utf-8")))


VALUE = "((?:(?!  ).)+?)"  # as in `web/texts.js`: two spaces end it
NO_WORDS = re.compile(r"\S+ -m pip install [^(]*|sudo apt install [^(]*|\S*[-_/\\=\d.]\S+")
MARK = re.compile("^ *[✓✗·→] ")


@cache
def patterns(language: str) -> tuple[re.Pattern[str], ...]:
    keys = [key.strip().split("{}") for key in page_texts(language)["lines"] if "{}" in key]
    return tuple(
        re.compile(" *" + VALUE.join(re.escape(part).replace("\\ ", " +") for part in parts)) for parts in keys
    )


def words(text: str) -> int:
    """How many there are, but for commands, addresses, flags, files and versions."""
    return len(re.findall(r"[A-Za-z]{3,}", NO_WORDS.sub("", text).replace("GiB", "")))


def in_page(text: str, language: str) -> list[str]:
    """The lines of a text that `web/texts.js` knows no translation of, or no whole one."""
    return [line for line in text.splitlines() if words(line) > 1 and left_of(line, language)]


def left_of(line: str, language: str) -> list[str]:
    """What of a line stays English: all of it, columns, or values of more words than a name has."""
    if MARK.match(line) or not found_in(line, language):
        cells = re.findall(r"\S+(?: \S+)*", MARK.sub("", line))
        return [cell for cell in cells if words(cell) > 1 and not found_in(cell, language)]
    return []


def found_in(text: str, language: str) -> bool:
    if text in page_texts(language)["lines"]:
        return True
    found = next(filter(None, (each.fullmatch(text) for each in patterns(language))), None)
    values = found.groups() if found else ()
    return found is not None and all(value_in(part, language) for value in values for part in value.split("; "))


def value_in(text: str, language: str) -> bool:
    """Whether a value is known, has no more words than a name, or is a list of such."""
    if words(text) <= LONGEST_NAME or found_in(text, language):
        return True
    parts = text.split(", ")
    return len(parts) > 1 and all(value_in(part, language) for part in parts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_note_is_translated(language: str) -> None:
    left = set()
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
        left |= {line for line in in_page(note, language) if not line.startswith("- [")}  # links to files
    assert not left, f"web/texts/{language}.json lacks {sorted(left)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_plan_and_report_is_translated(language: str) -> None:
    shown = [*plans_and_reports(), *plans_of_several_cards(), *refusals(), *reports(), *loras(), *examinations()]
    left = {line for text in shown for line in in_page(text, language)}
    assert not left, f"web/texts/{language}.json lacks {sorted(left)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_said_of_a_run_is_translated(language: str) -> None:
    left = {text for text in statuses() if not found_in(text, language)}
    assert not left, f"web/texts/{language}.json lacks {sorted(left)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_english_sentence_is_left_in_the_pages_texts(language: str) -> None:
    texts = page_texts(language)
    every = [*texts["lines"].items(), *texts["messages"].items()]
    prompts = "The girl dances gracefully, with clear movements.", "a blue square moves quickly right in the snow"
    left = [
        key for key, text in every if SENTENCE.search(QUOTED.sub(" ", text)) and not any(p in text for p in prompts)
    ]
    left += [key for key, text in every if not re.search(r"[぀-鿿：，、]", text)]
    assert left == []
    swapped = [key for key, text in every if key.count("{}") != text.count("{}")]
    assert swapped == [], "a value is missing"
    words = [f"{wrong}: {text}" for wrong in WRONG_WORDS[language] for _, text in every if wrong in NAMES.sub("", text)]
    assert words == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_explains_the_messages_that_the_readme_does(language: str) -> None:
    readme = (ROOT / f"README.{language}.md").read_text(encoding="utf-8")
    assert page_texts(language)["messages"] == dict(re.findall(r"^\| “(.+?)” \| (.+?) \|$", readme, re.MULTILINE))


# --- texts that stay English in the program and are explained ---------------------------------------------


@cache
def texts_of_the_program() -> str:
    """All strings of the package's code, a line each."""
    found = []
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return "\n".join(found)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_commonest_messages_are_explained_as_the_program_says_them(language: str) -> None:
    readme = (ROOT / f"README.{language}.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| “(.+?)” \|", readme, re.MULTILINE)
    assert len(set(messages)) >= FEWEST_MESSAGES
    parts = {part.strip() for message in messages for part in message.split("…") if len(part.strip()) > 8}
    unknown = sorted(part for part in parts if part not in texts_of_the_program())
    assert not unknown, f"README.{language}.md explains messages that are none: {unknown}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_row_of_a_plan_is_explained(language: str) -> None:
    text = page("LowVRAMPlan", language)
    missing = [row for row in ROWS.values() if f"**{row}**" not in text]
    assert not missing, f"web/docs/LowVRAMPlan/{language}.md explains no {missing}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_column_of_a_report_is_explained(language: str) -> None:
    gib = 2**30
    head = RunReport((PhaseReport("denoise", 0.0, 1.0, gib, gib, gib, gib),)).table().splitlines()[0]
    text = page("LowVRAMMemoryReport", language)
    missing = [column for column in re.split(r"  +", head.strip()) if f"**{column}**" not in text]
    assert not missing, f"web/docs/LowVRAMMemoryReport/{language}.md explains no {missing}"
