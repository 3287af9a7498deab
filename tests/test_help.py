"""The command line explains itself: help for every flag, examples that run, its version, sizes that say something."""

import argparse
import shlex
from collections.abc import Iterator

import pytest
from lowvram_video.cli.examples import EXAMPLES, PROGRAM
from lowvram_video.cli.main import main, make_parser
from lowvram_video.system.sizes import in_gb, in_gib
from lowvram_video.system.version import UNKNOWN, version

from .test_packaging import ROOT, tomllib


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of all its commands, "" being the program itself."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from commands(below, f"{name} {word}".strip())


def test_every_flag_has_help() -> None:
    bare = [
        f"{name}: {', '.join(action.option_strings) or action.dest}"
        for name, parser in commands(make_parser())
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert bare == [], f"give these a help text: {bare}"


def test_every_command_is_described_and_has_examples() -> None:
    parsers = dict(commands(make_parser()))
    bare = [name for name, parser in parsers.items() if not (parser.epilog and parser.description)]
    assert bare == [], (
        f"make these with `command(...)` of cli/main.py, and give them EXAMPLES in cli/examples.py: {bare}"
    )
    assert not set(EXAMPLES) - set(parsers)


def test_examples_are_commands() -> None:
    parser = make_parser()
    for name, examples in EXAMPLES.items():
        for about, words in examples:
            assert about and (not name or words.split()[0] == name)
            if words.endswith("--help"):
                with pytest.raises(SystemExit) as stop:
                    parser.parse_args(shlex.split(words))
                assert stop.value.code == 0
            else:
                parser.parse_args(shlex.split(words))


def test_help_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert f"{PROGRAM} plan wan2.1_t2v_14B_fp8_e4m3fn.safetensors --vram-budget 8" in shown
    assert "Show what a run would use" in shown


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"{PROGRAM} {stated}\n"
    assert version() == stated
    installed = version(ROOT / "no such file")  # as in site-packages
    assert installed == UNKNOWN or installed[0].isdigit()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (30, "30 B"), (900, "0.9 KiB"), (3000, "2.9 KiB"), (100 << 10, "0.1 MiB"), (5 << 20, "5.0 MiB"),
        (6 << 20, "0.01 GiB"), (7 << 29, "3.50 GiB"), (-(3 << 29), "-1.50 GiB"), (-(1 << 20), "-1.0 MiB"),
    ],
)  # fmt: skip
def test_sizes_say_something(num_bytes: int, text: str) -> None:
    assert in_gib(num_bytes) == text


def test_what_travels_is_in_gb() -> None:
    assert (in_gb(1_500_000), in_gb(10**10, 1), in_gb(40_000_000, 1)) == ("1.5 MB", "10.0 GB", "40.0 MB")
    assert in_gb(40_000_000) == "0.04 GB"
