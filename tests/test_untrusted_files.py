"""Files that somebody made to be read badly: one line each, little memory, no waiting, and never what was not meant."""

import json
import logging
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.cli.main import main
from lowvram_video.framepack.checkpoint import check_file as check_framepack
from lowvram_video.framepack.run.folder import RunStore
from lowvram_video.framepack.text.checkpoint import open_llama
from lowvram_video.framepack.vae.checkpoint import HUNYUAN_FORMAT
from lowvram_video.system.bounded_json import MOST_DEPTH, JsonError, parse_json, read_json
from lowvram_video.system.card_profile import ProfileError, load_profile
from lowvram_video.video.growing_state import read_state
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.files.open import open_checkpoint
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from .refusals import MOST_SECONDS, refusal

GIB = 2**30
MOST_BYTES = 100 << 20


@pytest.fixture
def bounded() -> Iterator[None]:
    """What Python takes while a test runs, and how long it does."""
    tracemalloc.start()
    began = time.monotonic()
    yield
    seconds, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST_BYTES and seconds < MOST_SECONDS


def with_header(path: Path, header: str | bytes, data: bytes = b"\0" * 4) -> Path:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sparse(path: Path, head: bytes, size: int) -> Path:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


# --- safetensors, as the library judges -------------------------------------------------------------------

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def entry(**swap: str) -> str:
    fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | swap
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


HEADERS = {
    "plain": f'{{"a":{ENTRY}}}',
    "a name twice": f'{{"a":{ENTRY},"a":{ENTRY}}}',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{ENTRY}}}',
    "a key of metadata twice": f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{ENTRY}}}',
    "a field twice": '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "metadata of null": f'{{"__metadata__":null,"a":{ENTRY}}}',
    "a number in metadata": f'{{"__metadata__":{{"a":5}},"a":{ENTRY}}}',
    "null in metadata": f'{{"__metadata__":{{"a":null}},"a":{ENTRY}}}',
    "an object in metadata": f'{{"__metadata__":{{"a":{{"b":1}}}},"a":{ENTRY}}}',
    "another field": f'{{"a":{entry(x="[[1]]")}}}',
    "1e999": f'{{"a":{entry(x="1e999")}}}',
    "10^400": f'{{"a":{entry(x="1" + "0" * 400)}}}',
    "NaN": f'{{"a":{entry(x="NaN")}}}',
    "spaces after it": f'{{"a":{ENTRY}}}  \n\t ',
    "words after it": f'{{"a":{ENTRY}}} x',
    "a space before it": f' {{"a":{ENTRY}}}',
    "-0": f'{{"a":{entry(data_offsets="[-0,4]")}}}',
    "floats": f'{{"a":{entry(data_offsets="[0.0,4.0]")}}}',
    "true": f'{{"a":{entry(shape="[true]")}}}',
    "half a character": f'{{"\\ud800":{ENTRY}}}',
    "half a character in metadata": f'{{"__metadata__":{{"a":"\\ud800"}},"a":{ENTRY}}}',
    "a list for an entry": '{"a":["F32",[1],[0,4]]}',
    "three offsets": f'{{"a":{entry(data_offsets="[0,4,4]")}}}',
    "a shape of text": f'{{"a":{entry(shape=chr(34) + "1" + chr(34))}}}',
    "a byte too many": f'{{"a":{entry(data_offsets="[0,4]")}}}',
    "nothing at the end": f'{{"a":{ENTRY},"z":{entry(shape="[0]", data_offsets="[4,4]")}}}',
    "nothing in the middle": f'{{"a":{ENTRY},"z":{entry(shape="[0]", data_offsets="[2,2]")}}}',
    "2^63 times nothing": f'{{"a":{ENTRY},"z":{entry(shape="[9223372036854775808,0]", data_offsets="[4,4]")}}}',
    "2^64 squared times nothing": f'{{"z":{entry(shape=f"[{2**64 - 1},{2**64 - 1},0]", data_offsets="[0,0]")}}}',
    "the same bytes twice": f'{{"a":{ENTRY},"b":{ENTRY}}}',
    "a gap": f'{{"a":{entry(data_offsets="[4,8]")}}}',
    "no name": f'{{"":{ENTRY}}}',
    "deep": f'{{"a":{entry(x="[" * 130 + "]" * 130)}}}',
    "very deep": "[" * 100_000,
    "control characters": f'{{"a\x01":{ENTRY}}}',
    "an unknown number format": f'{{"a":{entry(dtype=chr(34) + "F3" + chr(34))}}}',
    "a byte order mark": f'\ufeff{{"a":{ENTRY}}}',
    "UTF-16": f'{{"a":{ENTRY}}}'.encode("utf-16-le"),
    "bytes that are no text": b'{"\xff":' + ENTRY.encode() + b"}",
    "empty": "{}",
}


