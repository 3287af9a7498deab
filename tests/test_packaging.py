"""The shape of the package: every folder is packaged, imports go one way, ComfyUI stays behind nodes/."""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from lowvram_video.cli.batch_comfyui import EXAMPLES
from lowvram_video.demo.files import DEMO_FILES
from lowvram_video.sampling.caching.tables import PUBLISHED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = {"tests", "benchmarks", "docs", "locales", "example_workflows", "output", "build"}

RUNTIME = {"torch", "safetensors", "einops", "gguf", "numpy", "PIL", "imageio_ffmpeg", "sentencepiece", "matplotlib"}
# what ComfyUI or torch brings along
RUNTIME |= {"filelock", "psutil", "tokenizers", "tqdm"}
OPTIONAL = {
    "triton",
    "sageattention",
    "sageattn3",
    "flash_attn",
    "flash_attn_interface",
    "comfy_kitchen",
    "ftfy",
    "torch_tensorrt",
    "ray",
}
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "nodes",
    "protocol",
    "server",
}
COMFYUI |= {"comfyui_version"}


def sources() -> list[Path]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0]
        if top not in NOT_PACKAGED and not top.startswith("."):
            found.append(path)
    return found


@cache
def imports_of(path: Path) -> list[tuple[str | None, str]]:
    """(folder of this package, "") or (None, outside top-level module) for every import of a file."""
    found: list[tuple[str | None, str]] = []
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(None, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((None, str(node.module).split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1]
            parts = [*base, *(node.module or "").split(".")] if node.module else list(base)
            targets = [parts] if node.module else [[*parts, alias.name] for alias in node.names]
            found += [(target[0] if target else ".", "") for target in targets]
    return found


def test_every_folder_with_code_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    wanted = {".".join(["lowvram_video", *folder.parts]) for folder in folders}
    assert listed == wanted
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), folder


def test_what_the_code_reads_of_its_own_folder_is_packaged() -> None:
    """`pip install .` puts the command line elsewhere, without what is not listed."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packaged = {
        path.resolve()
        for package, patterns in data.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    demo = [path for path in vars(DEMO_FILES).values() if isinstance(path, Path)]
    assert not {path.resolve() for path in (PUBLISHED, *demo, *EXAMPLES.glob("*.json"))} - packaged
    places = {path.relative_to(ROOT).as_posix() for path in sources() if "Path(__file__)" in path.read_text("utf-8")}
    read = {"cli/batch_comfyui.py", "sampling/caching/tables.py", "demo/files.py"}
    only_named = {"doctor/bug_report.py", "doctor/apart.py", "system/version.py"}  # the last knows what is installed
    assert places == read | only_named, "another file finds something by its own place: is that packaged?"


def test_imports_go_one_way(house: ModuleType) -> None:
    assert house.wrong_ways(house.imports(house.sources())) == []


def test_every_folder_has_its_row(house: ModuleType) -> None:
    rows = [name for names in house.TIERS for name in names]
    assert sorted(rows) == sorted({house.room(path) for path in house.sources() if not path.endswith("__init__.py")})


def test_nothing_lies_loose_at_the_root(house: ModuleType) -> None:
    assert [path for path in house.sources() if "/" not in path] == ["__init__.py"]


def test_no_modules_import_each_other(house: ModuleType) -> None:
    assert house.circles(house.imports(house.sources())) == []


def test_imports_inside_functions_are_of_what_may_be_missing(house: ModuleType) -> None:
    """Of a module that asks for it, or for modules that do."""
    asked_for = house.imports(house.sources())
    for path, imported in house.late_imports(house.sources()) - {("__init__.py", "nodes/__init__.py")}:
        files = (imported, *asked_for[imported])
        outside = {name for file in files for inside, name in imports_of(ROOT / file) if inside is None}
        assert outside & {*OPTIONAL, "matplotlib"}, f"{path} imports {imported} late, which nothing asks for"


def test_only_the_nodes_import_comfyui() -> None:
    for path in sources():
        outside = {name for inside, name in imports_of(path) if inside is None}
        assert not outside & (COMFYUI - {"nodes"}) or path.relative_to(ROOT).parts[0] == "nodes", path


def test_run_time_imports_are_the_listed_ones() -> None:
    standard = set(sys.stdlib_module_names) | {"__future__"}
    for path in sources():
        for inside, outside in imports_of(path):
            if inside is None and outside not in standard | RUNTIME | OPTIONAL | COMFYUI:
                raise AssertionError(f"{path.relative_to(ROOT)} imports {outside}, which is no run-time dependency")


# what an operator may take and return in torch 2.4, as `torch._library.infer_schema` of that release lists it
PLAIN_TYPES = {"Tensor", "int", "float", "bool", "str", "torch.dtype", "torch.device"}
OPERATOR_TYPE = re.compile(r"(?:(?:Sequence|List)\[)?([\w.]+)\]?(?: \| None)?")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_operators_are_of_types_that_torch_24_knows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "@torch.library.custom_op" not in text:
        return
    tree = ast.parse(text)
    assert "from __future__ import annotations" not in text.replace("`from __future__ import annotations`", "")
    operators = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each).startswith("torch.library.custom_op") for each in node.decorator_list)
    ]
    assert operators
    for operator in operators:
        returned = ast.unparse(operator.returns or ast.Constant(None))
        assert returned in ("None", "Tensor") or re.fullmatch(r"tuple\[Tensor(, Tensor)*\]", returned), operator.name
        for argument in operator.args.args:
            found = OPERATOR_TYPE.fullmatch(ast.unparse(argument.annotation or ast.Constant(None)))
            assert found and found[1] in PLAIN_TYPES, f"{operator.name}: {argument.arg}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "collections.abc":
            taken = {alias.name for alias in node.names}
            assert not taken & {"Sequence"}, "torch 2.4 knows the one of typing alone"


def test_requirements_never_name_what_comfyui_brings() -> None:
    names = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in (ROOT / "requirements.txt").read_text().split("\n")}
    forbidden = {"torch", "torchvision", "numpy", "transformers", "diffusers", "accelerate", "peft", "opencv-python"}
    assert not names & forbidden


def test_an_older_filelock_is_not_enough() -> None:
    """3.11 has no `thread_local`: a lock is taken in one thread and given back in another."""
    assert "filelock>=3.12" in (ROOT / "requirements.txt").read_text().split()
