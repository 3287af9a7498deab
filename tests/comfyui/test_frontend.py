"""ComfyUI's page in a headless Chromium: each workflow is dropped on it and gives the prompt that the tests submit.

COMFYUI_FRONTEND is the static folder of another comfyui-frontend-package than the installed one. `pictures.py` takes
the documentation's pictures of the same page.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import QuietPage, find_chromium, open_page
from .build_workflows import BLUEPRINTS
from .conftest import ComfyUI
from .server import PACK_FOLDER, Server
from .workflows import FOLDER, NAMES, for_test, load, to_prompt

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium (set CHROMIUM to its path)")

ROOT = Path(__file__).parents[2]
WINDOW = (2800, 1575)
RENDERERS = {"canvas": False, "Nodes 2.0": True}
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the page opens with its tour
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text even where it is small
}
APP_IS_UP = """window.app && window.app.graph && window.app.rootGraph !== null
&& document.querySelector('#graph-canvas')
&& window.app.extensions.some(extension => extension.name === 'lowvramvideo.ShowText')"""
DROP = """((name, text) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, {type: 'application/json'}));
    const canvas = document.querySelector('#graph-canvas');
    const where = {dataTransfer: data, bubbles: true, cancelable: true, clientX: 900, clientY: 600};
    for (const kind of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(kind, where));
})"""
DROP_VIDEO = """((name, content) => {
    const data = new DataTransfer();
    const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
    data.items.add(new File([bytes], name, {type: 'video/mp4'}));
    const canvas = document.querySelector('#graph-canvas');
    const where = {dataTransfer: data, bubbles: true, cancelable: true, clientX: 900, clientY: 600};
    for (const kind of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(kind, where));
})"""
# what nodes cover, title included, in the graph's pixels: each says how large it is where Nodes 2.0 draws it
NODES = """(() => {
    const graph = window.app.graph, drawn = [...document.querySelectorAll('[data-node-id]')];
    return graph.nodes.map(node => {
        const [left, top, width, height] = node.boundingRect;
        const element = drawn.find(each => each.dataset.nodeId === String(node.id));
        const scale = element && element.getBoundingClientRect().width / element.offsetWidth;
        const real = element ? element.getBoundingClientRect().height / scale : height;
        return [`${node.id} ${node.type}`, left, top, left + width, top + Math.max(height, real)];
    });
})()"""
# fields that a node draws for a text of ours instead of the text
FIELDS = (
    "[...document.querySelectorAll('[data-node-id] :is(input, textarea)[aria-label=shown]')].map(each => each.value)"
)
COMPLAINTS = "[...document.querySelectorAll('[role=dialog], [role=alert], .p-dialog, .p-toast-message, \
[data-testid=error-overlay]')]\
.map(element => element.innerText.trim()).filter(text => text)"
MISSING = (
    "[...window.app.graph.nodes, ...[...(window.app.graph.subgraphs?.values() ?? [])].flatMap(each => each.nodes)]\
.filter(node => !node.isSubgraphNode?.() && (node.has_errors || !LiteGraph.registered_node_types[node.type]))\
.map(node => node.type)"
)
# ids of the nodes that previews are of
COUNT_PREVIEWS = """window.previewed = [], window.app.api.addEventListener(
    'b_preview_with_metadata', event => window.previewed.push(event.detail.displayNodeId)
)"""
# what was said of nodes
KEEP_TEXTS = """window.said = [], window.app.api.addEventListener(
    'progress_text', event => window.said.push(event.detail.text)
)"""
SAY = """((node, text) => window.app.api.dispatchEvent(
    new CustomEvent('progress_text', {detail: {nodeId: node, text}})
))"""
PREVIEW = """(async node => {
    const canvas = new OffscreenCanvas(8, 8);
    canvas.getContext('2d').fillRect(0, 0, 8, 8);
    const blob = await canvas.convertToBlob();
    const at = {nodeId: node, displayNodeId: node, realNodeId: node, parentNodeId: node.split(':')[0]};
    window.app.api.dispatchEvent(new CustomEvent('b_preview_with_metadata', {detail: {blob, ...at}}));
    await new Promise(done => setTimeout(done, 200));
})"""
# where a preview below a node ends on the page, and how high it is, if so many pixels are left below the node
PREVIEW_END = """((id, left) => {
    const {canvas} = window.app, node = canvas.graph.getNodeById(id), drawn = {};
    const page = canvas.canvas.clientHeight;
    canvas.ds.offset[1] = (page - left) / canvas.ds.scale - node.pos[1] - node.size[1];
    const picture = (_, left, top, width, height) => Object.assign(drawn, {end: top + height, height});
    const anything = {get: (it, name) => it[name] ?? (() => {}), set: () => true};
    node.onDrawForeground(new Proxy({drawImage: picture}, anything));
    return [(node.pos[1] + drawn.end + canvas.ds.offset[1]) * canvas.ds.scale <= page, drawn.height];
})"""
CAPTIONS = """(id => [
    ...document.querySelectorAll(`[data-node-id="${id}"] .image-preview > .text-center:last-child`)
].map(each => each.style.visibility))"""
SAID_BELOW = """[...document.querySelectorAll('.lowvram-progress')].map(
    each => [each.parentNode.dataset.nodeId, each.textContent]
)"""
NOTE = "window.app.graph.nodes.find(node => node.type === 'MarkdownNote').widgets[0].value"
CLIENT = "window.app.api.clientId"
PROMPT = "window.app.graphToPrompt().then(result => result.output)"


@pytest.fixture(scope="module", params=list(RENDERERS))
def page(comfyui: ComfyUI, server: Server, request: pytest.FixtureRequest) -> Iterator[QuietPage]:
    """The page with one of the two things that draw its nodes; an older ComfyUI's is the same one's."""
    if request.param != "canvas" and not comfyui.is_newest:
        pytest.skip("this page is tried in the newest ComfyUI")
    # Nodes 2.0 complains of pictures that it has itself discarded while it loads them, at the end of short runs
    previews = "auto" if request.param == "canvas" else "none"
    renderer = {"Comfy.VueNodes.Enabled": RENDERERS[request.param], "Comfy.Execution.PreviewMethod": previews}
    server.post("/settings", SETTINGS | renderer)
    with open_page(f"http://127.0.0.1:{server.port}/", WINDOW) as page:
        page.wait_for(APP_IS_UP)
        page.settle()
        yield page


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in prompt.items()}


def drop(page: QuietPage, name: str, workflow: dict[str, Any] | None = None) -> None:
    """Drop a workflow as shipped, or another one under that name."""
    text = json.dumps(workflow) if workflow else (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    page.evaluate("window.app.graph.clear()")
    page.evaluate(f"{DROP}({json.dumps(name + '.json')}, {json.dumps(text)})")
    page.wait_for(f"window.app.graph.nodes.length === {len(json.loads(text)['nodes'])}")
    page.settle()  # dialogs come late


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_workflow_is_what_the_tests_submit(page: QuietPage, object_info: dict[str, Any], name: str) -> None:
    drop(page, name)
    assert page.evaluate(COMPLAINTS) == []
    assert page.evaluate(MISSING) == []
    assert overlapping(page) == []
    from_browser = without_titles(page.evaluate(PROMPT))
    from_python = to_prompt(load(name), object_info)
    assert from_browser == from_python


def overlapping(page: QuietPage) -> list[tuple[str, str]]:
    """Pairs of nodes that cover each other."""
    nodes = page.evaluate(NODES)
    return [
        (one[0], other[0])
        for number, one in enumerate(nodes)
        for other in nodes[:number]
        if all(min(one[axis + 3], other[axis + 3]) > max(one[axis + 1], other[axis + 1]) for axis in (0, 1))
    ]


def test_help_translations_and_templates_are_served(page: QuietPage, server: Server) -> None:
    for node in (name for name in server.get("/object_info") if name.startswith("LowVRAM")):
        text = page.evaluate(f"fetch('/extensions/{PACK_FOLDER}/docs/{node}.md').then(answer => answer.text())")
        assert text.startswith("# "), f"{node}: {text[:80]}"
    translations = server.get("/i18n")
    assert {"en", "zh", "ja"} <= set(translations)
    assert sorted(server.get("/workflow_templates")[PACK_FOLDER]) == NAMES


@pytest.mark.parametrize("name", ["demo"])
def test_the_demo_runs_from_the_page(
    page: QuietPage, server: Server, name: str, request: pytest.FixtureRequest
) -> None:
    drop(page, name)
    server.post("/history", {"clear": True})
    page.evaluate(COUNT_PREVIEWS)
    page.evaluate("window.app.queuePrompt(0)")
    end = time.monotonic() + 120
    while not (history := server.get("/history")) and time.monotonic() < end:
        time.sleep(0.2)
    assert [entry["status"]["status_str"] for entry in history.values()] == ["success"]
    page.settle()  # pictures load
    assert page.evaluate(COMPLAINTS) == []
    plan, report = page.evaluate("[...document.querySelectorAll('.lowvram-text')].map(element => element.innerText)")
    assert "predicted peak" in plan
    assert "denoise" in report
    host = page.evaluate("window.app.graph.nodes.find(node => node.isSubgraphNode?.()).id")
    drawn = request.node.callspec.params["page"] == "canvas"
    if drawn:
        shown = page.evaluate("window.previewed")
        assert len(shown) > 2 and all(node.startswith(f"{host}:") for node in shown)
    assert overlapping(page) == []  # what came into the nodes included
    assert page.evaluate(FIELDS) == []
    check_said_below(page, host, drawn)


def check_said_below(page: QuietPage, host: int, drawn: bool) -> None:
    """What runs in a subgraph is said at its node: in Nodes 2.0 by a line below it; `drawn`: on the canvas."""
    page.evaluate(f"{SAY}('{host}:3', 'decoding')")
    page.settle()
    assert page.evaluate(SAID_BELOW) == ([] if drawn else [[str(host), "decoding"]])
    assert overlapping(page) == []
    sampler = next(node["id"] for node in folded_nodes("demo") if node["type"] == "KSampler")
    for _ in range(2):
        page.evaluate(f"{PREVIEW}('{host}:{sampler}')")
    assert page.evaluate(f"{CAPTIONS}({host})") == ([] if drawn else ["hidden"])
    if drawn:
        ends = [page.evaluate(f"{PREVIEW_END}({host}, {left})") for left in (1000, 200, 40)]
        assert ends == [[True, 240], [True, pytest.approx(164, abs=10)], [False, 100]]
    page.evaluate("window.app.api.dispatchEvent(new CustomEvent('execution_success', {detail: {}}))")
    page.settle()
    assert page.evaluate(SAID_BELOW) == []
    assert page.evaluate(f"{CAPTIONS}({host})") == ([] if drawn else [""])


def folded_nodes(name: str) -> list[dict[str, Any]]:
    (folded,) = load(name)["definitions"]["subgraphs"]
    return list(folded["nodes"])


def test_a_new_node_is_as_wide_as_its_text(page: QuietPage) -> None:
    for name, width in (("Plan", 500), ("MemoryReport", 500), ("LoadLora", 440), ("Doctor", 900)):
        size = page.evaluate(f"[...LiteGraph.createNode('LowVRAM{name}').size]")
        assert size[0] >= width and size[1] > 60, f"{name}: {size}"


def test_blueprints_are_offered_and_open(page: QuietPage, server: Server, object_info: dict[str, Any]) -> None:
    offered = {
        entry["name"]: key for key, entry in server.get("/global_subgraphs").items() if entry["name"] in BLUEPRINTS
    }
    assert set(offered) == set(BLUEPRINTS)
    for name, key in offered.items():
        drop(page, name, json.loads(server.get(f"/global_subgraphs/{key}")["data"]))
        assert page.evaluate(COMPLAINTS) == []
        assert page.evaluate(MISSING) == []


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_a_page_in_another_language_has_its_texts(
    comfyui: ComfyUI, page: QuietPage, server: Server, request: pytest.FixtureRequest, language: str
) -> None:
    if not comfyui.is_newest or request.node.callspec.params["page"] != "canvas":
        pytest.skip("tried once, in the newest ComfyUI")
    texts = json.loads((ROOT / "web" / "texts" / f"{language}.json").read_text(encoding="utf-8"))
    server.post("/settings", {"Comfy.Locale": language})
    try:
        reload(page)
        check_texts(page, texts["lines"])
    finally:
        server.post("/settings", {"Comfy.Locale": "en"})
        reload(page)


def reload(page: QuietPage) -> None:
    page.page.reload()
    page.wait_for(APP_IS_UP)
    page.settle()


def check_texts(page: QuietPage, lines: dict[str, str]) -> None:
    """A note, what stands in plan and report before a run, a line with values, one in columns, and one of others."""
    name = "wan2.1_t2v_1.3B"
    drop(page, name)
    note = page.evaluate(NOTE).splitlines()
    assert note[0] == lines["# Wan 2.1 text to video, 1.3B"]
    links = [line for line in load_note(name).splitlines() if line.startswith("- [")]
    known = {*lines.values(), *links, "", "|---|---|"}
    assert [line for line in note if line not in known] == []
    shown = page.evaluate("[...document.querySelectorAll('.lowvram-text')].map(each => each.textContent)")
    assert set(shown) == {lines["(press Run)"]}
    row = f"  {'resident blocks':<38}{'0.01 GiB':>12}"
    text = f"Fits in 7.50 GiB: 12 blocks stay, 28 stream behind compute.\n{row}\na line that nobody knows"
    module = f"import('/extensions/{PACK_FOLDER}/texts.js')"
    first, second, third = page.evaluate(f"{module}.then(module => module.translated({json.dumps(text)}))").splitlines()
    wanted = lines["Fits in {}: {} blocks stay, {} stream behind compute."]
    for value in ("7.50 GiB", "12", "28"):
        wanted = wanted.replace("{}", value, 1)
    assert first == wanted
    assert second.startswith("  " + lines["  resident blocks {}"].split("{}")[0].strip()) and second.endswith(
        "  0.01 GiB"
    )
    assert third == "a line that nobody knows"


def load_note(name: str) -> str:
    return str(next(node for node in load(name)["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0])


def test_framepacks_sampler_shows_its_video(
    page: QuietPage, server: Server, object_info: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    drop(page, "framepack_i2v")
    graph = for_test(to_prompt(load("framepack_i2v"), object_info))
    sampler = next(node for node in graph.values() if node["class_type"] == "LowVRAMFramePackSampler")
    sampler["inputs"]["seed"] += 1  # a run of its own: test_workflows makes the other one
    page.evaluate(KEEP_TEXTS)
    server.run(graph, page.evaluate(CLIENT))
    page.wait_for("document.querySelector('video')", 30)
    said = page.evaluate("window.said")
    if request.node.callspec.params["page"] == "canvas":  # the first of the two: then the run is there already
        assert any(text.startswith("section 1 of ") and text.endswith(", decoding") for text in said)
    assert page.evaluate(COMPLAINTS) == []
    (shown,) = page.evaluate("[...document.querySelectorAll('video')].map(element => element.src)")
    assert "filename=framepack_i2v_" in shown and ".mp4" in shown and "type=output" in shown


@pytest.fixture(scope="session")
def saved_videos(server: Server, object_info: dict[str, Any]) -> dict[str, bytes]:
    """Videos that the page's workflows made, which have these in them."""
    return {name: saved_video(server, object_info, name) for name in ("wan2.1_t2v_1.3B", "framepack_i2v")}


