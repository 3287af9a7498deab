"""The example workflows, help pages and translations as files; tests/comfyui runs them in a real ComfyUI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .comfyui.build_workflows import BLUEPRINT_FOLDER, BLUEPRINTS, WORKFLOWS
from .comfyui.graph import OPENING
from .comfyui.node_types import NODE_TYPES

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "example_workflows"
LANGUAGES = ("en", "zh", "ja")
# the widgets that name a file, and its kind of models folder
LOADERS = {
    "LowVRAMLoadWanModel": (["model_name"], "diffusion_models"),
    "LowVRAMLoadFramePackModel": (["model_name"], "diffusion_models"),
    "LowVRAMLoadFlashVSRModel": (["model_name", "projection", "decoder", "prompt"], "diffusion_models"),
    "CLIPLoader": (["clip_name"], "text_encoders"),
    "LowVRAMLoadClipGGUF": (["clip_name"], "text_encoders"),
    "DualCLIPLoader": (["clip_name1", "clip_name2"], "text_encoders"),
    "CLIPVisionLoader": (["clip_name"], "clip_vision"),
    "VAELoader": (["vae_name"], "vae"),
    "LoraLoaderModelOnly": (["lora_name"], "loras"),
}
SPLIT_FILES = r"Comfy-Org/(Wan_2\.[12]_ComfyUI_[rR]epackaged|HunyuanVideo_repackaged)/resolve/main/split_files/"
REPOSITORIES = "Kijai/HunyuanVideo_comfy|kabachuha/FramePack_F1_I2V_HY_20250503_comfy|Comfy-Org/sigclip_vision_384"
REPOSITORIES += "|1038lab/FlashVSR"
PREVIEWING = {"KSampler", "KSamplerAdvanced", "LowVRAMFramePackSampler"}
PICTURE_SIDE = 400  # pixels at least
PAGE_MAP = (1660, 820)  # its upper left corner on a page of 1920x1080


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def read_json(*parts: str) -> dict[str, Any]:
    return dict(json.loads(ROOT.joinpath(*parts).read_text(encoding="utf-8")))


@pytest.fixture(params=sorted(WORKFLOWS))
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


def hosts_of(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The subgraphs by the type of the node that stands for each."""
    return {each["id"]: each for each in workflow.get("definitions", {}).get("subgraphs", ())}


def nodes_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """All nodes, those inside subgraphs too, but for the nodes that stand for these."""
    hosts = hosts_of(workflow)
    inside = [node for host in hosts.values() for node in host["nodes"]]
    return [node for node in (*workflow["nodes"], *inside) if node["type"] not in hosts]


def subgraph_ends(subgraph: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """A subgraph's two ends as nodes: what it is given, and what it gives."""
    given = [{"type": slot["type"], "links": slot["linkIds"]} for slot in subgraph["inputs"]]
    taken = [{"type": slot["type"], "link": link} for slot in subgraph["outputs"] for link in slot["linkIds"]]
    return {-10: {"inputs": [], "outputs": given}, -20: {"inputs": taken, "outputs": []}}


def values_of(node: dict[str, Any]) -> dict[str, Any]:
    """A node's widget values by name."""
    values, named = list(node["widgets_values"]), {}
    for widget in NODE_TYPES[node["type"]].widgets:
        named[widget.name] = values.pop(0)
        del values[: len(widget.followed_by)]
    assert not values, f"{node['type']}: {values} belong to no widget"
    return named


def test_the_folder_holds_each_workflow_with_its_picture() -> None:
    wanted = {f"{name}{suffix}" for name in WORKFLOWS for suffix in (".json", ".jpg")}
    assert {path.name for path in FOLDER.iterdir()} == wanted
    for name in WORKFLOWS:
        with Image.open(FOLDER / f"{name}.jpg") as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) >= PICTURE_SIDE


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_file_is_what_its_builder_writes(name: str) -> None:
    built = json.loads(json.dumps(WORKFLOWS[name]()))
    assert load(name) == built, "run python -m tests.comfyui.build_workflows"


