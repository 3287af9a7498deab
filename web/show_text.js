// Shows the text that VRAM Plan, Memory Report, Load LoRA and Doctor make on the nodes themselves.
import { app } from "../../scripts/app.js";
import { translated } from "./texts.js";

const HEIGHTS = { LowVRAMPlan: 130, LowVRAMMemoryReport: 120, LowVRAMLoadLora: 60, LowVRAMDoctor: 420 };
const WIDTHS = { LowVRAMPlan: 500, LowVRAMMemoryReport: 500, LowVRAMLoadLora: 440, LowVRAMDoctor: 900 }; // of new nodes

app.registerExtension({
    name: "lowvramvideo.ShowText",

    nodeCreated(node) {
        const height = HEIGHTS[node.comfyClass];
        if (!height) {
            return;
        }
        const text = document.createElement("pre");
        text.className = "lowvram-text";
        text.textContent = translated("(press Run)");
        Object.assign(text.style, {
            margin: "0", padding: "6px", overflow: "auto", fontSize: "11px", lineHeight: "1.3", userSelect: "text",
            color: "var(--input-text)", background: "var(--comfy-input-bg)", borderRadius: "4px", whiteSpace: "pre-wrap",
            contain: "size", containIntrinsicHeight: `${height}px`, // Nodes 2.0: long text scrolls, no node grows by it
        });
        // a type of our own: of one that Nodes 2.0 knows, such as "text", it would draw its own field instead
        const widget = node.addDOMWidget("shown", "lowvram_text", text, {
            serialize: false, // not part of the prompt
            hideOnZoom: false,
            getMinHeight: () => height,
        });
        widget.serialize = false; // nor of the saved workflow
        const [least, tall] = node.computeSize();
        node.setSize([Math.max(least, WIDTHS[node.comfyClass]), tall]); // a saved node is given its own afterwards

        const executed = node.onExecuted;
        node.onExecuted = function (output) {
            executed?.apply(this, arguments);
            if (output?.text) {
                text.textContent = translated([].concat(output.text).join("\n"));
            }
        };
    },
});
