"""What several test modules share."""

import gc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Streamed, chunked, shared between cards: the same bits, if a row's product is the same whatever rows are beside it. On
# some processors MKL has other kernels for few rows unless it is told before PyTorch is imported, here and in children.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

MANY_OBJECTS = 100_000  # the suite's own modules and PyTorch's compiler import more, the tests of a module leave fewer


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Garbage is collected after each out-of-memory: not through all that this process has imported."""
    if len(gc.get_objects()) > MANY_OBJECTS:
        gc.unfreeze()  # what modules before have left
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else packages tell of leaks at the end


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
