"""Tokenizer files: `tokenizer.json`, or CLIP's `vocab.json` with `merges.txt`; and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...system.bounded_json import MOST_BYTES, read_json_object
from ...system.plain_text import short
from ...system.regular_files import is_there, read_regular
from ...weights.files.checkpoint import CheckpointError
from .bpe import CLIP_SPLIT, WHITE_SPACE, BytePairTokenizer, Part, refused

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SOURCE = "hunyuanvideo-community/HunyuanVideo"


@dataclass(frozen=True)
class WantedTokenizer:
    """A tokenizer in words for messages, the folders it lies in, and added tokens that tell it from others.

    `end` is the one of these that it puts after every text, where the encoder needs that.
    """

    title: str
    folders: tuple[str, ...]
    files: str
    marks: tuple[str, ...]
    end: str = ""


LLAMA_TOKENIZER = WantedTokenizer(
    "LLaMA 3's tokenizer",
    ("tokenizer", "llama_tokenizer"),
    TOKENIZER,
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
CLIP_TOKENIZER = WantedTokenizer(
    "CLIP's tokenizer",
    ("tokenizer_2", "clip_tokenizer", "sd1_tokenizer"),
    f"{VOCAB} and {MERGES}, or {TOKENIZER}",
    ("<|startoftext|>", "<|endoftext|>"),
    end="<|endoftext|>",
)


def find_tokenizer(wanted: WantedTokenizer, near: Path, encoder: Path) -> BytePairTokenizer:
    """The tokenizer in a folder, in one of its own in it, or in one beside it (as in a release's folders).

    CheckpointError, which says what to put where, if there is none or it belongs to another model.
    """
    if not is_there(near):
        raise CheckpointError(
            f"{near}: there is no such folder; expected one with {wanted.title}; "
            f"{_advice(wanted, near / wanted.folders[0])}"
        )
    folder = near if near.is_dir() else near.parent
    places = [folder / name for name in wanted.folders]
    places += [folder, *(folder.parent / name for name in wanted.folders)]
    found = [path for place in places for path in _files_in(place, wanted) if path.is_file()]
    for path in found:
        try:
            tokenizer = read_clip_vocab(path) if path.name == VOCAB else read_tokenizer_json(path)
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as a tokenizer: {error}; {_advice(wanted, path.parent)}"
            ) from error
        if _fits(tokenizer, wanted):
            return tokenizer
    if found:
        end = f", or without {wanted.end} after every text" if wanted.end else ""
        raise CheckpointError(
            f"{found[0]}: a tokenizer without {', '.join(wanted.marks)}{end}; expected {wanted.title}; "
            f"{_advice(wanted, places[0])}"
        )
    raise CheckpointError(
        f"{encoder}: there is no tokenizer for it in {folder}; expected {wanted.title} ({wanted.files}); "
        f"{_advice(wanted, places[0])}, or name the folder that holds it"
    )


def _fits(tokenizer: BytePairTokenizer, wanted: WantedTokenizer) -> bool:
    marked = all(tokenizer.token_id(mark) is not None for mark in wanted.marks)
    return marked and (not wanted.end or tokenizer.last[:1] == (tokenizer.token_id(wanted.end),))


def _files_in(place: Path, wanted: WantedTokenizer) -> list[Path]:
    """CLIP's older pair first: a `tokenizer.json` next to it may be LLaMA's."""
    if wanted is CLIP_TOKENIZER and (place / MERGES).is_file():
        return [place / VOCAB, place / TOKENIZER]
    return [place / TOKENIZER]


def _advice(wanted: WantedTokenizer, place: Path) -> str:
    return f"download {wanted.files} from the folder {wanted.folders[0]} of {SOURCE} into {place}"


# --- tokenizer.json --------------------------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    """A byte-level BPE tokenizer of Hugging Face. ValueError, which names the part, for one with other parts."""
    content = read_json_object(path)
    try:
        first, last = _frame(content.get("post_processor"))
        added = content.get("added_tokens") or ()
        return BytePairTokenizer(
            content["model"], added, content.get("pre_tokenizer"), content.get("normalizer"), first, last
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"it is incomplete ({short(repr(error))})") from error


def _frame(part: Part | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids put before and after every text."""
    if part is None or part["type"] == "ByteLevel":
        return (), ()
    if part["type"] == "RobertaProcessing":
        return (part["cls"][1],), (part["sep"][1],)
    if part["type"] == "Sequence":
        frames = [_frame(inner) for inner in part["processors"]]
        firsts, lasts = zip(*frames, strict=True) if frames else ((), ())
        return sum(reversed(firsts), ()), sum(lasts, ())
    if part["type"] == "TemplateProcessing":
        sides: tuple[list[int], list[int]] = [], []
        seen = False
        for entry in part["single"]:
            if "Sequence" in entry:
                seen = True
            else:
                sides[seen].extend(part["special_tokens"][entry["SpecialToken"]["id"]]["ids"])
        return tuple(sides[0]), tuple(sides[1])
    raise refused("post_processor", part["type"], "TemplateProcessing or RobertaProcessing")


# --- CLIP's pair -----------------------------------------------------------------------------------------

CLIP_PIECES: Part = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": CLIP_SPLIT}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
CLIP_NORMALIZER: Part = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": WHITE_SPACE}, "content": " "},
        {"type": "Lowercase"},
    ],
}


def read_clip_vocab(vocab_path: Path) -> BytePairTokenizer:
    """CLIP's tokenizer from a `vocab.json` and the `merges.txt` beside it. ValueError for those of another model.

    Text is put in Unicode's composed form, in lower case and with single spaces, as `tokenizers` does it: without
    ftfy, and without the spaces between Chinese characters that older releases of transformers put in.
    """
    vocab = read_json_object(vocab_path)
    begin, end = (vocab.get(mark) for mark in CLIP_TOKENIZER.marks)
    if begin is None or end is None:
        raise ValueError(f"it has no {' or no '.join(CLIP_TOKENIZER.marks)}; expected the vocabulary of CLIP")
    lines = read_regular(vocab_path.with_name(MERGES), MOST_BYTES).decode("utf-8").replace("\r\n", "\n").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    model = {"vocab": vocab, "merges": merges, "end_of_word_suffix": "</w>", "unk_token": CLIP_TOKENIZER.end}
    added = [
        {"id": begin, "content": CLIP_TOKENIZER.marks[0], "normalized": True},
        {"id": end, "content": CLIP_TOKENIZER.marks[1]},
    ]
    return BytePairTokenizer(model, added, CLIP_PIECES, CLIP_NORMALIZER, (begin,), (end,))
