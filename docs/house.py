"""The house in figures, from the code's own imports and definitions: python docs/house.py [REVISION].

A room is a folder with code, an arrow is an import from one room into another (also one under TYPE_CHECKING or inside
a function), a circle is a set of modules that import each other. Only the standard library is used.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_PRODUCT = ("tests/", "benchmarks/", "docs/")
PACKAGE = "lowvram_video"
MOST_PARAMETERS = 8

# Who may import whom: a room those in the rows below its own, and nobody in its own row. Networks stand below all that
# knows of memory, of running and of files of video, so that they can know nothing of it.
TIERS = (
    ("cli", "nodes"),
    ("nodes/bridge",),
    ("doctor",),
    ("demo", "card", "batch"),
    ("families",),
    ("framepack/run", "wanvideo/upscale"),  # make a request with a model: they stand on both
    ("wanvideo", "framepack"),
    ("wanvideo/text", "wanvideo/vae", "framepack/text", "framepack/vae"),
    ("runtime",),
    ("vae",),
    ("memory/report",),
    ("memory/plan",),
    ("memory/stream",),
    ("video", "sampling", "compilation"),
    ("sampling/caching",),
    ("wanvideo/network", "framepack/network"),
    ("transformer",),
    ("weights/lora",),
    ("weights/linear",),
    ("weights/kernels",),
    ("weights/files",),
    ("attention/sparse",),
    ("attention", "fused", "team"),
    ("system",),
)
FAMILIES = ("wanvideo", "framepack")  # never import each other
# import system/ alone
LEAVES = ("weights", "memory", "attention", "fused", "team", "video", "sampling", "compilation", "batch")
GROUND = "system"

Imports = dict[str, set[str]]  # module's path -> the paths of the modules that it imports


@dataclass(frozen=True)
class Function:
    """A function or method of the product."""

    path: str
    name: str
    num_lines: int
    num_parameters: int


def sources(revision: str = "") -> dict[str, str]:
    """The product's modules by path: of the work tree, or of a git revision."""
    if revision:
        paths = [path for path in _git("ls-tree", "-r", "--name-only", revision).splitlines() if path.endswith(".py")]
        return {path: _git("show", f"{revision}:{path}") for path in paths if not path.startswith(NOT_PRODUCT)}
    tops = [
        top for top in sorted(ROOT.iterdir()) if not top.name.startswith(".") and top.name not in ("build", "output")
    ]
    files = [file for top in tops for file in (sorted(top.rglob("*.py")) if top.is_dir() else [top])]
    found = {file.relative_to(ROOT).as_posix(): file for file in files if file.suffix == ".py"}
    return {path: file.read_text(encoding="utf-8") for path, file in found.items() if not path.startswith(NOT_PRODUCT)}


def imports(modules: Mapping[str, str]) -> Imports:
    """What each module imports of the others; an import of a package's own names counts for its `__init__`."""
    return {
        path: {found for found in _imported(path, _nodes(text), modules) if found != path}
        for path, text in modules.items()
    }


@cache
def _nodes(text: str) -> tuple[ast.AST, ...]:
    """All nodes of a module's code."""
    return tuple(ast.walk(ast.parse(text)))


def _imported(path: str, nodes: Iterable[ast.AST], modules: Mapping[str, str]) -> Iterator[str]:
    here = Path(path).parent.parts
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield from _file(alias.name.split(".")[1:], modules)
        elif isinstance(node, ast.ImportFrom):
            names = (node.module or "").split(".") if node.module else []
            if node.level:
                names = [*here[: len(here) - node.level + 1], *names]
            elif names and names[0] == PACKAGE:
                names = names[1:]
            else:
                continue
            for alias in node.names:
                yield from _file([*names, alias.name], modules) or _file(names, modules)


