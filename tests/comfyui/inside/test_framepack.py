"""FramePack's nodes inside ComfyUI: sampled, resumed, changed by LoRA and our options, refused with a sentence."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import imageio_ffmpeg
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from lowvram_pack.attention.backend import AttentionWorkspace
from lowvram_pack.attention.sdpa import Sdpa
from lowvram_pack.framepack.checkpoint import ROPE_AXES_KEY
from lowvram_pack.framepack.network.config import FramePackConfig
from lowvram_pack.framepack.network.model import FramePackModel
from lowvram_pack.framepack.request import Sampling
from lowvram_pack.framepack.streamed import StreamedFramePack
from lowvram_pack.memory.stream.streams import Span
from lowvram_pack.nodes.block_swap import BlockSwap
from lowvram_pack.nodes.bridge import host, status
from lowvram_pack.nodes.bridge.framepack_request import SamplerInputs
from lowvram_pack.nodes.compile import TorchCompileSettings
from lowvram_pack.nodes.framepack import FramePackSampler
from lowvram_pack.nodes.framepack_inputs import FramePackEndImage, NearestBucket, TimedPrompts
from lowvram_pack.nodes.loaders import LoadFramePackModel
from lowvram_pack.nodes.plan import VramPlan
from lowvram_pack.nodes.report import MemoryReport
from lowvram_pack.nodes.sparse import SparseAttention
from lowvram_pack.runtime import attending
from lowvram_pack.runtime.status_texts import PREPARING, sections_done
from safetensors.torch import save_file
from tiny_models import empty_latent, prompts, sample
from torch import Tensor

CONFIG = FramePackConfig(
    num_heads=2, head_dim=16, num_layers=2, num_single_layers=2, text_dim=24, pooled_dim=12, image_dim=20,
    rope_axes=(4, 6, 6),
)  # fmt: skip
SIZE = (4, 6)
WIDGETS = {
    "total_second_length": 1.2, "latent_window_size": 3, "steps": 3, "cfg": 1.0, "guidance_scale": 10.0, "shift": 0.0,
    "seed": 3, "use_teacache": False, "teacache_rel_l1_thresh": 0.15, "gpu_memory_preservation": 0.0,
    "sampler": "unipc_bh1", "denoise_strength": 1.0, "cfg_rescale": 0.0, "width": 64, "height": 64,
    "one_frame_index": 0, "resume": False, "filename_prefix": "video/FramePackTest",
}  # fmt: skip


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(folder: Path, name: str = "FramePack_tiny.safetensors") -> str:
    if (folder / name).exists():  # a model that is open may read it still
        return name
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, like in FramePackModel(CONFIG, device="meta").state_dict().items():
        scale = 0.7 / like[0].numel() ** 0.5 if like.ndim > 1 else 0.05
        tensors[key] = torch.randn(like.shape, generator=generator) * scale + ("norm" in key and like.ndim == 1)
    save_file(tensors, folder / name, {ROPE_AXES_KEY: ",".join(map(str, CONFIG.rope_axes))})
    return name


@pytest.fixture(scope="module")
def model(models: Path) -> Any:
    return LoadFramePackModel.execute(save(models), "auto", "fp32", "sdpa", "none").result[0]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    yield
    mm.unload_all_models()


def said(seed: int, length: int = 7) -> list[Any]:
    text = randn(1, length, CONFIG.text_dim, seed=seed)
    return [[text, {"pooled_output": randn(1, CONFIG.pooled_dim, seed=seed + 1)}]]


def seen(seed: int) -> Any:
    return SimpleNamespace(last_hidden_state=randn(1, 5, CONFIG.image_dim, seed=seed))


def given() -> dict[str, Any]:
    return {
        "positive": said(10),
        "start_latent": {"samples": randn(1, 16, 1, *SIZE, seed=1)},
        "image_embeds": seen(2),
    }


def run(model: Any, **changes: Any) -> Tensor:
    return FramePackSampler.execute(model, **(WIDGETS | given() | changes)).result[0]["samples"]


def test_a_video_of_three_sections(model: Any) -> None:
    samples = run(model)
    assert samples.shape == (1, 16, 10, *SIZE) and samples.isfinite().all()
    # the start image is the first latent, in ComfyUI's scale
    assert torch.allclose(samples[:, :, :1], given()["start_latent"]["samples"], atol=1e-6)
    assert torch.equal(samples, run(model))
    assert not torch.equal(samples, run(model, seed=4))


def test_a_new_node_asks_for_what_the_command_line_does() -> None:
    asked = {each.id: getattr(each, "default", None) for each in FramePackSampler.GET_SCHEMA().inputs}
    sampling = Sampling()
    assert asked["steps"] == sampling.num_steps
    assert asked["total_second_length"] == sampling.seconds
    assert asked["latent_window_size"] == sampling.window
    assert asked["guidance_scale"] == sampling.guidance
    assert asked["teacache_rel_l1_thresh"] == sampling.cache_threshold


def test_the_f1_model_is_told_by_its_name(models: Path) -> None:
    f1 = LoadFramePackModel.execute(save(models, "FramePack_F1_tiny.safetensors"), "auto", "fp32", "sdpa", "none")
    assert f1.result[0].engine.streamed.mode == "f1"
    forced = LoadFramePackModel.execute("FramePack_F1_tiny.safetensors", "base", "fp32", "sdpa", "none").result[0]
    assert forced.engine.streamed.mode == "base"
    video = run(f1.result[0])
    assert video.shape[2] == 10
    longer = run(f1.result[0], extend_samples={"samples": video}, start_latent=None)
    assert longer.shape[2] == 19 and torch.allclose(longer[:, :, :10], video, atol=1e-5)


def test_memory_comes_back_and_the_report_says_what_was_used(model: Any) -> None:
    run(model)
    assert "denoise" in MemoryReport.execute(model).result[0]
    plan = VramPlan.execute(model, 640, 608, 33, True, 8.0).result[1]
    assert "sections of 33 frames" in plan and "length does not matter" in plan
    assert VramPlan.execute(model, 640, 608, 9999, True, 8.0).result[1] == plan
    mm.unload_all_models()
    assert model.loaded_size() == 0 and not model.engine.streamed.started


def test_block_swap_and_compile_apply(model: Any) -> None:
    want = run(model)
    little = {"blocks_to_swap": -1, "vram_budget_gb": 0.0, "prefetch": 0, "ram_budget_gb": 1.502, "pinned_memory": True}
    streamed = BlockSwap.execute(model, **little).result[0]
    assert torch.equal(run(streamed), want)
    compiled = TorchCompileSettings.execute(
        model, backend="inductor", fullgraph=False, mode="default", dynamic="auto",
        compile_transformer_blocks_only=True, dynamo_cache_size_limit=64, dynamo_recompile_limit=128,
        force_parameter_static_shapes=False,
    ).result[0]  # fmt: skip
    assert compiled.options.compile is not None


@pytest.mark.parametrize("style", ["diffusers", "musubi"])
def test_a_native_lora_applies(model: Any, tmp_path: Path, style: str) -> None:
    layer = "transformer_blocks.0.attn.to_q"
    name = f"transformer.{layer}.lora_{{}}.weight" if style == "diffusers" else "lora_unet_{}.lora_{{}}.weight".format(
        layer.replace(".", "_")
    )  # fmt: skip
    down, up = ("A", "B") if style == "diffusers" else ("down", "up")
    tensors = {name.format(down): randn(4, 32, seed=1), name.format(up): randn(32, 4, seed=2)}
    changed, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    nothing, _ = comfy.sd.load_lora_for_models(model, None, tensors, 0.0, 0.0)
    want = run(model)
    assert not torch.equal(run(changed), want)
    assert torch.equal(run(nothing), want)
    assert torch.equal(run(model), want), "the model without it is as it was"


def test_an_interrupted_run_goes_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run(model)
    calls = []

    def third_section(self: Any, denoised: Tensor) -> None:
        calls.append(denoised.shape)
        if len(calls) == 7:
            raise mm.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(host.SamplingPreview, "step", third_section)
        with pytest.raises(mm.InterruptProcessingException):
            run(model, resume=True)
    assert not [loaded for loaded in mm.current_loaded_models if not loaded.is_dead()], "a pause gives all VRAM back"
    assert len(list(Path(folder_paths.output_directory).rglob("section_*.safetensors"))) == 2
    steps = []
    monkeypatch.setattr(host.SamplingPreview, "step", lambda self, denoised: steps.append(1))
    assert torch.equal(run(model, resume=True), want)
    assert len(steps) == 3, "only the missing section was made"
    assert torch.equal(run(model, resume=True), want) and len(steps) == 3
    assert not torch.equal(run(model, resume=True, seed=99), want) and len(steps) == 12


def test_a_finished_run_is_not_made_again_with_a_lora_either(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": randn(4, 32, seed=1), f"{layer}.lora_B.weight": randn(32, 4, seed=2)}
    changed, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    steps = []
    monkeypatch.setattr(host.SamplingPreview, "step", lambda self, denoised: steps.append(1))
    want = run(changed, resume=True)
    assert len(steps) == 9
    assert torch.equal(run(changed, resume=True), want) and len(steps) == 9
    assert not torch.equal(run(model, resume=True), want) and len(steps) == 18


@pytest.mark.newest
def test_a_run_is_known_by_how_its_own_model_computes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by how the engine did for the MODEL before: what sparse attention made is no exact run's."""

    class Half:
        name, workspace = "stand-in", AttentionWorkspace()

        def attend(self, q: Any, k: Any, v: Any, blocks: Any) -> Tensor:
            return Sdpa(torch.device("cpu")).attend(q, k, v) / 2

    monkeypatch.setattr(attending, "select_sparse", lambda spec: Half())
    want = run(model)
    sparse = SparseAttention.execute(model, "tau", 1.0, -1.0, 0.0, 0, 0).result[0]
    made = run(sparse, resume=True)
    assert not torch.equal(made, want)
    assert torch.equal(run(model), want)
    assert torch.equal(run(model, resume=True), want)
    steps: list[int] = []
    monkeypatch.setattr(host.SamplingPreview, "step", lambda self, denoised: steps.append(1))
    assert torch.equal(run(sparse, resume=True), made) and not steps


