"""weights/files/checkpoint.py: against safetensors' own reader, and every file that cannot be used."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.weights.files.checkpoint import Checkpoint, CheckpointError
from lowvram_video.weights.files.open import open_checkpoint
from safetensors.torch import load_file, save, save_file

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    return (torch.randn(shape) * 10).to(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert same_bytes(checkpoint.read(name), tensor), name


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], stem: str = "model", index: bool = True) -> list[Path]:
    """Three shards, one tensor each in turn, and their index."""
    paths = [folder / f"{stem}-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: paths[i % 3].name for i, name in enumerate(tensors)}
    for path in paths:
        save_file({n: tensors[n] for n, file in weight_map.items() if file == path.name}, path)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def write_header(path: Path, header: object, data: bytes = b"\0" * 64) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple = (4,), offsets: tuple = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path: Path, *words: str) -> str:
    """Opening fails in one line that names the file and says each of `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    print(message)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    assert path.name in message
    for word in ("expected", *words):
        assert word in message
    return message


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.randn(3, i + 1) for i in range(7)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_as_safetensors_reads_it(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    tensors = {"matrix": random_tensor(dtype, 5, 7), "scalar": random_tensor(dtype), "none": random_tensor(dtype, 0, 3)}
    save_file(tensors, path, metadata={"format": "pt", "who": "us"})
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, load_file(path))
    assert checkpoint.metadata == {"format": "pt", "who": "us"}
    assert checkpoint.tensors["matrix"].nbytes == 35 * dtype.itemsize


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=4)), max_size=8))
def test_any_table_of_tensors_reads_as_written(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    tensors = {f"t{i}": random_tensor(dtype, *shape) for i, (dtype, shape) in enumerate(table)}
    path.write_bytes(save(tensors))
    assert_same(open_checkpoint(path), tensors)


def test_read_into_a_view_of_a_larger_buffer_leaves_its_neighbours(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = open_checkpoint(str(path))
    info = checkpoint.tensors["layer.3.weight"]
    buffer = torch.full((256 + info.nbytes + 64,), 77, dtype=torch.uint8)
    with torch.inference_mode():
        checkpoint.read_into(info.name, buffer[256 : 256 + info.nbytes])
    assert same_bytes(buffer[256 : 256 + info.nbytes].view(torch.float32), tensors[info.name].flatten())
    assert (buffer[:256] == 77).all() and (buffer[256 + info.nbytes :] == 77).all()


def test_read_into_refuses_an_unsuitable_target(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    for out in (torch.empty(5, dtype=torch.uint8), torch.empty(3), torch.empty(24, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="read_into"):
            checkpoint.read_into("layer.0.weight", out)


def test_many_threads_read_at_once(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {f"t{i}": torch.randn(1000 + i) for i in range(64)}
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    with ThreadPoolExecutor(8) as pool:
        read = dict(zip(tensors, pool.map(checkpoint.read, tensors), strict=True))
    assert all(same_bytes(read[name], tensors[name]) for name in tensors)


def test_shards_by_index_by_any_shard_and_by_folder(tmp_path, tensors):
    paths = write_shards(tmp_path, tensors)
    for path in (tmp_path / "model.safetensors.index.json", *paths, tmp_path):
        assert_same(open_checkpoint(path), tensors)


def test_shards_without_an_index(tmp_path, tensors):
    paths = write_shards(tmp_path, tensors, index=False)
    for path in (paths[1], tmp_path):
        assert_same(open_checkpoint(path), tensors)


def test_folder_with_one_file(tmp_path, tensors):
    save_file(tensors, tmp_path / "any.safetensors")
    assert_same(open_checkpoint(tmp_path), tensors)


def test_renamed_maps_keeps_and_drops(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    renamed = open_checkpoint(path).renamed({"layer.0.weight": "first", "layer.1.weight": None})
    assert renamed.tensors["first"].name == "first"
    assert same_bytes(renamed.read("first"), tensors["layer.0.weight"])
    assert set(renamed.tensors) == {"first", *(f"layer.{i}.weight" for i in range(2, 7))}
    with pytest.raises(CheckpointError, match=r"layer\.0\.weight and layer\.1\.weight.*download"):
        open_checkpoint(path).renamed({"layer.0.weight": "layer.1.weight"})


# --- files that cannot be used ---------------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "gone.safetensors", "no such file", "check the name")


@pytest.mark.parametrize("keep", [4, 12, 60, 0.5, 0.9, -1])
def test_a_truncated_file(tmp_path, tensors, keep):
    path = tmp_path / "model.safetensors"
    whole = save(tensors)
    keep = int(len(whole) * keep) if isinstance(keep, float) else keep
    path.write_bytes(whole[:keep])
    message = refused(path, "download it again")
    if keep == -1 or keep > len(whole) / 2:
        assert f"{len(whole[:keep]):,} bytes; expected {len(whole):,}" in message


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (b"", "empty file", "download it again"),
        (b"<!DOCTYPE html><html><body>Log in to download</body></html>", "web page", "logged in"),
        (b"\n  <html><head></head></html>", "web page", "logged in"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git-lfs pointer", "git lfs pull"),
        (b"PK\x03\x04" + b"\0" * 60, "pickle", "download the .safetensors version"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00", "pickle", "download the .safetensors version"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 60, "GGUF", "rename it to end in .gguf"),
        (b'{"error": "Repository not found"}', "JSON", "choose the .safetensors file itself"),
        (b"\x12\x34 some other bytes, whatever they are", "not a safetensors file", "download it again"),
    ],
)
def test_something_else_under_the_name(tmp_path, content, what, fix):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, what, fix)


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        ({"a": entry(), "b": entry(offsets=(8, 24))}, "the bytes of a and b overlap"),
        ({"a": entry(offsets=(16, 0))}, "byte range 16 to 0"),
        ({"a": entry(offsets=(0, 12))}, "F32 [4] but has the byte range 0 to 12"),
        ({"a": entry(offsets=(-16, 0))}, "byte range -16 to 0"),
        ({"a": entry(shape=(-2, -2))}, "F32 [-2, -2]"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "entry for a is incomplete"),
        ({"a": 7}, "entry for a is incomplete"),
        ({"__metadata__": 3, "a": entry()}, "no table of tensors"),
    ],
)
def test_a_damaged_header(tmp_path, header, detail):
    refused(write_header(tmp_path / "model.safetensors", header), "damaged", detail, "download it again")


def test_a_header_that_is_not_json(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 8) + b'{"a": \xff}' + b"\0" * 16)
    refused(path, "no valid JSON", "download it again")


def test_offsets_beyond_the_end(tmp_path):
    path = write_header(tmp_path / "model.safetensors", {"a": entry(shape=(1000,), offsets=(0, 4000))})
    refused(path, "truncated", "download it again")


def test_an_unknown_number_format(tmp_path):
    path = write_header(tmp_path / "model.safetensors", {"a": entry(dtype="F3")})
    refused(path, "'F3'", "expected one of F64", "choose another release")


def test_a_file_that_shrinks_or_goes_after_it_was_opened(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated.*download it again"):
        checkpoint.read("layer.6.weight")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read.*check that it exists"):
        checkpoint.read("layer.0.weight")


def test_a_missing_shard(tmp_path, tensors):
    paths = write_shards(tmp_path, tensors)
    paths[1].unlink()
    lost = "model-00002-of-00003.safetensors"
    refused(tmp_path / "model.safetensors.index.json", "1 of 3 shards", lost, "download them")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(paths[0], "1 of 3 shards", lost, "download them")


def test_a_truncated_shard_is_named(tmp_path, tensors):
    paths = write_shards(tmp_path, tensors)
    paths[2].write_bytes(paths[2].read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: a truncated"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_what_a_shard_lacks(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["extra.bias"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(table))
    refused(index, "extra.bias is in model-00002-of-00003.safetensors", "does not hold it", "download both again")


def test_shards_that_hold_a_tensor_twice(tmp_path, tensors):
    paths = write_shards(tmp_path, tensors)
    save_file(load_file(paths[1]) | {"layer.0.weight": torch.zeros(3)}, paths[1])
    refused(tmp_path / "model.safetensors.index.json", "layer.0.weight is in more than one shard", "download it again")


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("{", "no valid JSON", "download it again"),
        ('{"num_layers": 40}', "without a `weight_map`", "choose the .safetensors file"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "outside its own folder", "download it again"),
    ],
)
def test_a_bad_index(tmp_path, text, what, fix):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refused(path, what, fix)


def test_folders_that_hold_no_or_several_models(tmp_path, tensors):
    refused(tmp_path, "found: none", "choose the file itself")
    (tmp_path / "transformer").mkdir()
    save_file(tensors, tmp_path / "transformer" / "a.safetensors")
    refused(tmp_path, "found: none", "choose one of its folders (transformer)")
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    refused(tmp_path, "found: a.safetensors, b.safetensors", "choose the file itself")


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("model.pth", "pickle", "save_file"),
        ("model.bin", "pickle", "download the .safetensors version"),
        ("model.CKPT", "pickle", "download the .safetensors version"),
        ("model.pt", "pickle", "download the .safetensors version"),
        ("model.gguf", "not a GGUF file", "download it again"),
        ("model.onnx", "'.onnx' is not known", "choose a .safetensors file"),
        ("model", "'(none)' is not known", "choose a .safetensors file"),
    ],
)
def test_other_file_types(tmp_path, name, what, fix):
    (tmp_path / name).write_bytes(b"anything")
    refused(tmp_path / name, what, fix)
