"""LoRAs merged into weights, streamed with their blocks, and from the command line."""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from filelock import FileLock
from lowvram_video.cli.main import main, make_parser
from lowvram_video.memory.stream.disk_blocks import DiskBlocks
from lowvram_video.memory.stream.host_blocks import HostBlocks
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.scratch_folders import remove_left_behind
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.kernels.row_reference import LARGEST
from lowvram_video.weights.linear.dialects import plain_dialect
from lowvram_video.weights.linear.fp8 import Fp8Dequantized
from lowvram_video.weights.linear.gguf import GGUF_FORMATS, Q8_0, pack_q8_0
from lowvram_video.weights.linear.int8 import Int8Dequantized
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.weight_format import PLAIN, WeightFormat
from lowvram_video.weights.lora import merge
from lowvram_video.weights.lora.attach import AttachedLoras
from lowvram_video.weights.lora.file import LoraChoice, open_lora
from lowvram_video.weights.lora.merge import requantize
from lowvram_video.weights.lora.merged_source import MergedSource
from lowvram_video.weights.lora.update import decomposed
from safetensors.torch import load_file, save_file
from torch import Tensor

from .loras import (
    AB,
    DIM,
    FFN,
    INPUTS,
    LAYERS,
    error_of,
    make_factors,
    merged_by_hand,
    rand,
    save_lora,
    start,
    velocity,
)
from .test_gguf import save_wan as save_gguf
from .tiny import CONFIGS, load_wan, randomize, save_files, save_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors")


# --- what is merged --------------------------------------------------------------------------------------


