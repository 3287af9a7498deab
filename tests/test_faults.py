"""A few points of what `make faults` does at hundreds (marked slow), and some of the files of its fuzzing."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .faults.at_once import interrupts
from .faults.disks import broken_folders, full_disks
from .faults.files import Files, make_files
from .faults.fuzz import FINE, all_cases, fuzz
from .faults.kills import cases, kill_everywhere
from .faults.out_of_memory import out_of_memory
from .faults.readers import readers
from .faults.record import Known, Record
from .faults.table import Row, Tried, as_json, as_markdown, from_json


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("faults"))


def wrong(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.right]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_a_killed_command_goes_on_to_the_same(files: Files, tmp_path: Path, number: int) -> None:
    rows = list(kill_everywhere(cases(files)[number], tmp_path, 2))
    assert rows and wrong(rows) == []


@pytest.mark.slow
def test_interrupts_end_with_130_and_go_on(files: Files, tmp_path: Path) -> None:
    assert wrong(list(interrupts(files, tmp_path, 2))) == []


@pytest.mark.slow
def test_disks_that_fill_and_go(files: Files, tmp_path: Path) -> None:
    rows = list(full_disks(files, tmp_path, 1)) + list(broken_folders(files, tmp_path))
    assert wrong(rows) == []


@pytest.mark.slow
def test_out_of_memory_is_survived(files: Files) -> None:
    assert wrong(list(out_of_memory(files, 3))) == []


def test_damaged_files_are_refused_in_one_line(files: Files, tmp_path: Path) -> None:
    names = list(readers(files, tmp_path / "names"))
    shutil.rmtree(tmp_path / "names")
    found = list(fuzz(files, tmp_path, all_cases(names, 12 * len(names), first=500_000)))
    assert {finding.reader for finding in found} == set(names)
    assert [finding for finding in found if finding.kind not in FINE] == []
    assert Counter(finding.kind for finding in found)["refused"] > len(found) / 4


def test_a_table_counts_what_was_right() -> None:
    rows = [Row("kill", "1", True, "same"), Row("kill", "2", False, "lost"), Row("full", "1", True, "same")]
    assert as_markdown(rows).splitlines()[2:] == ["| kill | 2 | 1 | 1× same; 1× lost |", "| full | 1 | 1 | 1× same |"]
    found = as_json({"kills": Tried(3, rows[:2]), "disks": Tried(2, rows[2:])})
    assert found["kinds"]["kill"] == {"faults": 2, "right": 1, "seen": {"same": 1, "lost": 1}}
    assert (found["faults"], found["right"]) == (3, 2)


def test_a_part_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    points = [Row("kill", f"change {at}", True, "same") for at in range(4)]
    tried: list[str] = []

    def rows(known: Known, until: int = 4) -> Iterator[Row]:
        for row in points[:until]:
            if (row.fault, row.where) not in known:
                tried.append(row.where)
            yield known.get((row.fault, row.where), row)

    def cut_off(known: Known) -> Iterator[Row]:
        yield from rows(known, 2)
        raise KeyboardInterrupt

    out, order = tmp_path / "faults.json", ["kills", "disks"]
    with pytest.raises(KeyboardInterrupt):
        list(Record(out, order).fill("kills", cut_off))
    other = Record(out, order)
    assert (other.parts["kills"].whole, len(other.parts["kills"].rows)) == (False, 2)
    list(Record(out, order).fill("disks", lambda known: iter([Row("full", "1", True, "same")])))  # another process
    assert list(other.fill("kills", rows)) == points and tried == [row.where for row in points]
    found = from_json(out)
    assert list(found) == order and found["kills"].whole and list(found["kills"].rows) == points
    list(Record(out, order).fill("kills", rows))  # it was whole: all of it anew
    assert len(tried) == 8
