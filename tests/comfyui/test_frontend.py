"""ComfyUI's page in a headless Chromium: each workflow is dropped on it and gives the prompt that the tests submit.

With LOWVRAM_THUMBNAILS=1 the screenshots become example_workflows/*.jpg. COMFYUI_FRONTEND is the static folder of
another comfyui-frontend-package than the installed one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .browser import Browser, Page, find_chromium
from .server import PACK_FOLDER, Server
from .tiny_files import make_inputs, make_models
from .workflows import FOLDER, NAMES, for_test, load, to_prompt

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium (set CHROMIUM to its path)")

WINDOW, THUMBNAIL = (2800, 1575), (1280, 720)
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the page opens with its tour
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text even where it is small
}
APP_IS_UP = "window.app && window.app.graph && window.app.rootGraph !== null && document.querySelector('#graph-canvas')"
DROP = """((name, text) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, {type: 'application/json'}));
    const canvas = document.querySelector('#graph-canvas');
    const where = {dataTransfer: data, bubbles: true, cancelable: true, clientX: 900, clientY: 600};
    for (const kind of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(kind, where));
})"""
COMPLAINTS = "[...document.querySelectorAll('[role=dialog], [role=alert], .p-dialog, .p-toast-message')]\
.map(element => element.innerText.trim()).filter(text => text)"
MISSING = "window.app.graph.nodes.filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type])\
.map(node => node.type)"
BOUNDS = """(() => {
    const {scale, offset} = window.app.canvas.ds;
    const page = window.app.canvas.canvas.getBoundingClientRect();
    const boxes = window.app.graph.groups.map(group => group.boundingRect ?? group._bounding);
    const x = value => (value + offset[0]) * scale + page.left, y = value => (value + offset[1]) * scale + page.top;
    return [
        x(Math.min(...boxes.map(box => box[0]))), y(Math.min(...boxes.map(box => box[1]))),
        x(Math.max(...boxes.map(box => box[0] + box[2]))), y(Math.max(...boxes.map(box => box[1] + box[3]))),
    ];
})()"""
CLIENT = "window.app.api.clientId"
PROMPT = "window.app.graphToPrompt().then(result => result.output)"


@pytest.fixture(scope="module")
def server(comfyui: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("base")
    make_models(base / "models")
    make_inputs(base / "input")
    another = os.environ.get("COMFYUI_FRONTEND")
    flags = ("--cpu", "--front-end-root", another) if another else ("--cpu",)
    with Server(comfyui.folder, comfyui.python, base, flags) as running:
        running.post("/settings", SETTINGS)
        yield running
    shutil.rmtree(base / "models")  # 1.9 GB, which pytest would keep


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Browser(tmp_path_factory.mktemp("profile"), WINDOW) as browser:
        page = browser.open(f"http://127.0.0.1:{server.port}/")
        page.wait_for(APP_IS_UP)
        time.sleep(3)  # extensions register after the graph is there
        yield page


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in prompt.items()}


def drop(page: Page, name: str) -> None:
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    page.evaluate("window.app.graph.clear()")
    page.evaluate(f"{DROP}({json.dumps(name + '.json')}, {json.dumps(text)})")
    page.wait_for(f"window.app.graph.nodes.length === {len(json.loads(text)['nodes'])}")
    time.sleep(2)  # dialogs come late


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_workflow_is_what_the_tests_submit(page: Page, server: Server, name: str, tmp_path: Path) -> None:
    drop(page, name)
    keep(screenshot(page), name, tmp_path)
    assert page.evaluate(COMPLAINTS) == []
    assert page.evaluate(MISSING) == []
    from_browser = without_titles(page.evaluate(PROMPT))
    from_python = to_prompt(load(name), server.get("/object_info"))
    assert from_browser == from_python


def test_help_translations_and_templates_are_served(page: Page, server: Server) -> None:
    for node in (name for name in server.get("/object_info") if name.startswith("LowVRAM")):
        text = page.evaluate(f"fetch('/extensions/{PACK_FOLDER}/docs/{node}.md').then(answer => answer.text())")
        assert text.startswith("# "), f"{node}: {text[:80]}"
    translations = server.get("/i18n")
    assert {"en", "zh", "ja"} <= set(translations)
    assert sorted(server.get("/workflow_templates")[PACK_FOLDER]) == NAMES


@pytest.mark.parametrize("name", ["demo"])
def test_the_demo_runs_from_the_page(page: Page, server: Server, name: str, tmp_path: Path) -> None:
    drop(page, name)
    page.evaluate("window.app.queuePrompt(0)")
    end = time.monotonic() + 120
    while not (history := server.get("/history")) and time.monotonic() < end:
        time.sleep(0.5)
    assert [entry["status"]["status_str"] for entry in history.values()] == ["success"]
    time.sleep(3)  # pictures load
    assert page.evaluate(COMPLAINTS) == []
    plan, report = page.evaluate("[...document.querySelectorAll('.lowvram-text')].map(element => element.innerText)")
    assert "predicted peak" in plan
    assert "denoise" in report
    keep(screenshot(page), name, tmp_path)


def test_framepacks_sampler_shows_its_video(page: Page, server: Server) -> None:
    drop(page, "framepack_i2v")
    server.run(for_test(to_prompt(load("framepack_i2v"), server.get("/object_info"))), page.evaluate(CLIENT))
    page.wait_for("document.querySelector('video')", 30)
    assert page.evaluate(COMPLAINTS) == []
    (shown,) = page.evaluate("[...document.querySelectorAll('video')].map(element => element.src)")
    assert "filename=framepack_i2v_" in shown and ".mp4" in shown and "type=output" in shown


def keep(picture: Image.Image, name: str, folder: Path) -> None:
    picture.save(folder / f"{name}.jpg", quality=85)
    if os.environ.get("LOWVRAM_THUMBNAILS"):
        picture.save(FOLDER / f"{name}.jpg", quality=85, optimize=True)


def screenshot(page: Page) -> Image.Image:
    """The groups of the graph, without the page's bars."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(1.5)
    left, top, right, bottom = page.evaluate(BOUNDS)
    picture = Image.open(io.BytesIO(page.screenshot(95))).convert("RGB")
    picture = picture.crop((int(left) - 20, int(top) - 20, int(right) + 20, int(bottom) + 20))
    picture.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    return picture