def test_differences_convolutions_and_dora_are_merged(
    wan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down, up, conv_down, conv_up = rand(1, 4, DIM), rand(2, DIM, 4), rand(3, 4, 16, 1, 2, 2), rand(4, DIM, 4, 1, 1, 1)
    rows, columns = rand(5, DIM, 1).abs() + 1, rand(6, 1, DIM).abs() + 1
    q, k = "blocks.0.self_attn.q", "blocks.1.cross_attn.k"
    more = {
        "diffusion_model.blocks.0.norm3.diff": rand(7, DIM),
        "diffusion_model.blocks.0.norm3.diff_b": rand(8, DIM),
        "diffusion_model.blocks.1.self_attn.norm_k.diff": rand(9, DIM),
        "diffusion_model.blocks.1.diff_m": rand(10, 1, 6, DIM),
        "diffusion_model.blocks.2.modulation.diff": rand(11, 1, 6, DIM),
        "diffusion_model.head.diff_m": rand(12, 1, 2, DIM),
        "diffusion_model.blocks.2.ffn.0.diff": rand(13, FFN, DIM),
        "diffusion_model.time_projection.1.diff_b": rand(14, 6 * DIM),
        "diffusion_model.patch_embedding.lora_down.weight": conv_down,
        "diffusion_model.patch_embedding.lora_up.weight": conv_up,
        f"diffusion_model.{q}.lora_A.weight": down,
        f"diffusion_model.{q}.lora_B.weight": up,
        f"diffusion_model.{q}.dora_scale": rows,
        f"diffusion_model.{k}.lora_A.weight": down,
        f"diffusion_model.{k}.lora_B.weight": up,
        f"diffusion_model.{k}.dora_scale": columns,
    }
    factors = make_factors(layers=["blocks.1.ffn.2"])
    lora = save_lora(tmp_path / "lora.safetensors", factors, "LightX2V", **more)
    strength, weights = 0.6, merged_by_hand(load_file(wan), factors, 0.6)
    tensors = {
        "blocks.0.norm3.weight": more["diffusion_model.blocks.0.norm3.diff"],
        "blocks.0.norm3.bias": more["diffusion_model.blocks.0.norm3.diff_b"],
        "blocks.1.self_attn.norm_k.weight": more["diffusion_model.blocks.1.self_attn.norm_k.diff"],
        "blocks.1.modulation": more["diffusion_model.blocks.1.diff_m"],
        "blocks.2.modulation": more["diffusion_model.blocks.2.modulation.diff"],
        "head.modulation": more["diffusion_model.head.diff_m"],
        "blocks.2.ffn.0.weight": more["diffusion_model.blocks.2.ffn.0.diff"],
        "time_projection.1.bias": more["diffusion_model.time_projection.1.diff_b"],
        "patch_embedding.weight": torch.einsum("or,rcthw->octhw", conv_up[..., 0, 0, 0], conv_down),
    }
    for name, difference in tensors.items():
        weights[name] = weights[name] + strength * difference
    for name, magnitude, dim in ((f"{q}.weight", rows, 1), (f"{k}.weight", columns, 0)):
        changed = weights[name] + up @ down
        changed = magnitude * changed / changed.norm(dim=dim, keepdim=True)
        weights[name] = weights[name] + strength * (changed - weights[name])
    save_file(weights, tmp_path / "hand.safetensors")
    with caplog.at_level(logging.INFO):
        got = velocity(wan, LoraChoice(lora, strength))
    want = velocity(tmp_path / "hand.safetensors")
    print(f"differences, a convolution, DoRA: relative error {error_of(got, want):.1e}")
    assert error_of(got, want) < 1e-5
    said = [record.getMessage() for record in caplog.records if "merged" in record.getMessage()]
    assert said == ["LoRA: 11 tensors are merged as they are read."]
    with pytest.raises(CheckpointError, match=r"can only be merged.*choose lora_mode auto"):
        StreamedWan(wan, RunSettings(lora_mode="side"), loras=[LoraChoice(lora)])


@pytest.mark.parametrize("num_scales", [1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bit_weights_beside_a_scale_are_merged_into_too(dtype: torch.dtype, num_scales: int) -> None:
    weight = rand(0, 6, 8)
    values = torch.empty(6, 8, dtype=dtype)
    scales = requantize(weight, Fp8Dequantized(), dtype, num_scales, values)
    assert torch.equal(values, weight.to(dtype))
    assert scales is not None and torch.equal(scales, torch.ones(num_scales))


@pytest.mark.parametrize("num_scales", [1, 24])
@pytest.mark.parametrize(
    "form", [PLAIN, Fp8Dequantized(), Int8Dequantized(), GGUF_FORMATS[Q8_0]], ids=lambda form: form.name
)
def test_weights_are_stored_again_some_rows_at_a_time(
    form: WeightFormat, num_scales: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made on the way is several times as large, and a layer of 14B is 270 MiB in fp32."""
    weight = rand(1, 24, 64) * torch.logspace(-2, 2, 24)[:, None]
    dtype = torch.int8 if isinstance(form, Int8Dequantized) else torch.float8_e4m3fn
    per_row = weight.abs().amax(1, keepdim=True) / LARGEST[dtype]
    scales = per_row if num_scales > 1 else per_row.max().reshape(1, 1)
    want = {
        PLAIN: lambda: weight.clamp(-448, 448).to(dtype),
        GGUF_FORMATS[Q8_0]: lambda: pack_q8_0(weight),
    }.get(form, lambda: (weight / scales).round().to(dtype) if dtype == torch.int8 else (weight / scales).to(dtype))()
    largest: list[int] = []

    def noted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda rows, *rest: (largest.append(rows.numel()), make(rows, *rest))[1]

    monkeypatch.setattr(merge, "PIECE_ELEMENTS", 5 * 64 + 7)
    for name in ("quantized", "row_scales", "pack_q8_0", "_cast"):
        monkeypatch.setattr(merge, name, noted(getattr(merge, name)))
    values = torch.empty_like(want)
    made = requantize(weight, form, dtype, num_scales, values)
    assert torch.equal(values.view(torch.uint8), want.view(torch.uint8)) and max(largest) == 5 * 64
    if isinstance(form, Fp8Dequantized | Int8Dequantized):
        assert made is not None and torch.equal(made, scales.flatten())
    else:
        assert made is None


def test_a_weight_in_fp32_is_changed_where_it_was_read_to() -> None:
    class Held:
        tensors = {"a.weight": TensorInfo("a.weight", torch.float32, (6, 8), Path("held"), 0, 192)}

        def read_into(self, name: str, out: Tensor) -> None:
            out.copy_(rand(2, 6, 8).view(-1).view(torch.uint8))

    out, seen = torch.empty(192, dtype=torch.uint8), []
    MergedSource(Held(), {"a.weight": lambda dense: (seen.append(dense.data_ptr()), dense.mul_(2))[1]}).read_into(
        "a.weight", out
    )
    assert seen == [out.data_ptr()] and torch.equal(out.view(torch.float32).view(6, 8), 2 * rand(2, 6, 8))


def test_decomposed_lengths() -> None:
    weight = rand(0, 5, 5)
    assert torch.allclose(decomposed(weight, torch.arange(1.0, 6.0)).norm(dim=1), torch.arange(1.0, 6.0))
    assert torch.allclose(decomposed(weight, torch.arange(1.0, 6.0)[None]).norm(dim=0), torch.arange(1.0, 6.0))


@pytest.mark.parametrize(("quantization", "per_row"), [("fp8", 0.04), ("int8", 0.012)])
def test_merged_8_bit_weights_get_fresh_scales(wan: Path, tmp_path: Path, quantization: str, per_row: float) -> None:
    factors = {layer: (down * 5, up * 5, alpha) for layer, (down, up, alpha) in make_factors(rank=16).items()}
    choice = LoraChoice(save_lora(tmp_path / "lora.safetensors", factors))
    settings = RunSettings(quantization=quantization, lora_mode="merge")
    model = start(StreamedWan(wan, settings, loras=[choice]))
    plain = start(StreamedWan(wan, replace(settings, lora_mode="auto")))
    layer, before = model.model.blocks[1].ffn[0], plain.model.blocks[1].ffn[0]
    assert "lora_down" not in layer._parameters and layer.weight.dtype == before.weight.dtype
    down, up, alpha = factors["blocks.1.ffn.0"]
    want = before.format.dequantize(before.packed(), torch.float32) + (alpha or 0) / 16 * up @ down
    got = layer.format.dequantize(layer.packed(), torch.float32)
    error = error_of(got, want)
    print(f"{quantization}: {error:.1e} of the dense sum; the largest scale grows by "
          f"{float(layer.weight_scale.max() / before.weight_scale.max()):.1f}")  # fmt: skip
    assert error < per_row
    assert layer.weight_scale.max() > 1.5 * before.weight_scale.max()


def test_one_scale_stays_one_scale(tmp_path: Path) -> None:
    weight = rand(1, 64, 64)
    scale = weight.abs().max() / 448
    save_file({"layer.weight": (weight / scale).to(torch.float8_e4m3fn), "layer.scale_weight": scale,
               "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")  # fmt: skip
    difference = 4 * rand(2, 64, 64)
    save_file({"layer.diff": difference}, tmp_path / "lora.safetensors")
    checkpoint = plain_dialect(open_checkpoint(tmp_path / "fp8.safetensors"))
    lora = open_lora(tmp_path / "lora.safetensors", checkpoint.tensors, {"layer": "layer"})
    source = AttachedLoras(torch.nn.Module(), checkpoint, [lora], [1.0], torch.float32).source()

    def read(name: str) -> Tensor:
        raw = torch.empty(source.tensors[name].nbytes, dtype=torch.uint8)
        source.read_into(name, raw)
        return raw.view(source.tensors[name].dtype).view(source.tensors[name].shape)

    fresh = read("layer.weight_scale")  # before the weight: whichever comes first
    assert fresh.shape == scale.shape and fresh > 2 * scale
    error = error_of(read("layer.weight").float() * fresh, weight + difference)
    print(f"fp8 with one scale: {error:.1e}")
    assert error < 0.04


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K"])
def test_what_is_merged_into_a_gguf_is_stored_as_q8_0(tmp_path: Path, quant: str) -> None:
    path, dense = save_gguf(tmp_path / "wan.gguf", quant)
    down, up = rand(1, 4, 256) * 20, rand(2, 256, 4) * 20
    key = "blocks.0.self_attn.q"
    save_file({f"{key}.{end}": t for end, t in zip(AB, (down, up), strict=True)}, tmp_path / "l.safetensors")
    choice = LoraChoice(tmp_path / "l.safetensors", 0.5)
    model = start(StreamedWan(path, RunSettings(lora_mode="merge"), loras=[choice]))
    layer = model.model.get_submodule(key)
    assert isinstance(layer, Linear) and layer.format.name == "Q8_0"
    want = dense.get_submodule(key).weight + 0.5 * up @ down
    packed = torch.from_numpy(gguf.quants.quantize(want.detach().numpy(), gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(layer.weight, packed)
    model.set_lora_strengths([0.0])  # then the file's own bytes are read
    start(model)
    layer = model.model.get_submodule(key)
    assert layer.format.name == quant and torch.equal(layer.weight, open_checkpoint(path).read(f"{key}.weight"))
    model.release()
    model.attach_loras([], [])
    assert layer.format.name == quant


def test_weights_that_take_no_merging_are_named(tmp_path: Path) -> None:
    info = TensorInfo("layer.weight", torch.uint8, (8, 8), tmp_path / "w.safetensors", 0, 64, "nvfp4", (8, 16))
    save_file({"layer.diff": torch.zeros(8, 16)}, tmp_path / "l.safetensors")
    lora = open_lora(tmp_path / "l.safetensors", {"layer.weight": info}, {"layer": "layer"})
    source = Checkpoint(tmp_path / "w.safetensors", {"layer.weight": info}, {})
    with pytest.raises(CheckpointError, match=r"layer\.weight must be merged, which cannot be done into .*; expected"):
        AttachedLoras(torch.nn.Module(), source, [lora], [1.0], torch.float32)
    path = save_wan(tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="lora_mode is 'both'; expected one of auto, side, merge"):
        StreamedWan(path, RunSettings(lora_mode="both"))


# --- streaming -------------------------------------------------------------------------------------------


def test_a_loras_bytes_travel_with_their_blocks(tmp_path: Path) -> None:
    wan = save_wan(tmp_path / "wan.safetensors", num_layers=5)
    lora = LoraChoice(
        save_lora(tmp_path / "lora.safetensors", make_factors(rank=8, layers=[*LAYERS, "text_embedding.2"]))
    )
    resident = velocity(wan, lora)
    model, plain = StreamedWan(wan, RunSettings(), loras=[lora]), StreamedWan(wan, RunSettings())
    places = {place.name for place in model.weights.layouts[0].places}
    assert {"self_attn.q.lora_down", "self_attn.q.lora_up", "ffn.2.lora_up"} <= places
    assert not any("lora_scale" in place for place in places)
    extra = model.weights.layouts[0].nbytes - plain.weights.layouts[0].nbytes
    assert extra == 4 * 8 * (8 * 2 * DIM + 2 * (DIM + FFN))
    assert model.footprint().fixed_bytes - plain.footprint().fixed_bytes == 4 * 8 * 2 * DIM
    # those of what makes keys and values of the prompt stay at home with it
    assert model.weights.layouts[0].stream_bytes - plain.weights.layouts[0].stream_bytes == extra - 4 * 8 * 4 * DIM
    with torch.inference_mode():
        for swap, disk in ((3, False), (5, True)):
            start(model, swap, disk)
            assert isinstance(model.weights.blocks, DiskBlocks if disk else HostBlocks)
            assert torch.equal(model(*INPUTS), resident)
            model.release()


def refuse_folders_in(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """As where models lie on a disk that is mounted read-only."""
    make = tempfile.mkdtemp

    def refusing(suffix: str | None = None, prefix: str | None = None, dir: Path | None = None) -> str:
        if dir == home:
            raise OSError(30, "Read-only file system")
        return make(suffix, prefix, dir)

    monkeypatch.setattr("tempfile.mkdtemp", refusing)


@pytest.mark.parametrize("writable", [True, False], ids=["beside the model", "models are read-only"])
@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_large_tensors_that_are_in_no_file_stream_from_disk(
    tmp_path: Path, mode: str, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above 1 MiB tensors are read from a file in every pass: from a temporary one, deleted afterwards."""
    home, temporary = tmp_path / "models", tmp_path / "temporary"
    home.mkdir(), temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if not writable:
        refuse_folders_in(monkeypatch, home)
    folder, other = (home, temporary) if writable else (temporary, home)
    config = replace(CONFIGS["t2v"], ffn_dim=4096, num_layers=5)
    wan = home / "wan.safetensors"
    save_file({name: t.contiguous() for name, t in randomize(WanModel(config)).state_dict().items()}, wan)
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(80, DIM, generator=generator), torch.randn(4096, 80, generator=generator) / 80, 80.0
    lora = LoraChoice(save_lora(tmp_path / "lora.safetensors", {f"blocks.{n}.ffn.0": pair for n in range(2)}))
    settings = RunSettings(lora_mode=mode)
    resident = velocity(wan, lora, settings=settings)
    with torch.inference_mode():
        model = start(StreamedWan(wan, settings, loras=[lora]), 5, disk=True)
        assert len(list(folder.rglob("weights"))) == 1 and not list(other.rglob("weights"))
        assert model.weights.scratch_file is not None and model.weights.scratch_file.num_bytes >= 2 * 2**20
        assert torch.equal(model(*INPUTS), resident) and not torch.equal(resident, velocity(wan))
        model.release()
    assert [path.name for path in (*home.iterdir(), *temporary.iterdir())] == ["wan.safetensors"]


def test_what_a_killed_process_left_on_the_disk_is_removed(tmp_path: Path) -> None:
    left, older, used, new = (tmp_path / f".lowvram-video-{name}" for name in ("left", "older", "used", "new"))
    for folder in (left, older, used, new):
        folder.mkdir()
        (folder / "weights").write_bytes(b"many")
        if folder != older:
            (folder / "lock").touch()
        os.utime(folder, (0, 0) if folder != new else None)
    with FileLock(used / "lock"):
        remove_left_behind(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([used, new])


def test_loras_beside_a_model_loaded_whole_do_nothing_to_it(wan: Path) -> None:
    with torch.inference_mode():
        assert torch.equal(load_wan(wan)(*INPUTS), velocity(wan))


# --- pipeline and command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("files"), experts=True)


def command(files: WanFiles, output: Path, *more: object) -> list[str]:
    words: list[object] = [
        "generate", "--model", files.model, "--text-encoder", files.text_encoder, "--vae", files.vae,
        "--prompt", "a red ball moves left", "--output", output, "--device", "cpu",
        "--width", 48, "--height", 32, "--frames", 5, "--steps", 2, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def test_the_command_line_applies_loras_to_both_experts(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"lora_te_text.alpha": torch.tensor(1.0)}
    high = save_lora(tmp_path / "high.safetensors", make_factors(0, 4), "musubi", **odd)
    low = save_lora(tmp_path / "low.safetensors", make_factors(1, 8), "diffusers")
    style = save_lora(tmp_path / "style.safetensors", make_factors(2, 4, LAYERS[:3]))

    untold = ("--metadata", "none")  # the file names its LoRAs otherwise

    def made(*more: object) -> tuple[bytes, str]:
        status = main(command(files, tmp_path / "v.mp4", *more, "--model-low", files.model_low, "--overwrite", *untold))
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return (tmp_path / "v.mp4").read_bytes(), shown.out

    with_loras, text = made("--lora", f"{high}:0.5", "--lora", style, "--lora-low", f"{low}:1.0")
    print(text)
    assert "high.safetensors: 90 of 91 keys applied\n" in text and "style.safetensors: 9 of 9 keys applied" in text
    assert "low.safetensors: 90 of 90 keys applied" in text
    plain, _ = made()
    assert with_loras != plain
    assert made("--lora", f"{high}:0", "--lora-low", f"{low}:0")[0] == plain


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "nowhere.safetensors:0.5"], ["nowhere.safetensors: no such file"]),
        (["--lora", "a.safetensors:nan"], ["a.safetensors:nan", "style.safetensors:0.8"]),
        (["--lora-low", "a.safetensors"], ["a.safetensors: a LoRA for the low-noise expert, but there is only"]),
    ],
)
def test_wrong_loras_are_refused_in_one_line(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]
) -> None:
    try:
        status: object = main(command(files, tmp_path / "v.mp4", *words))
    except SystemExit as stop:
        status = stop.code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    for part in said:
        assert part in line


def test_strengths_and_paths_with_colons(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", "m", "--text-encoder", "t", "--vae", "v", "--prompt", "p"]
    given = ["C:\\loras\\style.safetensors:0.8", "C:\\loras\\style.safetensors", "a.safetensors:-1"]
    options = make_parser().parse_args([*words, *(word for lora in given for word in ("--lora", lora))])
    assert [choice.strength for choice in options.lora] == [0.8, 1.0, -1.0]
    assert [str(choice.path) for choice in options.lora] == [given[1], given[1], "a.safetensors"]


def test_one_plan_holds_for_experts_with_different_loras(files: WanFiles, tmp_path: Path) -> None:
    low = save_lora(tmp_path / "low.safetensors", make_factors(1, 32))
    pipeline = WanPipeline(replace(files, loras_low=(LoraChoice(low),)))
    assert pipeline.low is not None
    assert pipeline.low.weights.largest_block_bytes > pipeline.high.weights.largest_block_bytes
    request = WanRequest("a red ball", width=48, height=32, num_frames=5, num_steps=2)
    assert sum(frames.shape[0] for frames in pipeline.generate(request)) == 5
    assert pipeline.plan is not None and pipeline.plan.model.name == "wan_low.safetensors"
