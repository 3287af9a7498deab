// What a node says while it runs. ComfyUI shows that on the node, unless it is in a subgraph whose node alone is seen:
// then it is shown below that one, with the picture of the sampler's preview on the canvas (Nodes 2.0 shows it itself).
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { translated } from "./texts.js";

const GAP = 10;
const LINE = 16;
const HEIGHTS = [100, 240]; // of a picture, as far as the page goes
const CORES = "$$node-text-preview"; // the widget in which ComfyUI shows a text
const shown = new Map(); // the subgraph's node -> {picture, text, element, caption}

let run = 0; // one more with each that ends

function hostOf(nodeId) {
    const [outer, inner] = String(nodeId ?? "").split(":");
    const graph = app.rootGraph ?? app.graph;
    const node = inner ? graph.getNodeById(Number(outer)) : null;
    return node?.isSubgraphNode?.() ? node : null;
}

function below(node) {
    if (!shown.has(node)) {
        shown.set(node, {});
        drawBelow(node);
    }
    return shown.get(node);
}

// Where the visible part of the graph ends, in its own pixels.
function pageEnd() {
    const { scale, offset } = app.canvas.ds;
    return app.canvas.canvas.clientHeight / scale - offset[1];
}

function drawBelow(node) {
    if (node.lowvramDraws) {
        return;
    }
    node.lowvramDraws = true;
    const before = node.onDrawForeground;
    node.onDrawForeground = function (context) {
        before?.apply(this, arguments);
        const { picture, text } = shown.get(this) ?? {};
        if (this.flags?.collapsed || LiteGraph.vueNodesMode) {
            return;
        }
        let top = this.size[1] + GAP;
        if (text) {
            context.save();
            context.font = "12px sans-serif";
            context.fillStyle = LiteGraph.NODE_TEXT_COLOR;
            context.fillText(text, 0, top + LINE / 2);
            context.restore();
            top += LINE;
        }
        if (picture) {
            const room = Math.min(HEIGHTS[1], Math.max(HEIGHTS[0], pageEnd() - this.pos[1] - top - GAP));
            const scale = Math.min(this.size[0] / picture.width, room / picture.height);
            const [width, height] = [picture.width * scale, picture.height * scale];
            context.drawImage(picture, (this.size[0] - width) / 2, top, width, height);
        }
    };
}

// Nodes 2.0: a line of our own below the node's element.
function writeBelow(node, text) {
    const place = document.querySelector(`[data-node-id="${node.id}"]`);
    if (!place) {
        return;
    }
    const kept = below(node);
    if (kept.element?.parentNode !== place) {
        kept.element?.remove();
        kept.element = document.createElement("div");
        kept.element.className = "lowvram-progress";
        Object.assign(kept.element.style, {
            position: "absolute", top: `calc(100% + ${GAP}px)`, left: "0", fontSize: "12px", whiteSpace: "nowrap",
            color: "var(--input-text)", pointerEvents: "none",
        });
        place.append(kept.element);
    }
    kept.element.textContent = text;
}

function showText({ nodeId, text }) {
    const host = hostOf(nodeId);
    const words = translated(text);
    if (!host) {
        const node = app.canvas?.graph?.getNodeById(Number(String(nodeId).split(":").pop()));
        const widget = node?.widgets?.find((each) => each.name === CORES && each.value === text);
        if (widget && words !== text) {
            widget.value = words;
        }
        return;
    }
    below(host).text = words;
    if (LiteGraph.vueNodesMode) {
        writeBelow(host, words);
    }
    app.graph.setDirtyCanvas(true, false);
}

// Nodes 2.0 forgets a picture's size with each new one, and says "Calculating dimensions" until it is drawn: at the pace
// of a moving preview that blinks, so the line below it is not shown meanwhile.
function hideSize(node) {
    const caption = document.querySelector(`[data-node-id="${node.id}"] .image-preview > .text-center:last-child`);
    if (caption) {
        caption.style.visibility = "hidden";
        below(node).caption = caption;
    }
}

function clear() {
    run += 1;
    for (const { picture, element, caption } of shown.values()) {
        picture?.close();
        element?.remove();
        caption?.style.removeProperty("visibility");
    }
    shown.clear();
    app.graph.setDirtyCanvas(true, false);
}

app.registerExtension({
    name: "lowvramvideo.Progress",

    setup() {
        api.addEventListener("b_preview_with_metadata", async ({ detail }) => {
            const node = hostOf(detail.displayNodeId);
            if (!node || !detail.blob) {
                return;
            }
            const now = run;
            if (LiteGraph.vueNodesMode) {
                requestAnimationFrame(() => now === run && hideSize(node)); // once it is there
                return;
            }
            const picture = await createImageBitmap(detail.blob);
            if (now !== run) { // it ended meanwhile
                picture.close();
                return;
            }
            const kept = below(node);
            kept.picture?.close();
            kept.picture = picture;
            app.graph.setDirtyCanvas(true, false);
        });
        // after ComfyUI's own listener, whose text is then in the page's language
        api.addEventListener("progress_text", ({ detail }) => queueMicrotask(() => showText(detail)));
        for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
            api.addEventListener(event, clear);
        }
    },
});