def test_an_interrupt_between_blocks_returns_the_device(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read stays in RAM: a cancelled run is often started again."""
    count: list[int] = []
    run(model)
    held = model.engine.streamed.host_bytes

    def interrupt() -> None:
        count.append(1)
        if len(count) == 20:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(model.engine.streamed, "between_blocks", interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        run(model)
    assert not model.engine.streamed.started and model.loaded_size() == model.engine.streamed.pinned_bytes == 0
    assert model.engine.streamed.host_bytes == held > 0
    monkeypatch.undo()


class Clip:
    """Stands for DualCLIPLoader: a random text per prompt."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return said(sum(map(ord, tokens)) % 1000, 5 + len(tokens) % 4)


def test_timed_prompts_reach_the_sampler(model: Any) -> None:
    def timed(text: str, fade: float = 0.0) -> list[Any]:
        return TimedPrompts.execute(Clip(), text, fade).result[0]

    plain = run(model, positive=timed("she stands"))
    assert torch.equal(plain, run(model, positive=Clip().encode_from_tokens_scheduled("she stands")))
    later = run(model, positive=timed("she stands [0.9s: she waves]"))
    assert not torch.equal(plain, later)
    assert not torch.equal(later, run(model, positive=timed("she stands [0.9s: she waves]", 1.0)))
    with pytest.raises(ValueError, match="time"):
        timed("she [waves]")


def test_an_end_image_changes_the_video(model: Any) -> None:
    end = FramePackEndImage.execute("linear", 1.0, {"samples": randn(1, 16, 1, *SIZE, seed=8)}, seen(9)).result[0]
    assert not torch.equal(run(model), run(model, end_image=end))
    with pytest.raises(ValueError, match="no picture"):
        FramePackEndImage.execute("linear", 1.0)


def test_the_nearest_bucket_is_framepacks() -> None:
    assert NearestBucket.execute(torch.zeros(1, 480, 832, 3), 640).result == (832, 480)


def test_text_alone_and_one_picture(model: Any) -> None:
    assert run(model, start_latent=None, image_embeds=None).shape == (1, 16, 9, 8, 8)
    picture = run(model, one_frame_index=4)
    assert picture.shape == (1, 16, 1, *SIZE) and picture.std() > 0.1
    done = FramePackSampler.execute(model, **(WIDGETS | given() | {"one_frame_index": 4, "vae": "a VAE"}))
    assert "saves a video only with a VAE" in done.result[1].message


def test_a_video_to_change_has_its_own_size_and_start(model: Any) -> None:
    video = {"samples": randn(1, 16, 10, *SIZE, seed=12)}
    made = run(model, start_latent=None, initial_samples=video, denoise_strength=0.5)
    assert made.shape == video["samples"].shape
    kept = run(model, start_latent=None, initial_samples=video, denoise_strength=0.0)
    assert torch.allclose(kept, video["samples"], atol=1e-6)


def test_the_images_features_count_as_much_as_is_said(model: Any) -> None:
    want = run(model)
    assert torch.equal(run(model, image_embed_strength=1.0), want)
    assert not torch.equal(run(model, image_embed_strength=0.5), want)


@pytest.mark.parametrize(("swap", "kept", "budget"), [(2.0, 1.0, 2.0), (0.0, 1.0, 9.0), (16.0, 1.0, 9.0)])
def test_the_tighter_budget_holds(
    model: Any, monkeypatch: pytest.MonkeyPatch, swap: float, kept: float, budget: float
) -> None:
    monkeypatch.setattr(host, "vram_without", lambda gb, _: 10.0 - gb)
    swapped = model.with_options(vram_budget_gb=swap)
    request = SamplerInputs(swapped, **(WIDGETS | given() | {"gpu_memory_preservation": kept}))
    assert request.patcher.options.vram_budget_gb == budget


def test_wrong_inputs_are_refused_with_a_sentence(model: Any, models: Path) -> None:
    for changes, words in (
        ({"cfg": 3.0}, "negative"),
        ({"start_latent": {"samples": torch.zeros(1, 4, 8, 8)}}, "hunyuan_video_vae"),
        ({"positive": [[torch.zeros(1, 7, 24), {}]]}, "DualCLIPLoader"),
        ({"denoise_strength": 0.5}, "initial_samples"),
        ({"extend_samples": {"samples": torch.zeros(1, 16, 3, *SIZE)}}, "F1"),
        ({"positive": []}, "positive conditioning is empty"),
        ({"positive": said(10) + said(11)}, "positive conditioning has 2 entries"),
        ({"negative": said(10) + said(11), "cfg": 2.0}, "negative conditioning has 2 entries"),
        ({"positive": TimedPrompts.execute(Clip(), "a [1s: b]", 0.0).result[0] + said(10)}, "cannot be combined"),
        ({"positive": [[torch.zeros(1, 7, 8), {"pooled_output": torch.zeros(1, 12)}]]}, "text of width 8"),
        ({"image_embeds": SimpleNamespace(last_hidden_state=None)}, "no hidden states"),
        ({"start_latent": {"samples": torch.zeros(1, 16, 1, 5, 6)}}, "multiples of 16"),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, **changes)
    with pytest.raises(ValueError, match="FramePack Sampler"):
        sample(model, *prompts(), empty_latent())
    (models / "not.safetensors").write_bytes(b"")
    with pytest.raises(ValueError):
        LoadFramePackModel.execute("not.safetensors", "auto", "fp32", "sdpa", "none")


@pytest.fixture
def tiny_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny one in place of ComfyUI's full-size VAE."""
    from contextlib import contextmanager

    from lowvram_pack.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE
    from lowvram_pack.nodes.bridge import framepack_run

    vae = HunyuanVAE(replace(HUNYUAN_VAE, block_out_channels=(8, 8, 8, 8), num_groups=4, layers_per_block=1))
    for parameter in vae.parameters():
        parameter.copy_(randn(*parameter.shape, seed=0) * 0.1)

    @contextmanager
    def decoder(*_: Any) -> Any:
        yield vae, None

    monkeypatch.setattr(framepack_run, "native_decoder", decoder)
    monkeypatch.setattr(framepack_run, "vae_fingerprint", lambda given: given)


def film_of(done: Any) -> tuple[int, Path]:
    """How many frames the shown video has, and where it is."""
    (shown,) = done.ui.as_dict()["images"]
    path = Path(folder_paths.output_directory) / shown["subfolder"] / shown["filename"]
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0], path


