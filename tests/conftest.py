"""What several test modules share."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", Path(__file__).parents[1] / "docs" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_card_of_this_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans find no profile that somebody measured here."""
    monkeypatch.setenv("LOWVRAM_VIDEO_DATA", str(tmp_path_factory.getbasetemp() / "no-data"))
