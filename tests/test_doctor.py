"""Doctor: the right mark and the right command, with packages missing, broken, of another version, and deadly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lowvram_video.attention.probe import Machine
from lowvram_video.cli.main import main
from lowvram_video.doctor import kernel_checks, memory_checks, system_checks, trials
from lowvram_video.doctor.apart import tried_apart
from lowvram_video.doctor.bug_report import bug_report, private_names, without_names
from lowvram_video.doctor.comfyui_checks import check_comfyui
from lowvram_video.doctor.examine import Examination
from lowvram_video.doctor.finding import Finding, Findings
from lowvram_video.doctor.fixes import TRITON, fix_flash, fix_headers, fix_kitchen, fix_sage, fix_triton
from lowvram_video.doctor.installed import Installed
from lowvram_video.doctor.kernel_checks import check_kernels
from lowvram_video.doctor.system_checks import check_system
from lowvram_video.doctor.trials import Outcome, try_attention, try_triton

CPU = torch.device("cpu")
PYTHON = r"C:\ComfyUI\python_embeded\python.exe"
WINDOWS = Installed(
    platform="win32", system="Windows 11", python=(3, 12, 10), executable=PYTHON, torch="2.9.1+cu130", cuda="13.0",
    torch_needs=(), headers=Path("none/Python.h"), libraries=Path("none"),
)  # fmt: skip
LINUX = replace(
    WINDOWS, platform="linux", system="Linux 6", executable="/venv/bin/python", torch="2.11.0+cu130",
    torch_needs=('triton==3.6.0; platform_system == "Linux"', "numpy"),
)  # fmt: skip


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("2.6.0+cu124", f'{PYTHON} -m pip install -U "triton-windows<3.3"'),
        ("2.8.0+cu129", f'{PYTHON} -m pip install -U "triton-windows<3.5"'),
        ("2.9.1+cu130", f'{PYTHON} -m pip install -U "triton-windows<3.6"'),
        ("2.11.0+cu130", f'{PYTHON} -m pip install -U "triton-windows<3.7"'),
        ("2.14.0+cu130", f'{PYTHON} -m pip install -U "triton-windows<3.9"'),
        ("2.5.1+cu124", "see the project's page: https://github.com/triton-lang/triton-windows"),  # not on PyPI
        ("2.99.0", "see the project's page: https://github.com/triton-lang/triton-windows"),
        ("a build of somebody's", "see the project's page: https://github.com/triton-lang/triton-windows"),
    ],
)
def test_triton_for_windows_by_torch(version: str, command: str) -> None:
    assert fix_triton(replace(WINDOWS, torch=version)) == command


@pytest.mark.parametrize(
    ("needs", "version", "wanted"),
    [
        (('triton==3.6.0; platform_system == "Linux"',), "2.11.0", '"triton==3.6.0"'),
        (('triton~=3.8.0; platform_system == "Linux" and python_version < "3.15"',), "2.14.0", '"triton~=3.8.0"'),
        ((), "2.8.0+cu128", '"triton==3.4.*"'),
    ],
)
def test_triton_for_linux_is_what_torch_says(needs: tuple[str, ...], version: str, wanted: str) -> None:
    here = replace(LINUX, torch_needs=needs, torch=version)
    assert fix_triton(here) == f"/venv/bin/python -m pip install {wanted}"


def test_the_other_commands() -> None:
    assert fix_sage(LINUX).startswith("/venv/bin/python -m pip install sageattention==1.0.6 (it needs Triton; ")
    assert "github.com/woct0rdho/SageAttention/releases" in fix_sage(WINDOWS)
    assert fix_kitchen(LINUX) == "/venv/bin/python -m pip install -U comfy-kitchen"
    assert fix_flash(LINUX, "flash_attn").startswith("see the project's page: https://github.com/Dao-AILab/flash-att")
    assert fix_headers(LINUX).startswith("sudo apt install python3.12-dev gcc")
    assert "no kernels" in fix_triton(replace(LINUX, platform="darwin"))
    spaced = replace(WINDOWS, executable=r"C:\My Files\python.exe")
    assert spaced.pip("x") == r'"C:\My Files\python.exe" -m pip install x'


def test_portable_python(tmp_path: Path) -> None:
    """ComfyUI's has no headers and no import library, and ignores the user's own packages."""
    (tmp_path / "python312._pth").write_text(".")
    here = replace(WINDOWS, executable=str(tmp_path / "python.exe"), headers=tmp_path / "Include" / "Python.h")
    found = {line.name: line for line in check_system(here, CPU)}
    assert here.is_portable and "-s -m pip install" in here.pip("x")
    headers = found["headers"]
    assert headers.state == "bad" and "Python.h and python312.lib are missing" in headers.text
    assert "put the folders include and libs of a Python 3.12" in headers.fix and not headers.stops
    (tmp_path / "Include").mkdir()
    (tmp_path / "Include" / "Python.h").touch()
    (tmp_path / "python312.lib").touch()
    found = {line.name: line for line in check_system(replace(here, libraries=tmp_path), CPU)}
    assert found["headers"].state == "good"


# --- marks -------------------------------------------------------------------------------------------------------


def kernels(here: Installed, **outcomes: Outcome) -> dict[str, Finding]:
    return {line.name: line for line in check_kernels(here, CPU, outcomes)}


def test_missing_packages_get_the_command() -> None:
    missing = Outcome("missing", "is not installed")
    found = kernels(WINDOWS, triton=missing, sageattn=missing, flash_attn_2=missing, comfy_kitchen=missing)
    assert found["Triton"].state == "bad" and found["Triton"].fix == fix_triton(WINDOWS)
    assert found["attention: SageAttention"].fix == fix_sage(WINDOWS)
    assert found["comfy-kitchen"].fix == fix_kitchen(WINDOWS)
    assert found["attention: FlashAttention 2"].state == "told"  # nobody needs it
    assert Findings(tuple(found.values())).can_generate


def test_broken_packages_are_installed_anew() -> None:
    """pip leaves a version alone that is there already."""
    broken = Outcome("broken", "is installed, but cannot be imported (OSError: cudart64_12.dll)")
    found = kernels(WINDOWS, triton=broken, sageattn=broken, comfy_kitchen=broken)
    anew = f"{PYTHON} -m pip install --force-reinstall --no-deps"
    assert found["Triton"].fix == f'{anew} -U "triton-windows<3.6"'
    assert found["attention: SageAttention"].fix.startswith(f"{anew} sageattention==1.0.6")
    assert found["comfy-kitchen"].fix == f"{anew} -U comfy-kitchen"


def test_what_a_package_misses_is_what_is_installed() -> None:
    sage = Outcome("broken", "is installed, but misses triton", "triton.language")
    assert kernels(LINUX, sageattn=sage)["attention: SageAttention"].fix == fix_triton(LINUX)
    flash = Outcome("broken", "is installed, but misses einops", "einops")
    assert kernels(LINUX, flash_attn_2=flash)["attention: FlashAttention 2"].fix == LINUX.pip("einops")


def test_what_nothing_runs_without_stops() -> None:
    for name in ("device", "sdpa"):
        found = Findings(tuple(kernels(LINUX, **{name: Outcome("broken", "wrong")}).values()))
        assert not found.can_generate and found.verdict.startswith("Nothing can be generated")


def test_triton_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"triton-windows": "3.4.0.post21", "triton": "3.5.1"}
    monkeypatch.setattr(kernel_checks, "version_of", versions.get)
    works = Outcome("works", "compiles and runs kernels")
    line = kernels(WINDOWS, triton=works)["Triton"]
    assert line.state == "bad" and "3.4.0.post21 is for torch 2.8, and torch 2.9.1+cu130 wants 3.5" in line.text
    assert line.fix == fix_triton(WINDOWS)
    del versions["triton-windows"]
    assert kernels(WINDOWS, triton=works)["Triton"].state == "good"
    line = kernels(LINUX, triton=works)["Triton"]
    assert line.state == "bad" and line.fix == '/venv/bin/python -m pip install "triton==3.6.0"'


def test_flags_of_comfyui() -> None:
    given = {"lowvram": True, "cache_none": True, "disable_pinned_memory": True, "reserve_vram": 2.0, "port": 8188}
    lines = {line.name: line for line in check_comfyui("0.33.0", given)}
    assert [line.name for line in lines.values() if line.state == "bad"] == [
        "--lowvram", "--disable-pinned-memory", "--cache-none",
    ]  # fmt: skip
    assert lines["--reserve-vram 2.0"].state == "told" and all(not line.stops for line in lines.values())
    (_, line) = check_comfyui("0.33.0", {"lowvram": False, "reserve_vram": None})
    assert line.state == "good"


def card(major: int, minor: int) -> SimpleNamespace:
    return SimpleNamespace(name="NVIDIA GeForce RTX 5090", major=major, minor=minor, total_memory=32 << 30)


@pytest.mark.parametrize(
    ("architectures", "runs"),
    [
        (["sm_80", "sm_86", "sm_90"], False),
        (["sm_80", "sm_120"], True),
        (["sm_80", "compute_90"], True),
        (["sm_120a"], True),
    ],
)
def test_a_card_that_torch_has_no_kernels_for(
    monkeypatch: pytest.MonkeyPatch, architectures: list[str], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card(12, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(4))
    line = system_checks._card(WINDOWS, torch.device("cuda", 0))
    assert (line.state == "good") == runs and line.stops != runs
    if not runs:
        assert "has kernels for sm_80" in line.text and "pytorch.org" in line.fix


def test_a_driver_without_a_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_checks, "driver_version", lambda: "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = system_checks._gpu(replace(WINDOWS, cuda=None, torch="2.9.1+cpu"), CPU)
    assert line.state == "bad" and "built without CUDA" in line.text and "pytorch.org" in line.fix
    (line,) = system_checks._gpu(WINDOWS, CPU)
    assert "the driver is for CUDA 13.0" in line.text and "nvidia.com" in line.fix


# --- trials, with stand-ins ----------------------------------------------------------------------------------------


def machine(modules: dict[str, object]) -> Machine:
    """A GPU of capability 8.9 in name: kernels are given tensors of the CPU."""

    def load(name: str) -> object:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        found = modules[name]
        if isinstance(found, Exception):
            raise found
        return found

    return Machine(import_module=load, capability=lambda device: (8, 9), platform="linux", python="python")


def sage(run: Callable[..., torch.Tensor]) -> dict[str, object]:
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, return_lse=False):  # as version 2 has it
        return run(q, k, v)

    return {"sageattention": SimpleNamespace(sageattn=sageattn)}


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def crash(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("modules", "result", "words"),
    [
        (sage(plain), "works", "agrees with plain attention"),
        (sage(crash), "broken", "no kernel image is available"),
        (sage(lambda q, k, v: torch.zeros_like(q)), "broken", "differs from plain attention"),
        (sage(lambda q, k, v: plain(q, k, v) * float("nan")), "broken", "NaN"),
        ({"sageattention": SimpleNamespace(sageattn=lambda x: x)}, "broken", "of an unknown version"),
        ({"sageattention": SimpleNamespace()}, "broken", "has no function sageattn"),
        ({"sageattention": ImportError("DLL load failed while importing _qattn")}, "broken", "DLL load failed"),
        ({"sageattention": ModuleNotFoundError("No module named 'triton'", name="triton")}, "broken", "misses triton"),
    ],
)
def test_stand_ins_of_sage(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, object], result: str, words: str
) -> None:
    monkeypatch.setattr(trials, "_imported", lambda package: None)
    monkeypatch.setattr(trials, "half_dtype", lambda device: torch.bfloat16)
    found = try_attention("sageattn", "sageattention", CPU, machine(modules))
    assert found.result == result and words in found.text, found


def test_triton_that_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = ModuleType("lowvram_video.doctor.triton_kernel")
    monkeypatch.setattr(trials, "_imported", lambda package: None)

    def doubles(device: torch.device) -> bool:
        raise subprocess.CalledProcessError(1, ["gcc"])  # Python.h is missing

    broken.doubles = doubles  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    found = try_triton(CPU, run=True)
    assert found.result == "broken" and "compiles no kernel (CalledProcessError" in found.text
    broken.doubles = lambda device: False  # type: ignore[attr-defined]
    assert try_triton(CPU, run=True) == Outcome("broken", "its kernel's result is wrong")
    broken.doubles = lambda device: True  # type: ignore[attr-defined]
    assert try_triton(CPU, run=True).result == "works" and try_triton(CPU).result == "untried"


STAND_INS = {
    "deadly": ("import os\nos.abort()\n", "broken", "takes the process with it"),
    "quiet": ("import os\nos._exit(3)\n", "broken", "ended with status 3"),
    "broken": ("raise OSError('libcudart.so.11.0: cannot open')\n", "broken", "libcudart.so.11.0"),
    "good": ("def list_backends():\n    return {}\n", "untried", "is installed"),
    "empty": ("__version__ = '1'\n", "broken", "is installed, but has no list_backends"),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_packages_in_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """What crashes takes only that process; what comes after it is tried all the same."""
    source, result, words = STAND_INS[kind]
    (tmp_path / "comfy_kitchen.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = tried_apart(["device", "comfy_kitchen", "sdpa"], "cpu")
    assert found["device"].result == found["sdpa"].result == "works", found
    assert found["comfy_kitchen"].result == result and words in found["comfy_kitchen"].text, found


@pytest.mark.parametrize(
    ("package", "source", "outcome"),
    [
        ("triton", "", Outcome("broken", "is installed, but has no jit: a folder that another installation left?")),
        ("sageattention", "import absent", Outcome("broken", "is installed, but misses absent", "absent")),
        (
            "sageattention",
            "x = $",
            Outcome(
                "broken", "is installed, but cannot be imported (SyntaxError: invalid syntax (__init__.py, line 1))"
            ),
        ),
        ("sageattention", "sageattn = print", None),
    ],
)
def test_what_is_left_of_a_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, source: str, outcome: Outcome | None
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package, raising=False)
    found = trials._imported(package)
    sys.modules.pop(package, None)
    assert found == outcome


def test_a_package_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "comfy_kitchen.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = tried_apart(["device", "comfy_kitchen"], "cpu", stuck_seconds=3.0)
    assert found["comfy_kitchen"] == Outcome("broken", "did not end within 3 s")


# --- the command and the file --------------------------------------------------------------------------------------

BARE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("triton", "sageattention", "flash_attn", "flash_attn_interface", "comfy_kitchen"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Absent())
"""


