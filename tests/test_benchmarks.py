"""Benchmarks, of which no test runs most: they import what is there; a process that hangs costs nobody else's time."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from lowvram_video.benchmarks.workers import Worker

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
IMPORT = re.compile(r"^ *from (\S+) import (\([^)]*\)|[^\n(]*)", re.MULTILINE)
SCRIPT = """
import json, sys, time
if sys.argv[1] == "fails":
    raise ValueError("no such thing")
if sys.argv[1] == "hangs":
    time.sleep(600)
print(json.dumps({"ready": True}), flush=True)
sys.stdin.readline()
print(json.dumps({"found": sys.argv[1]}), flush=True)
if sys.argv[1] == "hangs later":
    time.sleep(600)
"""


def worker(way: str, folder: Path) -> Worker:
    return Worker(way, ["-c", SCRIPT, way], folder / f"{way}.log", {})


def test_a_process_that_hangs_takes_nobody_elses_time(tmp_path: Path) -> None:
    workers = {way: worker(way, tmp_path) for way in ("works", "hangs", "hangs later", "fails")}
    for way, each in workers.items():
        each.wait_until_ready(0.0 if way == "hangs" else 60.0)
    found = {way: each.results(0.0 if way == "hangs later" else 60.0) for way, each in workers.items()}
    assert found["works"] == [{"found": "works"}] and not workers["works"].failed
    assert found["hangs"] == [] and workers["hangs"].failed == "not ready within 0 s"
    assert workers["hangs later"].failed == "not measured within 0 s"
    assert found["fails"] == [] and workers["fails"].failed == "ValueError: no such thing"


def module_of(name: str) -> Path | None:
    """The file of a module of the package, or of a script beside the benchmarks."""
    path = ROOT.joinpath(*name.split(".")[1:]) if name.startswith("lowvram_video.") else FOLDER / name
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def imports(file: Path) -> list[tuple[str, set[str]]]:
    """(module, names) of what it takes from each."""
    found = IMPORT.findall(file.read_text(encoding="utf-8"))
    return [(module, set(re.findall(r"\w+", re.sub(r"#.*| as \w+", "", names)))) for module, names in found]


@cache
def names_in(file: Path) -> set[str]:
    """What stands at the beginning of its lines, also several with commas, or is imported."""
    heads = re.findall(r"^\w[\w, ]*", file.read_text(encoding="utf-8"), re.MULTILINE)
    found = set(re.findall(r"\w+", " ".join(heads)))
    return found.union(*(names for _, names in imports(file)))


def test_what_benchmarks_import_of_the_package_and_each_other_is_there() -> None:
    gone = []
    for script in FOLDER.rglob("*.py"):
        for module, names in imports(script):
            if (file := module_of(module)) is not None:
                missing = [name for name in names - names_in(file) if not (file.parent / f"{name}.py").is_file()]
                gone += [f"{script.name}: {name} of {module}" for name in missing]
    assert not gone
