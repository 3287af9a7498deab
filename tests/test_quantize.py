"""weights/linear/quantize.py and convert.py: quantising while reading and into files, which must be the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.cli.main import main
from lowvram_video.memory.stream.host_blocks import HostBlocks
from lowvram_video.memory.stream.layout import bind, layout_block
from lowvram_video.wanvideo.checkpoint import build_wan, open_wan
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.linear.convert import convert
from lowvram_video.weights.linear.quantize import QuantizedSource, quantize_checkpoint
from safetensors.torch import load_file, save_file

from .test_fp8 import comfy_quant, is_quantised, output, relative, scaled
from .tiny import load_wan, save_wan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("quantize") / "wan.safetensors", dtype=torch.bfloat16)


def quantised_model(path: Path, quantization: str) -> WanModel:
    """The model of a file as a streamed run holds it: blocks bound to flat extents of stored bytes."""
    config, checkpoint = open_wan(path)
    source = quantize_checkpoint(checkpoint, quantization)
    model = build_wan(config, source)
    blocks = {f"blocks.{index}": block for index, block in enumerate(model.blocks)}
    layouts = [layout_block(source, name, block.state_dict()) for name, block in blocks.items()]
    host = HostBlocks(source, layouts)
    for block, layout, extent in zip(blocks.values(), layouts, host.extents, strict=True):
        bind(block, layout, extent)
    for name, _ in list(model.named_parameters()):
        if not name.startswith("blocks."):
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(source.read(name), requires_grad=False))
    select_compute(model, model.blocks, quantization, CPU)
    model.execution = replace(model.execution, dtype=torch.float32)
    return model


@pytest.mark.parametrize(("quantization", "bound"), [("fp8", 0.03), ("fp8_fast", 0.05), ("int8", 0.01)])
def test_a_model_quantised_as_it_is_read(quantization: str, bound: float, plain: Path) -> None:
    want = output(load_wan(plain))
    error = relative(output(quantised_model(plain, quantization)), want)
    print(f"{quantization}: {error:.4f} from bf16")
    assert error < bound


def test_weights_are_the_closest_of_their_row(plain: Path) -> None:
    _, checkpoint = open_wan(plain)
    for quantization, largest, step in (("fp8", 448, 1 / 16), ("int8", 127, 1 / 254)):
        source = quantize_checkpoint(checkpoint, quantization)
        assert isinstance(source, QuantizedSource)
        for name in ("blocks.0.self_attn.q", "blocks.2.ffn.2"):
            weight = checkpoint.read(f"{name}.weight").float()
            values, scale = source.read(f"{name}.weight"), source.read(f"{name}.weight_scale")
            amax = weight.abs().amax(1, keepdim=True)
            assert scale.shape == (weight.shape[0], 1)
            torch.testing.assert_close(scale, amax / largest)
            off = (values.float() * scale - weight).abs()
            unit = weight.abs().clamp_min(float(amax.min()) / 448) if quantization == "fp8" else amax.expand_as(weight)
            assert bool((off <= unit * step * 1.001).all())


def test_only_the_blocks_linear_layers_change(plain: Path) -> None:
    _, checkpoint = open_wan(plain)
    source = quantize_checkpoint(checkpoint, "fp8")
    changed = {name for name, info in checkpoint.tensors.items() if source.tensors[name].dtype != info.dtype}
    assert changed == {name for name, info in checkpoint.tensors.items() if is_quantised(name, torch.empty(info.shape))}
    assert len(changed) == 30
    for name in set(checkpoint.tensors) - changed:
        assert torch.equal(source.read(name).view(torch.uint8), checkpoint.read(name).view(torch.uint8))
    assert quantize_checkpoint(checkpoint, "none") is checkpoint


def test_a_scale_can_be_read_before_its_weight_and_from_many_threads(plain: Path) -> None:
    _, checkpoint = open_wan(plain)
    first, second = (quantize_checkpoint(checkpoint, "int8") for _ in range(2))
    scale = first.read("blocks.1.ffn.0.weight_scale")
    second.read("blocks.1.ffn.0.weight")
    assert torch.equal(scale, second.read("blocks.1.ffn.0.weight_scale"))


def test_pieces_do_not_show(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = open_wan(plain)
    name = "blocks.0.ffn.0.weight"
    whole = quantize_checkpoint(checkpoint, "fp8").read(name)
    monkeypatch.setattr("lowvram_video.weights.linear.quantize.PIECE_ELEMENTS", 1000)
    assert torch.equal(whole.view(torch.uint8), quantize_checkpoint(checkpoint, "fp8").read(name).view(torch.uint8))


def test_quantised_files_stay_or_change_as_asked(plain: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(plain).items()}
    layers, _ = scaled(tensors)
    stored, _ = comfy_quant(tensors, layers)
    save_file(stored, tmp_path / "fp8.safetensors")
    _, checkpoint = open_wan(tmp_path / "fp8.safetensors")
    assert quantize_checkpoint(checkpoint, "fp8") is checkpoint
    assert quantize_checkpoint(checkpoint, "fp8_fast") is checkpoint
    want = output(load_wan(tmp_path / "fp8.safetensors"))
    error = relative(output(quantised_model(tmp_path / "fp8.safetensors", "int8")), want)
    print(f"an fp8 file made int8: {error:.4f} from the file's own weights")
    assert error < 0.01

    narrow = {name: t.to(torch.float8_e5m2) if is_quantised(name, t) else t for name, t in tensors.items()}
    save_file(narrow, tmp_path / "e5m2.safetensors")
    _, checkpoint = open_wan(tmp_path / "e5m2.safetensors")
    assert quantize_checkpoint(checkpoint, "fp8") is checkpoint
    assert quantize_checkpoint(checkpoint, "fp8_fast").tensors["blocks.0.ffn.0.weight"].dtype == torch.float8_e4m3fn


def test_what_is_in_no_file_cannot_be_read_from_one(plain: Path) -> None:
    source = quantize_checkpoint(open_wan(plain)[1], "fp8")
    for name in ("blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight_scale"):
        assert not source.tensors[name].file.exists()
    assert source.tensors["blocks.0.ffn.0.bias"].file == plain


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file_format", "quantization"), [("fp8_rows", "fp8"), ("fp8", "fp8"), ("int8", "int8")])
def test_a_converted_file_is_what_reading_makes(
    file_format: str, quantization: str, plain: Path, tmp_path: Path
) -> None:
    _, checkpoint = open_wan(plain)
    seen: list[tuple[int, int]] = []
    path = convert(checkpoint, tmp_path / "new.safetensors", file_format, lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] < sum(info.nbytes for info in checkpoint.tensors.values())
    assert [p.name for p in tmp_path.iterdir()] == ["new.safetensors"]
    _, converted = open_wan(path)
    assert quantize_checkpoint(converted, quantization) is converted
    model, want = load_wan(path), output(load_wan(plain))
    select_compute(model, model.blocks, quantization, CPU)
    error = relative(output(model), want)
    print(f"{file_format}: {error:.4f} from bf16")
    assert error < 0.03
    if file_format != "fp8":  # whose scales are per tensor
        source = quantize_checkpoint(checkpoint, quantization)
        assert source.tensors.keys() == converted.tensors.keys()
        layouts = [layout_block(source, f"blocks.{n}", block.state_dict()) for n, block in enumerate(model.blocks)]
        ours, theirs = [HostBlocks(each, layouts) for each in (source, converted)]
        for layout, one, other in zip(layouts, ours.extents, theirs.extents, strict=True):
            for place in layout.places:
                where = slice(place.offset, place.offset + place.nbytes)
                assert torch.equal(one[where], other[where]), place.name
        assert torch.equal(output(model), output(quantised_model(plain, quantization)))


def test_converted_files_speak_comfyuis_dialects(plain: Path, tmp_path: Path) -> None:
    _, checkpoint = open_wan(plain)
    fp8 = load_file(convert(checkpoint, tmp_path / "fp8.safetensors", "fp8"))
    assert fp8["scaled_fp8"].dtype == torch.float8_e4m3fn and fp8["scaled_fp8"].numel() == 0
    assert fp8["blocks.0.ffn.0.scale_weight"].shape == ()
    values, original = fp8["blocks.0.ffn.0.weight"], checkpoint.read("blocks.0.ffn.0.weight").float()
    assert float(values.float().abs().max()) == 448
    assert relative(values.float() * fp8["blocks.0.ffn.0.scale_weight"], original) < 0.03
    int8 = load_file(convert(checkpoint, tmp_path / "int8.safetensors", "int8"))
    marker = json.loads(bytes(int8["blocks.0.ffn.0.comfy_quant"].tolist()))
    assert marker == {"format": "int8_tensorwise"}
    assert int8["blocks.0.ffn.0.weight"].dtype == torch.int8
    assert relative(int8["blocks.0.ffn.0.weight"] * int8["blocks.0.ffn.0.weight_scale"], original) < 0.01


def test_what_cannot_be_converted_is_refused(plain: Path, tmp_path: Path) -> None:
    _, checkpoint = open_wan(plain)
    new = tmp_path / "new.safetensors"
    with pytest.raises(ValueError, match="cannot convert to 'fp4'; expected one of fp8, fp8_rows, int8"):
        convert(checkpoint, new, "fp4")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(checkpoint, tmp_path / "new.gguf", "fp8")
    with pytest.raises(ValueError, match="exists already"):
        convert(checkpoint, plain, "fp8")
    with pytest.raises(ValueError, match="no folder can be made there"):
        convert(checkpoint, plain / "new.safetensors", "fp8")
    convert(checkpoint, new, "int8")
    with pytest.raises(CheckpointError, match="its blocks are int8 already"):
        convert(open_wan(new)[1], tmp_path / "nowhere" / "again.safetensors", "int8")
    assert not (tmp_path / "nowhere").exists()
    assert convert(checkpoint, tmp_path / "nowhere" / "new.safetensors", "int8").read_bytes() == new.read_bytes()


def test_a_refused_conversion_tells_no_time(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(plain), str(plain), "--to", "fp8", "--device", "cpu"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "exists already" in told and "convert:" not in told
    command[2] = str(tmp_path / "new" / "wan.safetensors")
    assert main(command) == 0
    assert "convert: " in capsys.readouterr().err


def test_a_failed_conversion_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    _, checkpoint = open_wan(plain)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "new.safetensors", "fp8", stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory the Linux way")
def test_converting_takes_little_more_than_the_largest_tensor(tmp_path: Path) -> None:
    big = {f"blocks.{i}.ffn.0.weight": torch.ones(4096, 4096, dtype=torch.bfloat16) for i in range(6)}
    save_file(big, tmp_path / "big.safetensors")
    largest = 4096 * 4096 * 2
    code = """if True:
        import re, sys
        from pathlib import Path
        import torch
        from lowvram_video.weights.linear.convert import convert
        from lowvram_video.weights.files.open import open_checkpoint

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

        path = Path(sys.argv[1])
        before = peak()
        convert(open_checkpoint(path), path.with_name("new.safetensors"), "fp8")
        print(peak() - before)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "big.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"a file of {6 * largest / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f}: {peak / 2**20:.0f} MiB more")
    assert peak < largest + (300 << 20)
