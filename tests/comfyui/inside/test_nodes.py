"""The nodes themselves: schemas, plan, report, compile settings, decode."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import lowvram_pack
import pytest
import torch
from lowvram_pack.memory.plan import limits as plan_limits
from lowvram_pack.nodes.bridge import host
from lowvram_pack.nodes.compile import TorchCompileSettings
from lowvram_pack.nodes.decode import DecodeVideo
from lowvram_pack.nodes.plan import VramPlan
from lowvram_pack.nodes.report import MemoryReport
from lowvram_pack.system.card_profile import (
    FORMAT,
    H2D_PINNED,
    WITHIN,
    AttentionRow,
    CardKey,
    CardProfile,
    LinkRow,
    ProductRow,
)
from lowvram_pack.vae.files import OpenVae
from lowvram_pack.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_pack.wanvideo.vae.model import WAN21_VAE, WAN22_VAE, WanVAE
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save

COMPILE = {
    "backend": "inductor", "fullgraph": False, "mode": "default", "dynamic": "auto",
    "compile_transformer_blocks_only": True, "dynamo_cache_size_limit": 64, "dynamo_recompile_limit": 128,
    "force_parameter_static_shapes": False,
}  # fmt: skip


def all_nodes() -> list[Any]:
    extension = asyncio.run(lowvram_pack.comfy_entrypoint())
    return asyncio.run(extension.get_node_list())


@pytest.mark.parametrize("node", all_nodes(), ids=lambda node: node.__name__)
def test_every_schema_builds_and_explains_itself(node: Any) -> None:
    schema = node.GET_SCHEMA()
    assert schema.node_id.startswith("LowVRAM")
    assert schema.category == "LowVRAM Video"
    assert schema.description
    assert all(given.tooltip for given in schema.inputs), "a tooltip on every widget"
    assert node.GET_NODE_INFO_V1()["name"] == schema.node_id


def test_the_engine_is_not_imported_by_importing_the_pack() -> None:
    assert "comfy_entrypoint" in vars(lowvram_pack)
    assert "NODE_CLASS_MAPPINGS" not in vars(lowvram_pack)


def test_a_missing_requirement_turns_off_only_what_needs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "lowvram_pack.nodes.decode", None)  # an import of it fails
    names = {node.__name__ for node in all_nodes()}
    assert "DecodeVideo" not in names
    assert {"LoadWanModel", "BlockSwap"} <= names
    assert "DecodeVideo are off" in caplog.text
    assert "pip install -r requirements.txt" in caplog.text


def test_the_plan_is_shown_before_anything_runs(models: Path) -> None:
    model = ours(save(models, "t2v"))
    out = VramPlan.execute(model, 832, 480, 81, True, 8.0)
    text = out.result[1]
    assert "832x480, 81 frames" in text
    assert "VRAM budget 7.50 GiB" in text
    assert out.ui.as_dict() == {"text": (text,)}
    assert model.engine.streamed.host_bytes == 0
    assert "plan for a card of 8 GB" in VramPlan.execute(model, 832, 480, 81, True, 0.0).result[1]
    assert "does not fit" in VramPlan.execute(model, 4096, 4096, 801, True, 1.5).result[1]


def test_the_plan_tells_times_of_a_measured_card_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save(models, "t2v"))
    text = VramPlan.execute(model, 832, 480, 81, True, 8.0).result[1]
    assert "No times are shown" in text and "`lowvram-video bench`" in text and "s (compute" not in text
    dim = model.engine.streamed.config.dim
    card = CardProfile(
        FORMAT, CardKey("Some GPU", "8.9", "2.11", "13.0"), "2026-11-28", 8 << 30, False, True,
        products=(ProductRow("plain", dim, dim, 8192, 1.0, 0.0, 50.0, 0.002),),
        attention=(AttentionRow("sdpa", 24, 8192, 8192, 1.0, 40.0, 0.002),),
        link=(LinkRow(WITHIN, 900.0), LinkRow(H2D_PINNED, 20.0)),
    )  # fmt: skip
    monkeypatch.setattr(plan_limits, "profile_of", lambda device: card)
    text = VramPlan.execute(model, 832, 480, 81, True, 8.0).result[1]
    assert "Times are of Some GPU, measured 2026-11-28" in text and "s (compute" in text


def test_the_report_tells_of_the_last_run(models: Path) -> None:
    model = ours(save(models, "t2v"))
    assert "not run yet" in MemoryReport.execute(model).result[0]
    latent = sample(model, *prompts(), empty_latent())
    out = MemoryReport.execute(model, latent)
    text, picture = out.result
    print(text)
    assert "denoise" in text
    assert picture.shape == (1, 960, 1200, 3)
    assert set(out.ui) >= {"text", "images"}
    (shown,) = out.ui["images"]
    with Image.open(Path(folder_paths.get_temp_directory(), shown["subfolder"], shown["filename"])) as small:
        assert small.width > 2 * small.height, "in the node a wide one, of larger letters"


# --- decoding --------------------------------------------------------------------------------------------


def tiny_vae(version: str, width: int = 8) -> Any:
    """Core's VAE with random weights; its 2.2 has one size only, so both have a narrow decoder where they can."""
    config = {"2.1": WAN21_VAE, "2.2": WAN22_VAE}[version]
    if version == "2.1":
        from dataclasses import replace

        config = replace(config, encoder_dim=width, decoder_dim=width)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in WanVAE(config, device="meta").state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and not name.endswith("gamma"):
            values *= 0.9 / tensor[0].numel() ** 0.5
        else:
            values = values * 0.05 + float(name.endswith("gamma"))
        weights[name] = values
    return comfy.sd.VAE(sd=weights)


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny_vae("2.1")