@pytest.mark.parametrize("num_given", [2, 3, 7])
def test_an_extended_video_is_saved_whole(models: Path, tiny_decoder: None, num_given: int) -> None:
    f1 = LoadFramePackModel.execute(save(models, "FramePack_F1_tiny.safetensors"), "auto", "fp32", "sdpa", "none")
    given = {"samples": randn(1, 16, num_given, *SIZE, seed=6)}
    inputs = {"positive": said(10), "image_embeds": seen(2), "extend_samples": given, "vae": "a VAE", "resume": True}
    done = FramePackSampler.execute(f1.result[0], **(WIDGETS | inputs))
    frames, path = film_of(done)
    assert done.result[0]["samples"].shape[2] == num_given + 9
    assert frames == 4 * (num_given + 9) - 3
    assert film_of(FramePackSampler.execute(f1.result[0], **(WIDGETS | inputs))) == (frames, path)


def test_the_film_grows_and_is_shown(model: Any, tiny_decoder: None) -> None:
    done = FramePackSampler.execute(model, **(WIDGETS | given() | {"vae": "a VAE", "resume": True}))
    frames, path = film_of(done)
    assert frames == 4 * 9 + 1
    assert done.result[1].get_duration() == pytest.approx(37 / 30, abs=0.05)
    again = FramePackSampler.execute(model, **(WIDGETS | given() | {"vae": "a VAE", "resume": True}))
    assert film_of(again) == (frames, path), "the finished film is shown, not made again"
    assert comfy.utils is not None


