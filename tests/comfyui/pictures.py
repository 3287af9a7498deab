"""Takes the documentation's pictures of ComfyUI's page on a screen of 1920x1080, in both renderers.

Run it as `python -m tests.comfyui.pictures` in the repository's folder; COMFYUI_DIR and COMFYUI_FRONTEND are those of
the tests. It writes docs/images/workflow.webp, the demo as it ran, and page.webp: what nodes show of a run, of its
film, its preview and an error. With `--workflows`, and minutes more, it writes workflows.webp: all as they open.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .browser import QuietPage, open_page
from .conftest import installations
from .model_files import FRAMEPACK
from .server import Server
from .test_frontend import APP_IS_UP, CLIENT, COUNT_PREVIEWS, RENDERERS, SETTINGS, drop
from .tiny_files import make_inputs, make_models
from .workflows import NAMES, for_test, load, to_prompt

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SCREEN, TILE, PANEL = (1920, 1080), (320, 180), (620, 470)
BELOW = 260  # pixels below a node, where its preview may be
ERROR_LOG = 330  # where it begins on the screen
PAGE = "#202124"
SHUT = {"Comfy.RightSidePanel.IsOpen": False, "Comfy.Execution.PreviewMethod": "auto"}


def main() -> None:
    newest, another = installations()[0], os.environ.get("COMFYUI_FRONTEND")
    flags = ("--cpu", "--front-end-root", another) if another else ("--cpu",)
    wanted = [("page", panels, 70), *([("workflows", tiles, 40)] if "--workflows" in sys.argv else [])]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_models(base / "models", full_size=False)
        make_inputs(base / "input")
        with Server(newest.folder, newest.python, base, flags) as server:
            for name, take, quality in wanted:
                pairs = zip(*(take(server, in_page) for in_page in RENDERERS.values()), strict=True)
                save(sheet([picture for pair in pairs for picture in pair]), name, quality)


@contextmanager
def opened(server: Server, in_page: bool) -> Iterator[QuietPage]:
    """The page as it opens; `in_page`: drawn by Nodes 2.0."""
    server.post("/settings", SETTINGS | SHUT | {"Comfy.VueNodes.Enabled": in_page})
    with open_page(f"http://127.0.0.1:{server.port}/", SCREEN) as page:
        page.wait_for(APP_IS_UP)
        page.settle()
        yield page


def tiles(server: Server, in_page: bool) -> list[Image.Image]:
    """All workflows as they open."""
    taken = []
    with opened(server, in_page) as page:
        for name in NAMES:
            drop(page, name)
            taken.append(screen(page).resize(TILE, Image.Resampling.LANCZOS))
    return taken


def panels(server: Server, in_page: bool) -> list[Image.Image]:
    with opened(server, in_page) as page:
        return [*run_demo(page, server, in_page), film(page, server), refusal(page, server)]


def run_demo(page: QuietPage, server: Server, in_page: bool) -> list[Image.Image]:
    """The preview while it runs; plan and report afterwards."""
    drop(page, "demo")
    server.post("/history", {"clear": True})
    page.evaluate(COUNT_PREVIEWS)
    page.evaluate("(window.app.graph.nodes.find(each => each.isSubgraphNode?.()).widgets"
                  f".find(each => each.name === 'seed').value = {1 + in_page}, window.app.queuePrompt(0))")  # fmt: skip
    page.wait_for("window.previewed.length > 40")
    preview = node(page, "isSubgraphNode?.()", from_below=PANEL[1])
    while not server.get("/history"):
        time.sleep(0.5)
    page.settle()
    page.page.wait_for_timeout(3000)  # the card that tells of the run goes
    if in_page:
        save(screen(page), "workflow", 80)
    return [preview, node(page, "type === 'LowVRAMPlan'"), node(page, "type === 'LowVRAMMemoryReport'")]


def film(page: QuietPage, server: Server) -> Image.Image:
    drop(page, "framepack_i2v")
    server.run(for_test(to_prompt(load("framepack_i2v"), server.get("/object_info"))), page.evaluate(CLIENT))
    page.wait_for("document.querySelector('video')")
    page.settle()
    return node(page, "type === 'LowVRAMShowVideo'")


def refusal(page: QuietPage, server: Server) -> Image.Image:
    """A file of another model, in the loader."""
    drop(page, "wan2.1_t2v_1.3B")
    graph = for_test(to_prompt(load("wan2.1_t2v_1.3B"), server.get("/object_info")))
    for each in graph.values():
        if each["class_type"] == "LowVRAMLoadWanModel":
            each["inputs"]["model_name"] = FRAMEPACK.name
    server.wait(server.queue(graph, page.evaluate(CLIENT)))
    page.page.get_by_text("View details").first.click()
    page.page.wait_for_timeout(2000)
    return screen(page).crop((SCREEN[0] - PANEL[0], ERROR_LOG, SCREEN[0], ERROR_LOG + PANEL[1]))


def node(page: QuietPage, which: str, from_below: int = 0) -> Image.Image:
    """The panel at a node's upper left corner, or of so many pixels at its lower end."""
    left, top, height = page.evaluate(
        f"(node => [node.pos[0], node.pos[1], node.size[1]])(window.app.graph.nodes.find(each => each.{which}))"
    )
    offset = page.evaluate("[...window.app.canvas.ds.offset]")
    x, y = int(left + offset[0]) - 20, int(top + offset[1]) - 50
    y = min(y + int(height) + BELOW - from_below, SCREEN[1] - PANEL[1]) if from_below else y
    return screen(page).crop((x, y, x + PANEL[0], y + PANEL[1]))


def screen(page: QuietPage) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot(95))).convert("RGB")


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """As many in a row as make it about as wide as a screen, in pairs of both renderers."""
    width, height = pictures[0].size
    columns = 2 * max(1, SCREEN[0] // width // 2)
    whole = Image.new("RGB", (width * columns, height * -(-len(pictures) // columns)), PAGE)
    for index, picture in enumerate(pictures):
        whole.paste(picture, (width * (index % columns), height * (index // columns)))
    return whole


def save(picture: Image.Image, name: str, quality: int) -> None:
    picture.save(IMAGES / f"{name}.webp", quality=quality, method=6)


if __name__ == "__main__":
    main()
