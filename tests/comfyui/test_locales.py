"""Translations and help pages against the nodes as a server describes them.

With LOWVRAM_LOCALES=1 locales/en/nodeDefs.json, which repeats the nodes' own texts, is written anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    return {name: info for name, info in object_info.items() if name.startswith("LowVRAM")}


def inputs_of(info: dict[str, Any]) -> dict[str, Any]:
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def in_english(info: dict[str, Any]) -> dict[str, Any]:
    """A node's entry of nodeDefs.json as its schema says it; names of inputs stay as they are."""
    entry: dict[str, Any] = {"display_name": info["display_name"], "description": info["description"]}
    inputs = {name: {"name": name, "tooltip": spec[1]["tooltip"]} for name, spec in inputs_of(info).items()}
    if inputs:
        entry["inputs"] = inputs
    tips = info["output_tooltips"]
    entry["outputs"] = {
        str(slot): {"name": name} | ({"tooltip": tips[slot]} if tips[slot] else {})
        for slot, name in enumerate(info["output_name"])
    }
    return entry


def test_english_is_the_nodes_own_text(nodes: dict[str, Any]) -> None:
    place = ROOT / "locales" / "en" / "nodeDefs.json"
    wanted = {name: in_english(info) for name, info in nodes.items()}
    if os.environ.get("LOWVRAM_LOCALES"):
        text = json.dumps(wanted, ensure_ascii=False, indent=2)
        place.write_text(text + "\n", encoding="utf-8", newline="\n")
    assert json.loads(place.read_text(encoding="utf-8")) == wanted


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_a_translation_has_every_name(nodes: dict[str, Any], language: str) -> None:
    found = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(found) == set(nodes)
    for name, info in nodes.items():
        assert set(found[name].get("inputs", {})) == set(inputs_of(info)), name
        assert set(found[name]["outputs"]) == {str(slot) for slot in range(len(info["output_name"]))}, name
        assert all(entry["tooltip"] for entry in found[name].get("inputs", {}).values()), name


def test_a_help_page_names_every_input(nodes: dict[str, Any]) -> None:
    for name, info in nodes.items():
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {info['display_name']}\n"), name
        absent = [key for key in inputs_of(info) if f"`{key}`" not in page]
        assert not absent, f"{name}: {absent}"
        outputs = [key for key in info["output_name"] if f"`{key}`" not in page]
        assert not outputs, f"{name}: {outputs}"