def test_the_report_knows_what_was_streamed_before_decoding(
    model: Any, tiny_decoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model leaves its device for every decoding, and with it the ring that blocks were streamed through."""
    stop, stops = StreamedFramePack.stop, []

    def stopping(streamed: StreamedFramePack) -> None:
        if streamed.started and streamed._on_spans is not None:
            stops.append(now := time.perf_counter())
            begin, end = now - 2e-3, now - 1e-3
            streamed._on_spans([Span("copy", 0, begin, end, 1000), Span("stall", 0, begin, end)])
        stop(streamed)

    monkeypatch.setattr(StreamedFramePack, "stop", stopping)
    run(model, vae="a VAE")
    report = model.engine.report
    assert report.stream is not None and report.stream.bytes_streamed == 1000 * len(stops) and len(stops) == 3
    assert [phase.name for phase in report.phases] == ["prepare", "denoise", "decode"]
    last = report.samples[-1].seconds
    assert all(report.phases[1].start <= begin < end <= last for begin, end in report.passes)
    assert "streamed 3.0 kB in 3 passes" in MemoryReport.execute(model).result[0]


def test_a_film_never_replaces_anothers(model: Any, tiny_decoder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI gives a file's name again where there is no file: after an interrupt, or once it was deleted."""

    def video(**changes: Any) -> tuple[int, Path]:
        inputs = WIDGETS | given() | {"vae": "a VAE", "resume": True} | changes
        return film_of(FramePackSampler.execute(model, **inputs))

    def interrupt(*_: Any) -> None:
        raise mm.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(host.SamplingPreview, "step", interrupt)
        with pytest.raises(mm.InterruptProcessingException):
            video()
    _, other = video(seed=4)
    frames, path = video()
    assert path != other and other.is_file()
    path.unlink()
    _, third = video(seed=5)
    before = third.read_bytes()
    again, newest = video()
    assert again == frames and newest not in (other, third) and third.read_bytes() == before
    assert video() == (again, newest)
    assert video(filename_prefix="video/Elsewhere")[1].name.startswith("Elsewhere")
    assert not list(Path(folder_paths.output_directory).rglob("open_*.safetensors")), "nothing waits for more sections"


def test_another_vae_decodes_the_film_anew(model: Any, tiny_decoder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_pack.framepack.run import run as section_run

    calls = []
    decode = section_run.decode_section
    monkeypatch.setattr(section_run, "decode_section", lambda *given: calls.append(1) or decode(*given))
    inputs = WIDGETS | given() | {"resume": True}
    FramePackSampler.execute(model, **inputs, vae="one VAE")
    FramePackSampler.execute(model, **inputs, vae="one VAE")
    assert len(calls) == 3
    FramePackSampler.execute(model, **inputs, vae="another VAE")
    assert len(calls) == 6


def test_a_video_that_is_decoded_anew_keeps_the_one_that_is_there(model: Any, tiny_decoder: None) -> None:
    inputs = WIDGETS | given() | {"resume": True}
    _, first = film_of(FramePackSampler.execute(model, **inputs, vae="one VAE"))
    before = first.read_bytes()
    _, second = film_of(FramePackSampler.execute(model, **inputs, vae="another VAE"))
    assert second != first and first.read_bytes() == before
    (part, *_) = Path(folder_paths.output_directory).rglob("final_*")
    part.unlink()
    frames, third = film_of(FramePackSampler.execute(model, **inputs, vae="another VAE"))
    assert third not in (first, second) and second.is_file() and frames == 4 * 9 + 1
    assert film_of(FramePackSampler.execute(model, **inputs, vae="another VAE")) == (frames, third)


def test_decoding_has_the_room_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_pack.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE, decode_footprint
    from lowvram_pack.nodes.bridge.native_vae import native_decoder

    config = replace(HUNYUAN_VAE, block_out_channels=(8, 8, 8, 8), num_groups=8, layers_per_block=1)
    network, asked = HunyuanVAE(config), []
    latents, vae = randn(1, 16, 3, 8, 6, seed=0), SimpleNamespace(first_stage_model=network, vae_dtype=torch.float32)
    monkeypatch.setattr(host, "make_room", lambda size, device: asked.append(size))
    with native_decoder(vae, latents) as (decoder, room):
        assert room is None, "on the CPU"
        assert {name.partition(".")[0] for name, weight in decoder.named_parameters() if weight.is_meta} == {
            "encoder",
            "quant_conv",
        }
        assert torch.equal(decoder.decode(latents), network.decode(latents))
    parts = (network.decoder, network.post_quant_conv)
    weights = sum(weight.nbytes for part in parts for weight in part.parameters())
    assert asked[0] > weights + decode_footprint(config, 3, 64, 48, 4).total_bytes


def test_a_model_of_the_same_name_has_a_run_of_its_own(models: Path) -> None:
    (models / "other").mkdir(exist_ok=True)
    name = save(models / "other")
    tensors = comfy.utils.load_torch_file(str(models / "other" / name))
    tensors = {key: tensor * 1.1 for key, tensor in tensors.items()}
    save_file(tensors, models / "other" / name, {ROPE_AXES_KEY: ",".join(map(str, CONFIG.rope_axes))})
    one = LoadFramePackModel.execute(save(models), "auto", "fp32", "sdpa", "none").result[0]
    other = LoadFramePackModel.execute(f"other/{name}", "auto", "fp32", "sdpa", "none").result[0]
    assert not torch.equal(run(one, resume=True), run(other, resume=True))


def test_the_model_is_off_the_card_while_a_section_is_decoded(
    model: Any, tiny_decoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram_pack.framepack.run import run as section_run

    decode, seen = section_run.decode_section, []

    def watched(*given: Any) -> Tensor:
        seen.append((model.engine.streamed.started, model.engine.streamed.host_bytes > 0))
        mm.unload_all_models()  # as ComfyUI may, to make room
        return decode(*given)

    texts: list[str] = []
    monkeypatch.setattr(status, "TELLS_AFTER", 0.0)
    server = SimpleNamespace(client_id="page", send_progress_text=lambda text, node, client: texts.append(text))
    server.sockets_metadata = {}
    server.send_sync = lambda *_: None
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    monkeypatch.setattr(section_run, "decode_section", watched)
    model.engine.release()
    with CurrentNodeContext("prompt", "7"):
        FramePackSampler.execute(model, **(WIDGETS | given() | {"vae": "a VAE"}))
    steps = [[f"section {section} of 3, step {step} of 3" for step in (1, 2, 3)] for section in (1, 2, 3)]
    made = [*steps[0], "section 1 of 3, decoding", *steps[1], "section 2 of 3, decoding", *steps[2]]
    loading = [text for text in texts if text.startswith("loading 1.3 MiB of weights, ")]
    assert texts[0] == PREPARING and texts[1] in loading and texts[-1] == sections_done(3)
    assert [text for text in texts[1:-1] if text not in loading] == [*made, "section 3 of 3, decoding"]
    assert [started for started, _ in seen] == [False] * 3
    known = [getattr(loaded.model, "engine", None) for loaded in mm.current_loaded_models]
    assert model.engine in known, "ComfyUI can still evict it"


def test_a_leaner_plan_holds_for_the_run_and_no_longer(
    model: Any, tiny_decoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, plans = model.engine.streamed, []
    start = streamed.start_fitting

    def short_at_first(plan: Any, *more: Any) -> None:
        plans.append(plan)
        start(plan, *more)
        if len(plans) == 1:  # the device ran out of memory
            streamed.plan = replace(plan, limits=replace(plan.limits, vram_budget_bytes=1))

    monkeypatch.setattr(streamed, "start_fitting", short_at_first)
    FramePackSampler.execute(model, **(WIDGETS | given() | {"vae": "a VAE"}))
    assert [plan.limits.vram_budget_bytes == 1 for plan in plans] == [False, True, True]
    FramePackSampler.execute(model, **(WIDGETS | given() | {"vae": "a VAE"}))
    assert [plan.limits.vram_budget_bytes == 1 for plan in plans[3:]] == [False, False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e30])
@pytest.mark.parametrize(
    "name",
    [
        "total_second_length", "cfg", "guidance_scale", "shift", "teacache_rel_l1_thresh", "gpu_memory_preservation",
        "denoise_strength", "cfg_rescale", "image_embed_strength",
    ],
)  # fmt: skip
def test_numbers_that_make_no_video_are_refused(model: Any, name: str, value: float) -> None:
    """ComfyUI's own check of a range lets NaN by, and all that other nodes give."""
    with pytest.raises(ValueError, match=r"use a number|expected a number|but the device has"):
        run(model, **{name: value, "use_teacache": True})
