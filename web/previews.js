// On the canvas a subgraph's node shows no previews of the samplers inside it: they are drawn below it while it runs.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const GAP = 10;
const HEIGHT = 240; // at most
const pictures = new Map(); // the subgraph's node -> the picture drawn below it

function hostOf(displayNodeId) {
    const [outer, inner] = String(displayNodeId ?? "").split(":");
    const node = inner ? (app.rootGraph ?? app.graph).getNodeById(Number(outer)) : null;
    return node?.isSubgraphNode?.() ? node : null;
}

function drawBelow(node) {
    if (node.lowvramDraws) {
        return;
    }
    node.lowvramDraws = true;
    const before = node.onDrawForeground;
    node.onDrawForeground = function (context) {
        before?.apply(this, arguments);
        const picture = pictures.get(this);
        if (!picture || this.flags?.collapsed || LiteGraph.vueNodesMode) {
            return;
        }
        const scale = Math.min(this.size[0] / picture.width, HEIGHT / picture.height);
        const [width, height] = [picture.width * scale, picture.height * scale];
        context.drawImage(picture, (this.size[0] - width) / 2, this.size[1] + GAP, width, height);
    };
}

app.registerExtension({
    name: "LowVRAMVideo.Previews",

    setup() {
        api.addEventListener("b_preview_with_metadata", async ({ detail }) => {
            const node = hostOf(detail.displayNodeId);
            if (!node || !detail.blob || LiteGraph.vueNodesMode) {
                return;
            }
            drawBelow(node);
            const picture = await createImageBitmap(detail.blob);
            pictures.get(node)?.close();
            pictures.set(node, picture);
            app.graph.setDirtyCanvas(true, false);
        });
        for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
            api.addEventListener(event, () => {
                pictures.forEach((picture) => picture.close());
                pictures.clear();
                app.graph.setDirtyCanvas(true, false);
            });
        }
    },
});
