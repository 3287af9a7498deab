"""The map in docs/architecture.md says what the code says: folders, rows, files, names, and the ways through them."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
REDRAW = "run `python docs/picture.py` and commit what it writes"

QUOTED = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./-]+\.(py|md|json|toml|txt|svg|js|sh)")
STOP = re.compile(r"\d+\. `([^`:]+): ([\w.]+)`(?: \((?:handed down by `([^`]+)`|called by (ComfyUI))\))?: ")
MOST_STOPS = 12
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def modules(house: ModuleType) -> dict[str, str]:
    return house.sources()


@pytest.fixture(scope="module")
def picture(house: ModuleType) -> ModuleType:
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["picture"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)  # it imports house, which the fixture has put in its place
    return module


def sections(text: str, mark: str) -> dict[str, str]:
    """Parts of a text by their headings of one level."""
    parts = re.split(rf"^{mark} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


TOP = sections(MAP, "##")


def items(text: str) -> list[str]:
    """The lines of a numbered list, those that it breaks joined."""
    return [" ".join(item.split()) for item in re.findall(r"^\d+\. .+(?:\n {3,}.+)*", text, flags=re.MULTILINE)]


def names_in(path: Path) -> set[str]:
    """What a module defines at its top, and within its classes as Class.name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= _defined(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in _defined(inner)}
    return found


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def test_the_picture_is_that_of_the_imports(picture: ModuleType, modules: dict[str, str]) -> None:
    drawn = picture.draw(modules)
    kept = picture.PICTURE.read_text(encoding="utf-8")
    # a box's lines of code change with every commit
    drawn, kept = (re.sub(r">[\d,]+ lines<", ">lines<", text) for text in (drawn, kept))
    assert NUMBER.sub("0", drawn) == NUMBER.sub("0", kept), REDRAW
    pairs = zip(map(float, NUMBER.findall(drawn)), map(float, NUMBER.findall(kept)), strict=True)
    assert all(abs(one - other) < 1.5 for one, other in pairs), REDRAW  # platforms round places differently


def test_the_rooms_are_the_folders_in_their_rows(picture: ModuleType, modules: dict[str, str]) -> None:
    assert picture.with_table(MAP, picture.rooms_table(modules)) == MAP, REDRAW


def test_every_other_folder_is_there() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    named = {each.rstrip("/") for each in QUOTED.findall(TOP["Rooms"]) if re.fullmatch(r"[\w.-]+/", each)}
    assert {folder for folder in folders if not folder.startswith(".")} == named


def test_every_folder_and_file_that_is_named_exists() -> None:
    paths = {quoted.split(": ")[0] for quoted in QUOTED.findall(MAP)}
    wanted = {path for path in paths if FILE.fullmatch(path) or re.fullmatch(r"(?:[\w-]+/)+", path)}
    assert {path for path in wanted if not (ROOT / path).exists()} == set()


def test_every_name_is_in_its_file() -> None:
    named = [quoted.partition(": ") for quoted in QUOTED.findall(MAP)]
    files = {path for path, _, name in named if name and path.endswith(".py") and (ROOT / path).exists()}
    known = {path: names_in(ROOT / path) for path in files}
    assert {f"{path}: {name}" for path, _, name in named if path in files and name and name not in known[path]} == set()


def test_every_plain_name_is_somewhere(modules: dict[str, str]) -> None:
    """A class or constant, in whatever file: what is renamed has another name here too."""
    words = set(re.findall(r"\w+", "\n".join(modules.values())))
    names = {each for each in QUOTED.findall(MAP) if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", each)}
    assert {name for name in names if not FILE.fullmatch(name) and not set(name.split(".")) <= words} == set()


def test_lives_and_recipes_are_short() -> None:
    lives = {title: text for title, text in TOP.items() if title.startswith("The life of")}
    assert len(lives) == 4
    for title, text in lives.items():
        assert len(items(text)) == 15, title
    for title, text in sections(TOP["Recipes"], "###").items():
        assert 0 < len(items(text)) <= 10, title


@pytest.mark.parametrize("title", sections(TOP["Four ways through the house"], "###"))
def test_ways_go_down_from_function_to_function(house: ModuleType, modules: dict[str, str], title: str) -> None:
    row = {name: index for index, names in enumerate(house.TIERS) for name in names}
    lines = items(sections(TOP["Four ways through the house"], "###")[title])
    stops = [match.groups() for line in lines if (match := STOP.match(line))]
    assert len(stops) == len(lines) and 2 < len(stops) <= MOST_STOPS
    for index, (path, name, giver, host) in enumerate(stops[1:], 1):
        before = stops[index - 1][0]
        assert row[house.room(path)] >= row[house.room(before)], f"{path} is above {before}"
        if host is not None:
            continue
        caller = giver or before
        assert caller in {stop[0] for stop in stops[:index]}, f"{caller} is no stop before {path}: {name}"
        words = set(re.findall(r"\w+", re.sub(r"^(?:class|def) .*$", "", modules[caller], flags=re.MULTILINE)))
        asked = [part for part in name.split(".") if part != "__call__"]
        named = asked[-1] if len(asked) > 1 and asked[-1] != "forward" else asked[0]
        assert {named, asked[0]} & words, f"{caller} does not name {name}"


def test_a_modules_log_has_one_name(house: ModuleType) -> None:
    named = {
        (path, line.partition(" = ")[0])
        for path, text in house.sources().items()
        for line in text.splitlines()
        if line.endswith("= logging.getLogger(__name__)")
    }
    assert len(named) > 50 and {name for _, name in named} == {"logger"}
