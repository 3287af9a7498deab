// Texts of ours in the page's language: lines of notes, plans and reports, and what the commonest errors mean.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const LANGUAGES = { zh: "zh", "zh-TW": "zh", ja: "ja" };
const ESCAPED = /[.*+?^$()|[\]\\]/g;
let texts = null; // {lines: {English: translated}, messages: {English: what it means}}, {} standing for anything
let patterns = [];

// "{} of {}" -> what finds it; spaces at its ends and before a {} may be more, for columns
function pattern(english) {
    const parts = english.trim().split("{}").map((part) => part.replace(ESCAPED, "\\$&").replace(/ +/g, " +"));
    return new RegExp(`^( *)${parts.join("(.+?)")}$`);
}

function translatedLine(line) {
    const exact = texts.lines[line];
    if (exact !== undefined) {
        return exact;
    }
    for (const [finds, translated] of patterns) {
        const found = finds.exec(line);
        if (found) {
            let next = 2;
            const text = found[1] + translated.trim().replace(/\{\}/g, () => found[next++]);
            return found.length === 3 ? inColumns(text, found[2], line) : text;
        }
    }
    const means = meaning(line);
    return means ? `${means}\n${line}` : line;
}

function width(text) {
    return [...text].reduce((sum, letter) => sum + (letter > "\u2e80" ? 2 : 1), 0);
}

// With its value where it is in the English line, which has spaces before it.
function inColumns(text, value, line) {
    if (!line.endsWith(`  ${value}`) || !text.endsWith(value)) {
        return text;
    }
    return text.slice(0, -value.length) + " ".repeat(Math.max(0, line.length - width(text))) + value;
}

// A text as it is in the page's language; lines that are not known stay as they are.
export function translated(text) {
    return texts ? text.split("\n").map(translatedLine).join("\n") : text;
}

// What an error's message means, or nothing.
function meaning(message) {
    for (const [english, means] of Object.entries(texts?.messages ?? {})) {
        const parts = english.split("…").map((part) => part.trim()).filter((part) => part);
        let place = 0;
        if (parts.every((part) => (place = message.indexOf(part, place)) >= 0)) {
            return means;
        }
    }
    return null;
}

function translateNotes(nodes) {
    for (const node of nodes) {
        const widget = node.type === "MarkdownNote" && node.widgets?.find((each) => typeof each.value === "string");
        if (widget) {
            widget.value = translated(widget.value);
        }
    }
}

app.registerExtension({
    name: "LowVRAMVideo.Texts",

    async init() {
        const language = LANGUAGES[app.ui?.settings?.getSettingValue("Comfy.Locale")];
        if (!language) {
            return;
        }
        const answer = await fetch(new URL(`./texts/${language}.json`, import.meta.url));
        texts = answer.ok ? await answer.json() : null;
        patterns = Object.entries(texts?.lines ?? {})
            .filter(([english]) => english.includes("{}"))
            .map(([english, text]) => [pattern(english), text]);
        api.addEventListener("execution_error", ({ detail }) => {
            const means = texts && meaning(detail.exception_message ?? "");
            if (means && !detail.exception_message.includes(means)) {
                detail.exception_message = `${means}\n\n${detail.exception_message}`;
            }
        });
    },

    afterConfigureGraph() {
        if (texts) {
            translateNotes(app.graph.nodes);
        }
    },
});