def _file(names: list[str], modules: Mapping[str, str]) -> list[str]:
    stem = "/".join(names)
    candidates = (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py")
    return [path for path in candidates if path in modules][:1]


def room(path: str) -> str:
    """The folder of a module; "." is the root."""
    return Path(path).parent.as_posix()


def storey(path: str) -> str:
    """The folder at the root that holds a module, or the module itself where it lies loose at the root."""
    return path.split("/")[0]


def arrows(found: Imports, place: Callable[[str], str]) -> set[tuple[str, str]]:
    """Imports from one place into another; `place` is where a path belongs, such as `room`."""
    pairs = {(place(path), place(other)) for path, others in found.items() for other in others}
    return {(here, there) for here, there in pairs if here != there}


def wrong_ways(found: Imports) -> list[str]:
    """Imports that run back up, across a row or from a leaf to anything but the ground, as "importer -> imported"."""
    row = {name: index for index, names in enumerate(TIERS) for name in names}
    wrong = []
    for path, others in found.items():
        for other in others:
            here, there = room(path), room(other)
            if here in (".", there):
                continue
            top, other_top = here.split("/")[0], there.split("/")[0]
            up = row.get(there, -1) <= row.get(here, len(TIERS))
            between_families = {top, other_top} == set(FAMILIES)
            from_leaf = top in LEAVES and other_top not in (top, GROUND)
            if up or between_families or from_leaf:
                wrong.append(f"{path} -> {other}")
    return sorted(wrong)


def late_imports(modules: Mapping[str, str]) -> set[tuple[str, str]]:
    """Imports of the product's own modules inside functions, as (importer, imported)."""
    return {
        (path, found)
        for path, text in modules.items()
        for function in _nodes(text)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for found in _imported(path, ast.walk(function), modules)
    }


def circles(found: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other (Tarjan's strongly connected components), largest first."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles_found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(found.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            members = [stack.pop()]
            while members[-1] != node:
                members.append(stack.pop())
            if len(members) > 1:
                circles_found.append(sorted(members))

    for node in sorted(found):
        if node not in order:
            visit(node)
    return sorted(circles_found, key=len, reverse=True)


def code_lines(text: str) -> int:
    """Lines that hold code: no docstring, comment or blank; what stands between the quotes of a string is code."""
    bare = [line.strip() for line in text.splitlines()]
    lines = {number for number, line in enumerate(bare, 1) if line and not line.startswith("#")}
    docstrings: set[int] = set()
    for node in _nodes(text):
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno != node.lineno:
            lines |= set(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines - docstrings)


def functions(modules: Mapping[str, str]) -> list[Function]:
    """Every function of the modules; `self` and `cls` are no parameters."""
    found = []
    for path, text in modules.items():
        for node in _nodes(text):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = node.args
                names = [each.arg for each in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                found.append(Function(path, node.name, (node.end_lineno or 0) - node.lineno + 1, count))
    return found


def figures(modules: Mapping[str, str]) -> dict[str, str]:
    """The house in figures, by what they are of."""
    found = imports(modules)
    rooms = {room(path) for path in modules}
    between_rooms = arrows(found, room)
    lines = {path: len(text.splitlines()) for path, text in modules.items()}
    longest = max(lines, key=lambda path: lines[path])
    every = functions(modules)
    slowest = max(every, key=lambda function: function.num_lines)
    wide = [function for function in every if function.num_parameters > MOST_PARAMETERS]
    between = circles({name: {there for here, there in between_rooms if here == name} for name in rooms})
    inner = {path for path in modules if path != "__init__.py"}
    return {
        "modules": str(len(modules)),
        "code lines": str(sum(code_lines(text) for text in modules.values())),
        "longest file": f"{lines[longest]} lines, {longest}",
        "longest function": f"{slowest.num_lines} lines, {slowest.name} in {slowest.path}",
        f"functions with more than {MOST_PARAMETERS} parameters": str(len(wide)),
        "loose modules at the root": str(sum(1 for path in modules if "/" not in path and path != "__init__.py")),
        "folders and loose modules at the root": str(len({storey(path) for path in inner})),
        "arrows between those": str(len(arrows(found, storey))),
        "rooms (folders at any depth)": str(len(rooms)),
        "arrows between rooms": str(len(between_rooms)),
        "circles of modules": str(len(circles(found))),
        "circles of rooms": f"{len(between)} ({sum(map(len, between))} rooms)",
        "arrows that run back up": str(len(wrong_ways(found))),
        "imports inside functions": str(len(late_imports(modules))),
    }


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout


def main() -> None:
    modules = sources(sys.argv[1] if len(sys.argv) > 1 else "")
    for name, value in figures(modules).items():
        print(f"{name}: {value}")
    found = imports(modules)
    for members in circles(found):
        print("circle:", " ".join(members))
    for way in wrong_ways(found):
        print("runs back up:", way)


if __name__ == "__main__":
    main()