# Where nobody writes so, and the library reads it.
STRICTER = ("a list for an entry", "a space before it", "2^63 times nothing", "another field")


@pytest.mark.parametrize("data", [b"\0" * 4, b"\0" * 8, b""], ids=["4 bytes", "8 bytes", "none"])
@pytest.mark.parametrize("title", HEADERS)
def test_what_the_library_refuses_is_refused(tmp_path: Path, title: str, data: bytes) -> None:
    path = with_header(tmp_path / "m.safetensors", HEADERS[title], data)
    try:
        names = {name for name, _ in deserialize(path.read_bytes())}
    except SafetensorError:
        refusal(lambda: open_checkpoint(path))
        return
    if title in STRICTER:
        return
    assert set(open_checkpoint(path).tensors) == names


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Some bytes of the header others, or a value of it, or the file cut."""
    length = struct.unpack("<Q", raw[:8])[0]
    kind = draw.randrange(4)
    if kind == 0:
        spoiled = bytearray(raw)
        for _ in range(draw.randrange(1, 4)):
            spoiled[draw.randrange(8 + length)] = draw.randrange(256)
        return bytes(spoiled)
    if kind == 1:
        return raw[: draw.randrange(len(raw))]
    header = json.loads(raw[8 : 8 + length])
    junk = [None, True, -1, 0, 2**62, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "0", [], {}, [-1, 4], [0, 0]]
    name = draw.choice(list(header))
    place = draw.choice(["dtype", "shape", "data_offsets"])
    if kind == 2 or name == "__metadata__":
        header[name] = draw.choice(junk)
    else:
        header[name][place] = draw.choice(junk)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def test_no_mutation_is_accepted_that_the_library_refuses(tmp_path: Path) -> None:
    raw = save({"a": torch.ones(2, 3), "b": torch.ones(0, 3), "c.d": torch.ones(4, dtype=torch.int8)}, {"x": "1"})
    draw, path, accepted = random.Random(7), tmp_path / "m.safetensors", 0
    for _ in range(1500):
        data = mutated(raw, draw)
        path.write_bytes(data)
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        deserialize(data)  # raises what it refuses
    assert accepted


# --- counts and lengths ------------------------------------------------------------------------------------


def gguf(num_tensors: int, num_fields: int, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_fields) + rest


def gguf_list(element: int, count: int) -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, element, count)


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("m.safetensors", struct.pack("<Q", GIB) + b"{", GIB + 100),
        ("m.safetensors", struct.pack("<Q", 2**63) + b"{", 100),
        ("m.gguf", gguf(0, 1, struct.pack("<Q", GIB)), GIB + 100),
        ("m.gguf", gguf(0, 2**40), 600 << 20),
        ("m.gguf", gguf(2**40, 0), 600 << 20),
        ("m.gguf", gguf(0, 40_000_000), 600 << 20),
        ("m.gguf", gguf(20_000_000, 0), 600 << 20),
        ("m.gguf", gguf(0, 1, gguf_list(8, 2**40)), 600 << 20),
        ("m.gguf", gguf(0, 1, gguf_list(8, 70_000_000)), 600 << 20),
        ("m.gguf", gguf(0, 1, gguf_list(0, 2**62)), 600 << 20),
        ("m.gguf", gguf(0, 1, gguf_list(0, 500 << 20)), 600 << 20),
        ("m.safetensors.index.json", b"[" * 10, 600 << 20),
    ],
)
def test_absurd_counts_cost_nothing(tmp_path: Path, bounded: None, name: str, head: bytes, size: int) -> None:
    path = sparse(tmp_path / name, head, size)
    assert name in refusal(lambda: open_checkpoint(path))


def tensor_entry(name: bytes, dims: list[int], at: int, kind: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in dims)
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, at)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ([(b"a", [8], 0), (b"b", [8], 0)], "overlap"),
        ([(b"a", [8], 2**64 - 32)], "truncated"),
        ([(b"a", [2**63], 0)], "damaged"),
        ([(b"a", [0], 0)], "damaged"),
        ([(b"a", [1] * 9, 0)], "dimensions"),
        ([(b"a", [8], 0), (b"a", [8], 32)], "twice"),
    ],
)
def test_places_of_gguf_tensors(tmp_path: Path, entries: list, word: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(len(entries), 0, b"".join(tensor_entry(*each) for each in entries)) + b"\0" * 512)
    assert word in refusal(lambda: open_checkpoint(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize(
    "name", ["m.safetensors", "m.gguf", "m.safetensors.index.json", "m-00001-of-00001.safetensors"]
)
def test_a_pipe_is_no_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "a pipe or a device" in refusal(lambda: open_checkpoint(tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_no_json_either(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "card.json")
    refusal(lambda: load_profile(tmp_path / "card.json"), OSError)
    refusal(lambda: read_state(tmp_path / "card.json"), OSError)


@pytest.mark.parametrize("name", ["", ".", "..", "../m", "/etc/passwd", "a/b", "C:\\x", "..\\x", "a\0b"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    assert "outside its own folder" in refusal(lambda: open_checkpoint(path))


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b.safetensors", "m-00000-of-00000.safetensors"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    if "\0" not in name and len(name) < 255:
        save_file({"a": torch.ones(1)}, tmp_path / name)
    refusal(lambda: open_checkpoint(tmp_path / name))


# --- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff", b"\xef\xbb\xbf{}", b"NaN", b"[Infinity]", b"[-Infinity]", b"1e400", b"[1e300]", b"9" * 6000,
        b"[9223372036854775808]", b"[-9223372036854775809]", b"[" * 100_000, b'{"a":' * 5000, b'["\\ud800"]',
        b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), b"{} x", '{"a": 1}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_json_that_is_not_read(text: bytes, tmp_path: Path) -> None:
    refusal(lambda: parse_json(text), JsonError)
    (tmp_path / "film.json").write_bytes(text)
    refusal(lambda: load_profile(tmp_path / "film.json"), ProfileError)
    refusal(lambda: read_state(tmp_path / "film.json"), ValueError)


def test_json_that_is_read() -> None:
    whole = {"a": [1, -(2**63), 2**63 - 1, 1.5, -0.25, 1e38, True, None, "日本 🐱", {"b": []}], "": {}}
    assert parse_json(json.dumps(whole)) == whole
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    nested: Any = 1
    for _ in range(MOST_DEPTH):
        nested = [nested]
    assert parse_json(json.dumps(nested)) == nested


def test_json_of_too_many_bytes(tmp_path: Path, bounded: None) -> None:
    refusal(lambda: parse_json(b"[1, 2, 3]", 5), JsonError)
    refusal(lambda: read_json(sparse(tmp_path / "a.json", b"[", 1 << 30)), OSError)


# --- a run's own files ------------------------------------------------------------------------------------------


def test_a_section_that_grew_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunStore.open(tmp_path, {"seed": 1}, 2) as store:
        store.save_section(0, torch.ones(1, 16, 2, 4, 6), torch.Generator().get_state())
        path = store._path(0)
    os.truncate(path, 2 * GIB)
    with caplog.at_level(logging.WARNING), RunStore.open(tmp_path, {"seed": 1}, 2) as store:
        assert store.completed == 0
    assert "are no tensor's" in caplog.text


# --- other kinds of files, of whom there is nothing above --------------------------------------------------------


@pytest.mark.parametrize("open_it", [open_llama, HUNYUAN_FORMAT.open_file, check_framepack])
def test_any_other_file_is_refused_in_one_line(tmp_path: Path, open_it: Callable[[Any], object]) -> None:
    path = tmp_path / "m.safetensors"
    save_file(
        {"\x1b[31mred\x1b]0;title\x07.x": torch.zeros(1), "x\ny": torch.zeros(1), "z" * 20_000: torch.zeros(1)}, path
    )
    given = open_checkpoint(path) if open_it is check_framepack else path
    refusal(lambda: open_it(given))


def test_inspect_shows_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"\x1b[31mred\x1b]0;title\x07.x": torch.zeros(1), "x\ny": torch.zeros(1)}, path)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr()
    assert "\\x1b[31mred" in said.out and not {"\x1b", "\x07"} & set(said.out + said.err)
