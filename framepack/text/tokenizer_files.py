"""Tokenizer files: `tokenizer.json`, or CLIP's `vocab.json` with `merges.txt`; and where they lie."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...weights.files.checkpoint import CheckpointError
from .bpe import AddedToken, BytePairTokenizer, Merges, Normalize, Split
from .split_patterns import compile_pattern

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SOURCE = "hunyuanvideo-community/HunyuanVideo"


@dataclass(frozen=True)
class WantedTokenizer:
    """A tokenizer in words for messages, the folders it lies in, and added tokens that tell it from others."""

    title: str
    folders: tuple[str, ...]
    files: str
    marks: tuple[str, ...]


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
)


def find_tokenizer(wanted: WantedTokenizer, near: Path, encoder: Path) -> BytePairTokenizer:
    """The tokenizer in a folder, in one of its own in it, or in one beside it (as in a release's folders).

    CheckpointError, which says what to put where, if there is none or it belongs to another model.
    """
    if not near.exists():
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
        if all(tokenizer.token_id(mark) is not None for mark in wanted.marks):
            return tokenizer
    if found:
        raise CheckpointError(
            f"{found[0]}: a tokenizer without {', '.join(wanted.marks)}; expected {wanted.title}; "
            f"{_advice(wanted, places[0])}"
        )
    raise CheckpointError(
        f"{encoder}: there is no tokenizer for it in {folder}; expected {wanted.title} ({wanted.files}); "
        f"{_advice(wanted, places[0])}, or name the folder that holds it"
    )


def _files_in(place: Path, wanted: WantedTokenizer) -> list[Path]:
    """CLIP's older pair first: a `tokenizer.json` next to it may be LLaMA's."""
    if wanted is CLIP_TOKENIZER and (place / MERGES).is_file():
        return [place / VOCAB, place / TOKENIZER]
    return [place / TOKENIZER]


def _advice(wanted: WantedTokenizer, place: Path) -> str:
    return f"download {wanted.files} from the folder {wanted.folders[0]} of {SOURCE} into {place}"


# --- tokenizer.json --------------------------------------------------------------------------------------

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    """A byte-level BPE tokenizer of Hugging Face. ValueError, which names the part, for one with other parts."""
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        first, last = _frame(content.get("post_processor"))
        return BytePairTokenizer(
            _model(content["model"]),
            tuple(_splits(content.get("pre_tokenizer"))),
            _normalizer(content.get("normalizer")),
            tuple(_added(entry) for entry in content.get("added_tokens") or ()),
            first,
            last,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is incomplete ({error!r})") from error


def _model(model: Mapping[str, Any]) -> Merges:
    if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("byte_fallback"):
        raise _other("model", model.get("type"), "byte-level BPE")
    # Each merge is "left right" or, in newer files, [left, right].
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    unknown = model.get("unk_token")
    return Merges(
        vocab=model["vocab"],
        ranks={pair: rank for rank, pair in enumerate(pairs)},
        end_of_word=model.get("end_of_word_suffix") or "",
        whole_words=bool(model.get("ignore_merges")),
        unknown=None if unknown is None else model["vocab"].get(unknown),
    )


def _added(entry: Mapping[str, Any]) -> AddedToken:
    if entry.get("single_word") or entry.get("lstrip") or entry.get("rstrip"):
        raise _other("added token", entry["content"], "tokens that leave the text around them as it is")
    return AddedToken(entry["content"], entry["id"], bool(entry.get("normalized")))


def _splits(part: Mapping[str, Any] | None) -> Iterable[Split]:
    if part is None:
        raise _other("pre_tokenizer", None, "Split and ByteLevel")
    if part["type"] == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _splits(inner)
    elif part["type"] == "Split":
        keeps_gaps = part["behavior"] == "Isolated"
        if not keeps_gaps and (part["behavior"], part.get("invert")) != ("Removed", True):
            raise _other("split", part["behavior"], "Isolated, or Removed and inverted")
        yield Split(compile_pattern(part["pattern"]["Regex"]), keeps_gaps)
    elif part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            yield Split(compile_pattern(GPT2_SPLIT))
    else:
        raise _other("pre_tokenizer", part["type"], "Split and ByteLevel without a space in front")


def _normalizer(part: Mapping[str, Any] | None) -> Normalize:
    if part is None:
        return str
    kind = part["type"]
    if kind == "Sequence":
        return _one_after_another([_normalizer(inner) for inner in part["normalizers"]])
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: unicodedata.normalize(kind, text)
    if kind == "Lowercase":
        return lower_case
    if kind == "Replace":
        pattern, content = compile_pattern(part["pattern"]["Regex"]), part["content"]
        return lambda text: pattern.sub(lambda _: content, text)
    raise _other("normalizer", kind, "NFC, Replace and Lowercase")


def _one_after_another(steps: Iterable[Normalize]) -> Normalize:
    steps = list(steps)

    def normalize(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normalize


def lower_case(text: str) -> str:
    """Character by character: `str.lower` would end words with another sigma."""
    return "".join(character.lower() for character in text)


def _frame(part: Mapping[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
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
    raise _other("post_processor", part["type"], "TemplateProcessing or RobertaProcessing")


def _other(part: str, given: object, expected: str) -> ValueError:
    return ValueError(f"its {part} is {given!r}; expected {expected}, as LLaMA 3 and CLIP have")


# --- CLIP's pair -----------------------------------------------------------------------------------------

CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def read_clip_vocab(vocab_path: Path) -> BytePairTokenizer:
    """CLIP's tokenizer from a `vocab.json` and the `merges.txt` beside it. ValueError for those of another model.

    Text is put in Unicode's composed form, in lower case and with single spaces, as `tokenizers` does it: without
    ftfy, and without the spaces between Chinese characters that older releases of transformers put in.
    """
    vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
    begin, end = (vocab.get(mark) for mark in CLIP_TOKENIZER.marks)
    if begin is None or end is None:
        raise ValueError(f"it has no {' or no '.join(CLIP_TOKENIZER.marks)}; expected the vocabulary of CLIP")
    lines = vocab_path.with_name(MERGES).read_text(encoding="utf-8").split("\n")
    pairs = [line for line in lines if line.strip() and not line.startswith("#version")]
    spaces = compile_pattern(r"\s+")
    return BytePairTokenizer(
        Merges(vocab, {pair: rank for rank, pair in enumerate(pairs)}, end_of_word="</w>", unknown=end),
        (Split(compile_pattern(CLIP_SPLIT), keeps_gaps=False),),
        lambda text: lower_case(spaces.sub(" ", unicodedata.normalize("NFC", text))),
        (AddedToken(CLIP_TOKENIZER.marks[0], begin, normalized=True), AddedToken(CLIP_TOKENIZER.marks[1], end)),
        (begin,),
        (end,),
    )
