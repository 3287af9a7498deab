"""The script that measures the house, on a toy of one."""

from types import ModuleType

MAIN = """from __future__ import annotations

from ..wanvideo import model


def main() -> None:
    \"\"\"Run.\"\"\"
"""
MODEL = """from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .blocks import Block
"""
BLOCKS = """# a comment
class Block:
    def make(self, a, b, c, d, e, f, g, h, i):
        from .model import Model

        return Model
"""
TOY = {
    "cli/main.py": MAIN,
    "wanvideo/__init__.py": "",
    "wanvideo/model.py": MODEL,
    "wanvideo/blocks.py": BLOCKS,
    "system/units.py": "GIB = 2**30\n",
}


def test_imports_are_found_wherever_they_stand(house: ModuleType) -> None:
    assert house.imports(TOY) == {
        "cli/main.py": {"wanvideo/model.py"},
        "wanvideo/__init__.py": set(),
        "wanvideo/model.py": {"wanvideo/blocks.py"},
        "wanvideo/blocks.py": {"wanvideo/model.py"},
        "system/units.py": set(),
    }


def test_arrows_and_circles(house: ModuleType) -> None:
    found = house.imports(TOY)
    assert house.arrows(found, house.room) == {("cli", "wanvideo")}
    assert house.circles(found) == [["wanvideo/blocks.py", "wanvideo/model.py"]]


def test_code_lines_leave_out_docstrings_comments_and_blanks(house: ModuleType) -> None:
    assert house.code_lines(TOY["cli/main.py"]) == 3
    assert house.code_lines(TOY["wanvideo/blocks.py"]) == 4


def test_parameters_are_counted_without_self(house: ModuleType) -> None:
    made = {function.name: function.num_parameters for function in house.functions(TOY)}
    assert made == {"main": 0, "make": 9}


def test_every_figure_of_the_product_is_there(house: ModuleType) -> None:
    figures = house.figures(house.sources())
    assert int(figures["code lines"]) > 1000 and int(figures["rooms (folders at any depth)"]) > 5