def random_latent(channels: int = 16, size: tuple[int, int, int] = (3, 8, 12)) -> dict[str, torch.Tensor]:
    return {"samples": torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(2))}


def test_decoding_equals_cores(vae: Any) -> None:
    latent = random_latent()
    images = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    reference = vae.decode(latent["samples"])[0]
    error = relative_error(images, reference)
    print(f"decode: relative error to core's {error:.2e}")
    assert images.shape == (9, 64, 96, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.02
    assert error < 2e-3
    for chunk in (4, 100):
        assert torch.equal(DecodeVideo.execute(latent, vae, 0, chunk, False).result[0], images)


LARGE = random_latent(size=(2, 20, 20))  # more than tiles of 128 pixels


@pytest.fixture(scope="module")
def whole(vae: Any) -> torch.Tensor:
    with torch.inference_mode():
        return DecodeVideo.execute(LARGE, vae, 0, 0, False).result[0]


@pytest.fixture(scope="module")
def tiled(vae: Any) -> torch.Tensor:
    with torch.inference_mode():
        return DecodeVideo.execute(LARGE, vae, 128, 0, False).result[0]


@pytest.mark.newest
def test_tiles_are_seamless_within_their_overlap(whole: torch.Tensor, tiled: torch.Tensor) -> None:
    assert tiled.shape == whole.shape
    error = relative_error(tiled, whole)
    print(f"tiles of 128: relative difference {error:.2e}")
    assert error < 0.1


@pytest.mark.newest
@pytest.mark.parametrize(
    ("asked", "said"), [(0, "CUDA out of memory."), (160, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_a_video_that_the_device_does_not_hold_is_decoded_in_strips(
    vae: Any,
    whole: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: int,
    said: str,
) -> None:
    def scarce(vae: WanVAE, latent: torch.Tensor) -> Any:
        raise torch.cuda.OutOfMemoryError(said) if said.startswith("CUDA") else RuntimeError(said)

    monkeypatch.setattr(WanVAE, "decode_pieces", scarce)
    got = DecodeVideo.execute(LARGE, vae, asked, 0, False).result[0]
    assert (got - whole).abs().max() <= 1e-5
    told = [line.rpartition("next ")[2] for line in caplog.messages if "while decoding" in line]
    assert len(told) == 1 and told[0].startswith("in strips of")


@pytest.mark.newest
@pytest.mark.parametrize("asked", [0, 160])
def test_tiles_are_decoded_where_no_strip_fits(
    vae: Any, tiled: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: int
) -> None:
    decode = WanVAE.decode_pieces

    def small_tiles_only(vae: WanVAE, latent: torch.Tensor, *rest: Any) -> Any:
        if latent.shape[-1] > 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return decode(vae, latent, *rest)

    def no_strips(*given: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(WanVAE, "decode_pieces", small_tiles_only)
    monkeypatch.setattr(WanVAE, "decode_strips", no_strips)
    assert torch.equal(DecodeVideo.execute(LARGE, vae, asked, 0, False).result[0], tiled)
    told = [line.rpartition("next ")[2] for line in caplog.messages if "while decoding" in line]
    assert told[-1] == "in tiles of 128 pixels" and all("strips" in way for way in told[:-1])


def test_a_decoder_that_finds_no_room_is_loaded_again_once_idle_models_left(
    vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = random_latent()
    want = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    build, asked, left = OpenVae.build, [], ["CUDA error: out of memory"]

    def scarce(opened: Any, *given: Any, **named: Any) -> Any:
        if left:
            raise RuntimeError(left.pop())
        return build(opened, *given, **named)

    monkeypatch.setattr(OpenVae, "build", scarce)
    monkeypatch.setattr(host, "make_room", lambda size, device: asked.append(size))
    assert torch.equal(DecodeVideo.execute(latent, vae, 0, 0, False).result[0], want)
    assert len(asked) == 2 and asked[1] >= host.EVERYTHING


def test_the_decoder_is_laid_out_as_on_the_command_line(
    vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One builder makes both, and asks one function for the layout: here as on a GPU."""
    build, strides = OpenVae.build, list[dict[str, Any]]()

    def recorded(opened: Any, *given: Any, **named: Any) -> Any:
        network = build(opened, *given, **named)
        strides.append({name: weight.stride() for name, weight in network.state_dict().items() if not weight.is_meta})
        return network

    monkeypatch.setattr(sys.modules[OpenVae.__module__], "runs_channels_last", lambda device, dtype: True)
    monkeypatch.setattr(OpenVae, "build", recorded)
    DecodeVideo.execute(random_latent(), vae, 0, 0, False)
    weights = {name: weight.contiguous() for name, weight in vae.first_stage_model.state_dict().items()}
    save_file(weights, tmp_path / "vae.safetensors")
    WAN_FORMAT.open_file(tmp_path / "vae.safetensors").build(vae.vae_dtype, torch.device("cpu"))
    node, command_line = strides
    assert node == {name: command_line[name] for name in node}
    assert node["decoder.conv1.weight"][1] == 1, "channels last"


@pytest.mark.newest
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for a mapping's pages")
def test_a_mapped_vae_is_no_ram_of_the_process_beside_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = pytest.importorskip("comfy_aimdo.control")
    if not control.init():
        pytest.skip("comfy-aimdo does not load here")
    vae, latent, file = tiny_vae("2.1", 24), random_latent(size=(1, 8, 8)), tmp_path / "mapped.safetensors"
    want = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    save_file({name: each.half().contiguous() for name, each in vae.first_stage_model.state_dict().items()}, file)
    # as on a card, where weights are pages of the file
    monkeypatch.setattr(mm, "DIRTY_MMAPS", set())
    vae.first_stage_model.load_state_dict(comfy.utils.load_safetensors(str(file))[0], assign=True)
    build, left = OpenVae.build, []

    def measured(opened: Any, *given: Any, **named: Any) -> Any:
        network = build(opened, *given, **named)
        left.append(mapped_bytes(file))
        return network

    monkeypatch.setattr(OpenVae, "build", measured)
    got = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    assert relative_error(got, want) < 1e-2, "weights in half precision"
    assert left[0] < file.stat().st_size / 10


def mapped_bytes(file: Path) -> int:
    """What of this process's RAM is pages of a file."""
    resident, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line.split()[0].endswith(":"):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def test_the_latent_is_saved_first(vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    latent = random_latent()
    DecodeVideo.execute(latent, vae, 0, 0, True)
    (saved,) = (tmp_path / "latents").glob("*.latent")
    tensors = load_file(saved)
    assert torch.equal(tensors["latent_tensor"], latent["samples"])
    assert "latent_format_version_0" in tensors


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError("Error while serializing")])
def test_a_latent_that_cannot_be_saved_is_decoded(
    vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(sys.modules[DecodeVideo.__module__], "write_file", full)
    latent = random_latent()
    images = DecodeVideo.execute(latent, vae, 0, 0, True).result[0]
    assert torch.equal(images, DecodeVideo.execute(latent, vae, 0, 0, False).result[0])
    assert str(error) in caplog.text


def test_a_latent_is_decoded_where_no_folder_can_be_made(
    vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latents").write_bytes(b"")  # a file where the folder would be
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    assert DecodeVideo.execute(random_latent(), vae, 0, 0, True).result[0].isfinite().all()
    assert "the latent is not kept" in caplog.text


def test_a_wrong_vae_is_named(vae: Any) -> None:
    with pytest.raises(ValueError, match=r"Wan 2\.2 VAE"):
        DecodeVideo.execute(random_latent(48), vae, 0, 0, False)

    class Other:
        first_stage_model = torch.nn.Conv2d(3, 3, 3)

    with pytest.raises(ValueError, match="needs a Wan or HunyuanVideo VAE"):
        DecodeVideo.execute(random_latent(), Other(), 0, 0, False)
    with pytest.raises(ValueError, match=r"there is no VAE: .* connect Load VAE"):  # as Load Checkpoint gives it
        DecodeVideo.execute(random_latent(), None, 0, 0, False)


# --- compiling -------------------------------------------------------------------------------------------


def counted(calls: list[str]) -> Any:
    def backend(graph: Any, _: Any) -> Any:
        calls.append("graph")
        return graph.forward

    return backend


@pytest.mark.newest
def test_blocks_are_compiled_once_for_all_blocks_steps_seeds_and_loras(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_native_nodes import lora, with_lora

    torch._dynamo.reset()
    graphs: list[str] = []
    counting_backend = counted(graphs)
    compile_module = torch.nn.Module.compile

    def counting(self: Any, *, backend: str, options: dict[str, Any], **others: Any) -> None:
        compile_module(self, backend=counting_backend, **{**others, "fullgraph": True})

    monkeypatch.setattr(torch.nn.Module, "compile", counting)
    model = ours(save(models, "t2v"))
    plain = sample(model, *prompts(), empty_latent())
    compiled = TorchCompileSettings.execute(model, **COMPILE).result[0]
    got = sample(compiled, *prompts(), empty_latent())
    once = len(graphs)
    assert relative_error(got, plain) < 1e-5
    sample(compiled, *prompts(), empty_latent(), seed=77, steps=5)
    seeds_and_steps = len(graphs)
    with_one = sample(with_lora(compiled), *prompts(), empty_latent())
    with_branches = len(graphs)
    weaker = comfy.sd.load_lora_for_models(compiled, None, lora(), 0.3, 0)[0]
    assert relative_error(sample(weaker, *prompts(), empty_latent()), with_one) > 1e-3
    streamed = compiled.with_options(ram_budget_gb=1.5 + 10 / 1024)  # three of four blocks fit: from the disk
    assert relative_error(sample(streamed, *prompts(), empty_latent()), plain) < 1e-5
    assert model.engine.streamed.plan.host.from_disk
    print(
        f"graphs for 4 blocks: {once}; after another seed and more steps {seeds_and_steps}, a LoRA {with_branches}, "
        f"another strength and streaming {len(graphs)}"
    )
    assert once == seeds_and_steps == 1
    assert with_branches == len(graphs) == 2
    assert relative_error(with_one, plain) > 1e-2
    assert torch.equal(sample(model, *prompts(), empty_latent()), plain), "compiling belongs to the clone"


def test_what_cannot_compile_says_so(models: Path) -> None:
    model = ours(save(models, "t2v"))
    with pytest.raises(ValueError, match="torch_tensorrt"):
        TorchCompileSettings.execute(model, **(COMPILE | {"backend": "tensorrt"}))
    with pytest.raises(ValueError, match="mode"):
        TorchCompileSettings.execute(model, **(COMPILE | {"backend": "cudagraphs", "mode": "max-autotune"}))
    with pytest.raises(ValueError, match="Load Wan Video Model"):
        TorchCompileSettings.execute(core(save(models, "t2v")), **COMPILE)