def saved_video(server: Server, object_info: dict[str, Any], name: str) -> bytes:
    graph = for_test(to_prompt(load(name), object_info))
    for node in graph.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] += 2  # a run of its own
    outputs = server.run(graph, extra={"extra_pnginfo": {"workflow": load(name)}})
    files = [file for output in outputs.values() for file in output.get("images", ())]
    (saved,) = {(file["subfolder"], file["filename"]) for file in files if file["filename"].endswith(".mp4")}
    return server.base.joinpath("output", *saved).read_bytes()


@pytest.mark.parametrize("name", ["wan2.1_t2v_1.3B", "framepack_i2v"])
def test_a_dropped_video_restores_its_workflow(
    page: QuietPage, saved_videos: dict[str, bytes], object_info: dict[str, Any], name: str
) -> None:
    """Save Video's file, and FramePack Sampler's, which is joined of parts."""
    page.evaluate("window.app.graph.clear()")
    content = base64.b64encode(saved_videos[name]).decode("ascii")
    page.evaluate(f"{DROP_VIDEO}('film.mp4', {json.dumps(content)})")
    page.wait_for(f"window.app.graph.nodes.length === {len(load(name)['nodes'])}")
    page.settle()
    assert page.evaluate(COMPLAINTS) == []
    assert without_titles(page.evaluate(PROMPT)) == to_prompt(load(name), object_info)


def test_what_is_absent_is_complained_of(page: QuietPage) -> None:
    """So that no complaint means that nothing is absent."""
    for node_type, file_name in (("LowVRAMAbsent", None), ("VAELoader", "absent.safetensors")):
        workflow = load("wan2.1_t2v_1.3B")
        (folded,) = workflow["definitions"]["subgraphs"]
        node = next(node for node in folded["nodes"] if node["type"] == "VAELoader")
        node["type"] = node_type
        if file_name:
            node["widgets_values"] = [file_name]
            node["properties"]["models"][0]["name"] = file_name
        drop(page, "absent", workflow)
        assert page.evaluate(COMPLAINTS) != []
        assert page.evaluate(MISSING) == [node_type]
