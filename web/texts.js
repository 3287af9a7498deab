// Texts of ours in the page's language: lines of notes, plans and reports, and what the commonest errors mean.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const LANGUAGES = { zh: "zh", "zh-TW": "zh", ja: "ja" };
const ESCAPED = /[.*+?^$()|[\]\\]/g;
const MARK = /^ *[✓✗·→] /; // of what Doctor found, and of what to do
let texts = null; // {lines: {English: translated}, messages: {English: what it means}}, {} standing for anything
let patterns = [];

// "{} of {}" -> what finds it; before a {} may be more spaces, and in a value are no two of them: it ends at its column
function pattern(english) {
    const parts = english.trim().split("{}").map((part) => part.replace(ESCAPED, "\\$&").replace(/ +/g, " +"));
    return new RegExp(`^( *)${parts.join("((?:(?!  ).)+?)")}$`);
}

function exact(text) {
    return Object.hasOwn(texts.lines, text) ? texts.lines[text] : null;
}

// What a line or a part of one is in the page's language, or null.
function known(text) {
    const same = exact(text);
    if (same !== null) {
        return same;
    }
    for (const [finds, translated] of patterns) {
        const found = finds.exec(text);
        if (found) {
            const values = found.slice(2);
            const whole = found[1] + translated.trim().replace(/\{\}/g, () => knownValue(values.shift()));
            return found.length === 3 ? inColumns(whole, found[2], text) : whole;
        }
    }
    return null;
}

// A value of a line: most stay as they are; some are words, or a list of them.
function knownValue(value) {
    for (const [separator, translated] of [["; ", "；"], [null, null], [", ", "、"]]) {
        const parts = separator ? value.split(separator) : [value];
        const them = parts.length > 1 || !separator ? parts.map(known) : [];
        if (them.some((each) => each !== null)) {
            return them.map((each, index) => each ?? parts[index]).join(translated ?? "");
        }
    }
    return value;
}

// A row of a table, whose columns stand apart by two spaces and more; its mark stays. Null where no column is known.
function knownRow(line) {
    const mark = MARK.exec(line)?.[0] ?? "";
    const cells = [...line.slice(mark.length).matchAll(/\S+(?: \S+)*/g)].map((cell) => {
        return { text: cell[0], start: mark.length + cell.index };
    });
    const them = cells.map((cell) => known(cell.text));
    if (them.every((each) => each === null)) {
        return null;
    }
    const figures = cells.length > 2; // to the right, behind what they are of
    return cells.reduce((row, cell, index) => {
        const text = them[index] ?? cell.text;
        const start = figures && index ? cell.start + cell.text.length - width(text) : cell.start;
        return row + " ".repeat(Math.max(index ? 1 : 0, start - width(row))) + text;
    }, mark);
}

function translatedLine(line) {
    const found = (MARK.test(line) ? null : known(line)) ?? knownRow(line);
    if (found !== null) {
        return found;
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
            const lines = widget.value.split("\n").map((line) => exact(line) ?? line); // a note may be the user's own
            widget.value = lines.join("\n");
        }
    }
}

app.registerExtension({
    name: "lowvramvideo.Texts",

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
            const message = detail.exception_message ?? "";
            const means = texts && (known(message.trim()) ?? meaning(message));
            if (means && !message.includes(means)) {
                detail.exception_message = `${means}\n\n${message}`;
            }
        });
    },

    afterConfigureGraph() {
        if (texts) {
            translateNotes(app.graph.nodes);
        }
    },
});