def test_the_blueprints_are_what_their_builders_write() -> None:
    assert {path.name for path in BLUEPRINT_FOLDER.iterdir()} == {f"{name}.json" for name in BLUEPRINTS}
    for name, build in BLUEPRINTS.items():
        saved = json.loads((BLUEPRINT_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert saved == json.loads(json.dumps(build())), "run python -m tests.comfyui.build_workflows"


@pytest.mark.parametrize("name", sorted(BLUEPRINTS))
def test_a_blueprint_is_one_node_of_one_subgraph(name: str) -> None:
    """As the page takes it from a pack (ComfyUI's app/subgraph_manager.py)."""
    blueprint = json.loads((BLUEPRINT_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert (node["type"], subgraph["name"]) == (subgraph["id"], name)
    assert blueprint["links"] == [] and all(slot["link"] is None for slot in node["inputs"])
    assert [(slot["name"], slot["type"]) for slot in node["outputs"]] == [("video", "VIDEO")]
    assert subgraph["description"] and subgraph["category"] == "LowVRAM Video"
    check_links({each["id"]: each for each in subgraph["nodes"]} | subgraph_ends(subgraph), links_inside(subgraph))


def test_every_node_is_in_a_workflow() -> None:
    used = {node["type"] for name in WORKFLOWS for node in nodes_of(load(name))}
    assert {name for name in read_json("locales", "en", "nodeDefs.json") if name.startswith("LowVRAM")} <= used


def check_links(nodes: dict[int, dict[str, Any]], links: list[list[Any]]) -> None:
    """Every link is known to both of its ends, and no end knows another one."""
    seen = set()
    for number, source, output, target, slot, kind in links:
        assert nodes[target]["inputs"][slot]["link"] == number
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
        seen.add(number)
    from_nodes = {slot["link"] for node in nodes.values() for slot in node["inputs"]} - {None}
    assert from_nodes == seen


def links_inside(subgraph: dict[str, Any]) -> list[list[Any]]:
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return [[link[key] for key in keys] for link in subgraph["links"]]


def test_links_agree_with_both_of_their_ends(workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    inside = [node["id"] for subgraph in hosts_of(workflow).values() for node in subgraph["nodes"]]
    assert workflow["version"] == 0.4
    assert workflow["last_node_id"] == max((*nodes, *inside))
    assert len({*nodes, *inside}) == len(workflow["nodes"]) + len(inside)
    check_links(nodes, workflow["links"])
    assert workflow["last_link_id"] == max((link[0] for link in workflow["links"]), default=0)
    for subgraph in hosts_of(workflow).values():
        check_links({node["id"]: node for node in subgraph["nodes"]} | subgraph_ends(subgraph), links_inside(subgraph))


def test_a_subgraphs_node_has_its_inputs_outputs_and_values(workflow: dict[str, Any]) -> None:
    hosts = hosts_of(workflow)
    found = [node for node in workflow["nodes"] if node["type"] in hosts]
    samples = any(node["type"] == "LowVRAMBlockSwap" for node in nodes_of(workflow))
    assert len(found) == len(hosts) == samples
    for node in found:
        for side in ("inputs", "outputs"):
            inside = [(slot["name"], slot["type"]) for slot in hosts[node["type"]][side]]
            assert [(slot["name"], slot["type"]) for slot in node[side]] == inside
            assert len({name for name, _ in inside}) == len(inside)
        widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        assert len(widgets) == len(node["widgets_values"])
        own = [["-1", name] for name in widgets]
        samplers = [each for each in hosts[node["type"]]["nodes"] if "Sampler" in each["type"]]
        previews = [[str(each["id"]), "$$canvas-image-preview"] for each in samplers if each["type"] in PREVIEWING]
        assert node["properties"]["proxyWidgets"] == own + previews
        assert previews


def test_a_page_has_few_nodes_that_are_readable_where_it_opens(workflow: dict[str, Any]) -> None:
    assert (5 if hosts_of(workflow) else 2) <= len(workflow["nodes"]) <= 7
    scale, (left, top) = workflow["extra"]["ds"]["scale"], workflow["extra"]["ds"]["offset"]
    assert scale == 1.0
    shown = [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
    assert max(node["pos"][0] + node["size"][0] for node in shown) + left <= 1920
    assert max(node["pos"][1] + node["size"][1] for node in shown) + top <= 1080


def test_what_a_run_took_opens_beside_the_pages_map(workflow: dict[str, Any]) -> None:
    if [node["type"] for node in workflow["nodes"]].count("LoadImage") > 1:
        return  # of two pictures the note has that place
    for node in workflow["nodes"]:
        if node["type"] in ("LowVRAMPlan", "LowVRAMMemoryReport"):
            right, bottom = (node["pos"][axis] + node["size"][axis] + OPENING[axis] for axis in (0, 1))
            assert right <= PAGE_MAP[0] or bottom <= PAGE_MAP[1]


def test_sources_come_before_what_uses_them(workflow: dict[str, Any]) -> None:
    graphs = [(workflow["nodes"], workflow["links"])]
    graphs += [(subgraph["nodes"], links_inside(subgraph)) for subgraph in hosts_of(workflow).values()]
    for nodes, links in graphs:
        order = {-10: -1, -20: len(nodes)} | {node["id"]: node["order"] for node in nodes}
        assert all(order[source] < order[target] for _, source, _, target, _, _ in links)


def test_only_known_nodes_each_with_its_pack(workflow: dict[str, Any]) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    for node in nodes_of(workflow):
        assert node["type"] in NODE_TYPES
        ours = node["type"].startswith("LowVRAM")
        properties = node["properties"]
        assert properties["cnr_id"] == ("lowvram-video" if ours else "comfy-core")
        assert properties["ver"] == (version[1] if ours else "0.8.0")


def test_each_widget_has_a_value_of_its_type(workflow: dict[str, Any]) -> None:
    for node in nodes_of(workflow):
        values = values_of(node)
        for widget in NODE_TYPES[node["type"]].widgets:
            assert isinstance(values[widget.name], type(widget.default)), f"{node['type']}.{widget.name}"


def test_loaders_link_to_the_file_that_they_name(workflow: dict[str, Any]) -> None:
    for node in nodes_of(workflow):
        if node["type"] not in LOADERS:
            continue
        widgets, directory = LOADERS[node["type"]]
        named = [values_of(node)[widget] for widget in widgets]
        if named[0].endswith(".gguf"):  # found by a search, which the note links to
            assert "models" not in node["properties"]
            continue
        models = node["properties"]["models"]
        assert [model["name"] for model in models] == named
        for model in models:
            assert model["directory"] == directory
            place = rf"({SPLIT_FILES}{directory}/|({REPOSITORIES})/resolve/main/){re.escape(model['name'])}"
            assert re.fullmatch(rf"https://huggingface\.co/{place}", model["url"])


def test_the_note_names_every_file(workflow: dict[str, Any]) -> None:
    (note,) = (node for node in nodes_of(workflow) if node["type"] == "MarkdownNote")
    text = note["widgets_values"][0]
    models = [model for node in nodes_of(workflow) for model in node["properties"].get("models", ())]
    for model in models:
        assert f"[{model['name']}]({model['url']})" in text
    assert text.startswith("# ")
    assert not models or "VRAM" in text


def test_a_group_is_around_every_node_and_nodes_do_not_overlap(workflow: dict[str, Any]) -> None:
    """Groups are inside of subgraphs."""
    for subgraph in hosts_of(workflow).values():
        for node in subgraph["nodes"]:
            (x, y), (width, height) = node["pos"], node["size"]
            assert any(
                left <= x and top <= y and x + width <= left + w and y + height <= top + h
                for left, top, w, h in (group["bounding"] for group in subgraph["groups"])
            )
    for nodes in (workflow["nodes"], *(subgraph["nodes"] for subgraph in hosts_of(workflow).values())):
        boxes = [(*node["pos"], *node["size"]) for node in nodes]
        for index, (x, y, width, height) in enumerate(boxes):
            for left, top, w, h in boxes[index + 1 :]:
                assert x + width <= left or left + w <= x or y + height <= top or top + h <= y


def test_every_workflow_plans_streams_decodes_and_saves(workflow: dict[str, Any]) -> None:
    kinds = {node["type"] for node in nodes_of(workflow)}
    if "LowVRAMUpscaleVideo" in kinds and "KSampler" not in kinds:  # plans, streams and saves by itself
        assert "LowVRAMLoadFlashVSRModel" in kinds
        return
    if "LowVRAMDoctor" in kinds:  # makes no video
        return
    assert {"LowVRAMBlockSwap", "LowVRAMPlan", "LowVRAMMemoryReport"} <= kinds
    if "LowVRAMFramePackSampler" in kinds:  # saves the video as it grows, and a node shows it
        assert "LowVRAMShowVideo" in kinds
        (sampler,) = (node for node in nodes_of(workflow) if node["type"] == "LowVRAMFramePackSampler")
        assert "LowVRAMLoadFramePackModel" in kinds
        assert all(slot["link"] for slot in sampler["inputs"] if slot["name"] in ("vae", "image_embeds"))
        assert "fixed" in sampler["widgets_values"], "the seed of a run that may go on"
    else:
        assert {"LowVRAMDecodeVideo", "SaveVideo"} <= kinds or {"LowVRAMSaveVideo", "LowVRAMUpscaleVideo"} & kinds
        assert {"LowVRAMLoadWanModel", "LowVRAMLoadDemo"} & kinds


def test_the_nodes_of_the_table_are_those_of_the_translations() -> None:
    english = read_json("locales", "en", "nodeDefs.json")
    for name, kind in NODE_TYPES.items():
        if not name.startswith("LowVRAM"):
            continue
        sockets = [socket for socket, _ in kind.sockets]
        needed = [socket for socket in sockets if socket not in kind.optional]
        given = [*needed, *(widget.name for widget in kind.widgets), *kind.optional]
        assert list(english[name].get("inputs", {})) == given
        assert [entry["name"] for entry in english[name]["outputs"].values()] == [output for output, _ in kind.outputs]


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_have_the_same_keys(language: str) -> None:
    english, other = read_json("locales", "en", "nodeDefs.json"), read_json("locales", language, "nodeDefs.json")
    assert set(other) == set(english)
    for node, entry in other.items():
        assert entry["display_name"] and entry["description"]
        for part in ("inputs", "outputs"):
            assert set(entry.get(part, {})) == set(english[node].get(part, {})), f"{language} {node} {part}"
    # these characters mean something to the page's translation library
    assert [text for text in texts_of(other) if re.search(r"[{}@|]", text)] == []
    assert "LowVRAM Video" in read_json("locales", language, "main.json")["nodeCategories"]


def texts_of(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [text for value in entry.values() for text in texts_of(value)]


def test_every_node_has_a_help_page() -> None:
    english = read_json("locales", "en", "nodeDefs.json")
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*.md")}
    assert set(pages) == set(english)
    for node, entry in english.items():
        assert pages[node].startswith(f"# {entry['display_name']}\n")
        assert [name for name in entry.get("inputs", {}) if f"`{name}`" not in pages[node]] == []


def test_a_plan_shows_the_size_that_it_is_wired_to(workflow: dict[str, Any]) -> None:
    """Nodes 2.0 shows a widget's own value also where a wire gives another one."""
    sizes = {
        node.get("title"): node["widgets_values"][0] for node in nodes_of(workflow) if node["type"] == "PrimitiveInt"
    }
    for node in nodes_of(workflow):
        if node["type"] == "LowVRAMPlan" and sizes:
            values = values_of(node)
            assert [values[name] for name in ("width", "height", "length")] == [
                sizes[name] for name in ("Width", "Height", "Frames")
            ]