def test_the_command_in_a_bare_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Triton and SageAttention, for the process that is examined too; the exit status says that it can run."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = tmp_path / "report.json"
    assert main(["doctor", "--device", "cpu", "--json", "--report", str(report)]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert str(report) in said.err
    lines = {line["name"]: line for line in told["findings"]}
    assert told["can_generate"] and lines["Triton"]["state"] == lines["attention: SageAttention"]["state"] == "bad"
    assert "not installed" in lines["Triton"]["text"] and lines["Triton"]["fix"] == fix_triton(Installed())
    assert lines["attention: SageAttention"]["fix"] == fix_sage(Installed())
    assert lines["PyTorch"]["state"] == lines["attention: sdpa"]["state"] == "good"
    written = report.read_text()
    assert str(Path.home()) not in written and json.loads(written)["packages"]["torch"] == torch.__version__
    assert main(["doctor", "--device", "cpu", "--report", str(Path(__file__))]) == 2  # is no report


def test_the_exit_status_where_nothing_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Findings((Finding("Kernels", "PyTorch", "bad", "wrong", "reinstall torch", stops=True),))
    monkeypatch.setattr(Examination, "run", lambda self, progress: stopped)
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "✗ PyTorch  wrong" in out and "→ reinstall torch" in out and "Nothing can be generated" in out


def test_signs_that_a_code_page_has() -> None:
    found = Findings((Finding("Kernels", "Triton", "bad", "is not installed", "pip install triton"),))
    found.text("cp1252").encode("cp1252")
    assert "x Triton" in found.text("cp1252") and "✗ Triton" in found.text("utf-8")


def test_names_are_out_of_reports() -> None:
    names = {r"C:\Users\Anna Lee": "~", "/home/anna": "~", "Anna Lee": "USER", "anna": "USER", "ANNAS-PC": "HOST"}
    text = json.dumps(
        {"a": r"C:\Users\Anna Lee\ComfyUI\python.exe -m pip", "b": "/home/anna/x /home/other/y",
         "c": "on annas-pc by ANNA", "d": "savanna", "e": r"D:\Users\Bob\z"}
    )  # fmt: skip
    clean = json.loads(without_names(text, names))
    assert clean == {
        "a": r"~\ComfyUI\python.exe -m pip", "b": "~/x /home/USER/y", "c": "on HOST by USER", "d": "savanna",
        "e": r"D:\Users\USER\z",
    }  # fmt: skip


def test_a_report_of_this_machine() -> None:
    place = str(Path.home() / "models" / "x.safetensors")
    found = Findings((Finding("Kernels", "Triton", "bad", f"fails in {place}", f"{sys.executable} -m pip install x"),))
    text = bug_report(found)
    for name in private_names():
        assert not re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text, re.IGNORECASE), name
    assert json.loads(text)["findings"][0]["name"] == "Triton"


def test_memory_of_this_machine() -> None:
    lines = {line.name: line for line in memory_checks.check_memory(Installed(), CPU, None)}
    assert set(lines) == {"RAM", "temporary folder"} and lines["RAM"].text.count("GiB") == 2


def test_the_table_knows_the_torch_that_runs_these_tests() -> None:
    assert Installed().torch_minor in TRITON
