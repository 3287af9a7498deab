"""Writes example_workflows/*.json and subgraphs/*.json, blueprints that ComfyUI's page lists under the pack's name.

Run it as `python -m tests.comfyui.build_workflows` in the repository's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import model_files as files
from .build_framepack import FRAMEPACK, FRAMEPACK_WORKFLOWS, framepack_blueprint
from .folding import Promoted
from .graph import BYPASSED, GREEN_BOX, Group, ModelFile, Node, Output, Workflow
from .layout import Parts, place, place_alone, promoted_of
from .notes import DEMO_NOTE, DOCTOR_NOTE, NOTES, UPSCALE_NOTE, unwrapped

ROOT = Path(__file__).parents[2]
FOLDER, BLUEPRINT_FOLDER = ROOT / "example_workflows", ROOT / "subgraphs"

# Wan's own sample_neg_prompt (wan/configs/shared_config.py)
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Size:
    """Nodes that hold width, height and frames for all others."""

    width: Node
    height: Node
    length: Node

    @property
    def wires(self) -> dict[str, Output]:
        return {"width": self.width[0], "height": self.height[0], "length": self.length[0]}

    @property
    def nodes(self) -> list[Node]:
        return [self.width, self.height, self.length]


def add_size(graph: Workflow, width: int, height: int, length: int) -> Size:
    return Size(
        graph.add("PrimitiveInt", title="Width", value=width),
        graph.add("PrimitiveInt", title="Height", value=height),
        graph.add("PrimitiveInt", title="Frames", value=length),
    )


@dataclass(frozen=True)
class Loaders:
    """The files' nodes; `model` is what the sampler gets before its shift."""

    nodes: list[Node]
    clip: Output
    vae: Output


def add_encoder_and_vae(
    graph: Workflow, vae: ModelFile, device: str = "default", clip_loader: str = "CLIPLoader"
) -> Loaders:
    text = files.TEXT_ENCODER
    clip = graph.add(clip_loader, models=[text], clip_name=text.name, device=device)
    loaded = graph.add("VAELoader", models=[vae], vae_name=vae.name)
    return Loaders([clip, loaded], clip[0], loaded[0])


def add_model(graph: Workflow, file: ModelFile, title: str | None = None) -> list[Node]:
    """Loader and Block Swap; the last one has the MODEL."""
    loader = graph.add("LowVRAMLoadWanModel", title=title, models=[file], model_name=file.name)
    return [loader, graph.add("LowVRAMBlockSwap", model=loader[0])]


def add_prompts(graph: Workflow, clip: Output, prompt: str, negative: str = NEGATIVE) -> list[Node]:
    positive = graph.add("CLIPTextEncode", title="Prompt", clip=clip, text=prompt)
    return [positive, graph.add("CLIPTextEncode", title="Negative prompt", clip=clip, text=negative)]


def add_plan(graph: Workflow, model: Output, size: Size, guidance: bool) -> Node:
    return graph.add("LowVRAMPlan", model=model, guidance=guidance, **size.wires)


def add_output(graph: Workflow, samples: Output, vae: Output, **more: Any) -> Node:
    """The video is written as it is decoded."""
    return graph.add("LowVRAMSaveVideo", samples=samples, vae=vae, filename_prefix=f"video/{graph.name}", **more)


def add_output_in_parts(graph: Workflow, samples: Output, vae: Output, name: str, fps: float) -> list[Node]:
    """By ComfyUI's own nodes, which hold all frames."""
    decode = graph.add("LowVRAMDecodeVideo", samples=samples, vae=vae)
    video = graph.add("CreateVideo", images=decode[0], fps=fps)
    return [decode, video, graph.add("SaveVideo", video=video[0], filename_prefix=f"video/{name}")]


def add_flashvsr(graph: Workflow) -> Node:
    names = dict(zip(("projection", "decoder", "prompt"), files.FLASHVSR_PARTS, strict=True))
    models = [files.FLASHVSR, *files.FLASHVSR_PARTS]
    chosen = {name: file.name for name, file in names.items()}
    return graph.add("LowVRAMLoadFlashVSRModel", models=models, model_name=files.FLASHVSR.name, **chosen)


def add_larger_output(graph: Workflow, samples: Output, vae: Output, **more: Any) -> list[Node]:
    """Frames in RAM, and from there twice as large into the video."""
    decode, flashvsr = graph.add("LowVRAMDecodeVideo", samples=samples, vae=vae), add_flashvsr(graph)
    wires = {"flashvsr": flashvsr[0], "images": decode[0], "filename_prefix": f"video/{graph.name}"}
    return [decode, flashvsr, graph.add("LowVRAMUpscaleVideo", **wires, **more)]


@dataclass(frozen=True)
class Sampling:
    shift: float
    cfg: float
    steps: int
    fps: float = 16.0
    denoise: float = 1.0


def add_sampler(graph: Workflow, model: Output, prompts: Sequence[Output], latent: Output, how: Sampling) -> list[Node]:
    shifted = graph.add("ModelSamplingSD3", model=model, shift=how.shift)
    sampler = graph.add(
        "KSampler", model=shifted[0], positive=prompts[0], negative=prompts[1], latent_image=latent,
        steps=how.steps, cfg=how.cfg, denoise=how.denoise,
    )  # fmt: skip
    return [shifted, sampler]


WAN = "Wan video (Low VRAM)"


@dataclass(frozen=True)
class Folded:
    """The nodes that are one on the page, in the order of their groups; `pictures` may be empty."""

    loading: list[Node]
    prompting: list[Node]
    sizing: list[Node]
    pictures: list[Node]
    sampling: list[Node]

    @property
    def columns(self) -> list[list[Group]]:
        return [
            [Group("Model files", self.loading)],
            [Group("Prompt", self.prompting, GREEN_BOX), Group("Size and length", self.sizing, GREEN_BOX)],
            [Group("Picture", self.pictures, GREEN_BOX)],
            [Group("Sampling", self.sampling)],
        ]

    @property
    def promoted(self) -> list[Promoted]:
        """What is set outside: prompt, size, sampling, then what the special nodes have, memory and files."""
        prompts = [
            Promoted(node, "text", name) for node, name in zip(self.prompting, ("prompt", "negative"), strict=True)
        ]
        sizes = [
            Promoted(node, "value", str(node.title).lower()) for node in self.sizing if node.type == "PrimitiveInt"
        ]
        return [*prompts, *sizes, *promoted_of(self.sampling), *promoted_of(self.loading)]


@dataclass(frozen=True)
class Scene:
    """A workflow up to its prompts and size."""

    graph: Workflow
    model: list[Node]
    loaders: Loaders
    prompting: list[Node]
    sizes: Size


def start(
    name: str, file: ModelFile, vae: ModelFile, prompt: str, size: tuple[int, int, int], device: str = "default"
) -> Scene:
    """A workflow with one model."""
    graph = Workflow(name)
    model = add_model(graph, file)
    loaders = add_encoder_and_vae(graph, vae, device)
    return Scene(graph, model, loaders, add_prompts(graph, loaders.clip, prompt), add_size(graph, *size))


def finish(
    scene: Scene,
    latent: Node,
    how: Sampling,
    pictures: Sequence[Node] = (),
    source: dict[str, Output] | None = None,
    enlarges: bool = False,
) -> dict[str, Any]:
    """From the latent's node on: plan, sampler, video with what it has of a `source`, report.

    `enlarges`: the video is made twice as large before it is written.
    """
    graph, names = scene.graph, [name for name, _ in latent.kind.outputs]
    prompts = [latent["positive"], latent["negative"]] if "positive" in names else [n[0] for n in scene.prompting]
    plan = add_plan(graph, scene.model[-1][0], scene.sizes, how.cfg != 1)
    sampling = add_sampler(graph, scene.model[-1][0], prompts, latent[_latent_of(names)], how)
    samples = sampling[-1][0]
    if "trim_latent" in names:
        sampling.append(graph.add("TrimVideoLatent", samples=samples, trim_amount=latent["trim_latent"]))
    sizing = scene.sizes.nodes if pictures else [*scene.sizes.nodes, latent]
    shown = [*pictures, latent] if pictures else []
    folded = Folded([*scene.model, *scene.loaders.nodes], scene.prompting, sizing, shown, sampling)
    settings = {"fps": how.fps, **(source or {})}
    if enlarges:
        *enlarging, saving = add_larger_output(graph, sampling[-1][0], scene.loaders.vae, **settings)
        folded.sampling.extend(enlarging)
    else:
        saving = add_output(graph, sampling[-1][0], scene.loaders.vae, **settings)
    report = graph.add("LowVRAMMemoryReport", model=scene.model[-1][0], after=samples)
    note = NOTES[graph.name].text()
    return place(graph, Parts(WAN, note, folded.columns, folded.promoted, saving, plan, report))


def _latent_of(outputs: Sequence[str]) -> str:
    return next(name for name in ("latent", "samples", "LATENT") if name in outputs)


def add_vision(scene: Scene) -> Node:
    vision = scene.graph.add("CLIPVisionLoader", models=[files.CLIP_VISION], clip_name=files.CLIP_VISION.name)
    scene.loaders.nodes.append(vision)
    return vision


def conditioned(scene: Scene, type: str, **pictures: Output) -> Node:
    """A node of ComfyUI's that adds pictures to the prompts and makes the latent."""
    positive, negative = scene.prompting
    return scene.graph.add(
        type, positive=positive[0], negative=negative[0], vae=scene.loaders.vae, **pictures, **scene.sizes.wires
    )


def fox(name: str) -> Scene:
    """The small text-to-video model and its prompt, which several workflows have something added to."""
    prompt = "A red fox trots through fresh snow at the edge of a pine forest, morning light, the camera follows it"
    return start(name, files.T2V_SMALL, files.VAE_21, prompt, (832, 480, 81), "cpu")


def t2v_small() -> dict[str, Any]:
    scene = fox("wan2.1_t2v_1.3B")
    return finish(scene, scene.graph.add("EmptyHunyuanLatentVideo", **scene.sizes.wires), Sampling(8.0, 6.0, 30))


def resumable() -> dict[str, Any]:
    scene = fox("wan2.1_t2v_1.3B_resumable")
    scene.model.append(scene.graph.add("LowVRAMResumableSampling", model=scene.model[-1][0]))
    return finish(scene, scene.graph.add("EmptyHunyuanLatentVideo", **scene.sizes.wires), Sampling(8.0, 6.0, 30))


def negative_guidance() -> dict[str, Any]:
    scene = fox("wan2.1_t2v_1.3B_nag")
    guided = scene.graph.add("LowVRAMNag", model=scene.model[-1][0], negative=scene.prompting[1][0])
    scene.model.append(guided)
    return finish(scene, scene.graph.add("EmptyHunyuanLatentVideo", **scene.sizes.wires), Sampling(8.0, 1.0, 30))


def with_node(name: str, node: str) -> dict[str, Any]:
    """Text to video with one more node between loader and sampler."""
    scene = fox(name)
    scene.model.append(scene.graph.add(node, model=scene.model[-1][0]))
    return finish(scene, scene.graph.add("EmptyHunyuanLatentVideo", **scene.sizes.wires), Sampling(8.0, 6.0, 30))


def sparse() -> dict[str, Any]:
    return with_node("wan2.1_t2v_1.3B_sparse", "LowVRAMSparseAttention")


def step_cache() -> dict[str, Any]:
    return with_node("wan2.1_t2v_1.3B_step_cache", "LowVRAMStepCache")


def compiled() -> dict[str, Any]:
    return with_node("wan2.1_t2v_1.3B_compiled", "LowVRAMTorchCompile")


def several_gpus() -> dict[str, Any]:
    return with_node("wan2.1_t2v_1.3B_several_gpus", "LowVRAMSeveralGPUs")


def wan_blueprint() -> dict[str, Any]:
    """Text to video as one node, from which people build their own."""
    scene = fox(WAN)
    graph, latent = scene.graph, scene.graph.add("EmptyHunyuanLatentVideo", **scene.sizes.wires)
    sampling = add_sampler(
        graph, scene.model[-1][0], [n[0] for n in scene.prompting], latent[0], Sampling(8.0, 6.0, 30)
    )
    saving = graph.add("LowVRAMSaveVideo", samples=sampling[-1][0], vae=scene.loaders.vae, filename_prefix="video/wan")
    loading = [*scene.model, *scene.loaders.nodes]
    folded = Folded(loading, scene.prompting, [*scene.sizes.nodes, latent], [], [*sampling, saving])
    about = "Text to video by Wan on a card with little VRAM: its blocks are streamed within a budget."
    return place_alone(graph, WAN, folded.columns, folded.promoted, {"video": saving["video"]}, about)


def t2v_upscaled() -> dict[str, Any]:
    scene = fox("wan2.1_t2v_1.3B_upscale")
    latent = scene.graph.add("EmptyHunyuanLatentVideo", **scene.sizes.wires)
    return finish(scene, latent, Sampling(8.0, 6.0, 30), enlarges=True)


def upscale_video() -> dict[str, Any]:
    graph = Workflow("flashvsr_upscale_video")
    loader, video = add_flashvsr(graph), graph.add("LoadVideo", title="Video to enlarge")
    prefix = f"video/{graph.name}"
    larger = graph.add("LowVRAMUpscaleVideo", flashvsr=loader[0], video=video[0], filename_prefix=prefix)
    note = graph.add("MarkdownNote", title="Read me", text=unwrapped(UPSCALE_NOTE))
    return graph.place([[note], [video], [loader], [larger]])


def doctor() -> dict[str, Any]:
    graph = Workflow("doctor")
    check = graph.add("LowVRAMDoctor")
    note = graph.add("MarkdownNote", title="Read me", text=unwrapped(DOCTOR_NOTE))
    return graph.place([[note], [check]])


def i2v_480p() -> dict[str, Any]:
    prompt = "The figure turns its head and smiles, hair moves in a light breeze"
    scene = start("wan2.1_i2v_14B_480p_fp8", files.I2V_480P, files.VAE_21, prompt, (832, 480, 81))
    vision, image = add_vision(scene), scene.graph.add("LoadImage")
    seen = scene.graph.add("CLIPVisionEncode", clip_vision=vision[0], image=image["IMAGE"])
    latent = conditioned(scene, "WanImageToVideo", clip_vision_output=seen[0], start_image=image["IMAGE"])
    return finish(scene, latent, Sampling(3.0, 5.0, 20), [image, seen])


def flf2v() -> dict[str, Any]:
    prompt = "The scene changes smoothly from morning to evening, clouds pass by"
    scene = start("wan2.1_flf2v_14B_fp8", files.FLF2V, files.VAE_21, prompt, (832, 480, 81))
    vision = add_vision(scene)
    images = [scene.graph.add("LoadImage", title=title) for title in ("First frame", "Last frame")]
    seen = [scene.graph.add("CLIPVisionEncode", clip_vision=vision[0], image=image["IMAGE"]) for image in images]
    latent = conditioned(
        scene, "WanFirstLastFrameToVideo", clip_vision_start_image=seen[0][0], clip_vision_end_image=seen[1][0],
        start_image=images[0]["IMAGE"], end_image=images[1]["IMAGE"],
    )  # fmt: skip
    return finish(scene, latent, Sampling(16.0, 5.5, 20), [*images, *seen])


def ti2v() -> dict[str, Any]:
    prompt = "A wooden sailing boat glides over a calm lake at sunrise, mist over the water, slow aerial shot"
    scene = start("wan2.2_ti2v_5B", files.TI2V, files.VAE_22, prompt, (1280, 704, 121))
    image = scene.graph.add("LoadImage", title="First frame (Ctrl+B)", mode=BYPASSED)
    wires = {"vae": scene.loaders.vae, "start_image": image["IMAGE"], **scene.sizes.wires}
    return finish(scene, scene.graph.add("Wan22ImageToVideoLatent", **wires), Sampling(5.0, 5.0, 30, 24.0), [image])


def vace_small() -> dict[str, Any]:
    prompt = "The character of the picture walks along a beach at sunset, waves roll in"
    scene = start("wan2.1_vace_1.3B", files.VACE_SMALL, files.VAE_21, prompt, (832, 480, 81), "cpu")
    image = scene.graph.add("LoadImage", title="Reference")
    latent = conditioned(scene, "WanVaceToVideo", reference_image=image["IMAGE"])
    return finish(scene, latent, Sampling(8.0, 6.0, 30), [image])


def video_to_video() -> dict[str, Any]:
    prompt = "A watercolour painting of the scene, soft paper texture, gentle brush strokes"
    scene = start("wan2.1_v2v_1.3B", files.T2V_SMALL, files.VAE_21, prompt, (832, 480, 81), "cpu")
    graph, size = scene.graph, scene.sizes
    video = graph.add("LoadVideo", title="Video to change")
    parts = graph.add("GetVideoComponents", video=video[0])
    wires = {"width": size.width[0], "height": size.height[0]}
    scaled = graph.add("ImageScale", image=parts["images"], **wires)
    first = graph.add("ImageFromBatch", title="Its first frames", image=scaled[0], length=size.length[0])
    latent = graph.add("LowVRAMEncodeVideo", pixels=first[0], vae=scene.loaders.vae)
    how, source = Sampling(8.0, 6.0, 30, denoise=0.7), {"audio": parts["audio"], "fps": parts["fps"]}
    return finish(scene, latent, how, [video, parts, scaled, first], source)


def add_expert(graph: Workflow, name: str, file: ModelFile, lora: ModelFile) -> list[Node]:
    """Loader, Block Swap and the 4-step LoRA of one expert."""
    loader, swap = add_model(graph, file, f"Load the {name} expert")
    with_lora = graph.add("LowVRAMLoadLora", models=[lora], model=swap[0], lora_name=lora.name)
    return [loader, swap, with_lora]


def two_experts(
    name: str, experts: Sequence[tuple[ModelFile, ModelFile]], prompt: str, picture: bool
) -> dict[str, Any]:
    """Wan 2.2: two steps with the expert for high noise, two with the one for low noise."""
    graph = Workflow(name)
    high = add_expert(graph, "high-noise", *experts[0])
    low = add_expert(graph, "low-noise", *experts[1])
    # two experts take all the RAM that many have: this encoder stays on the disk
    loaders = add_encoder_and_vae(graph, files.VAE_21, clip_loader="LowVRAMLoadClipGGUF")
    prompting = add_prompts(graph, loaders.clip, prompt)
    scene = Scene(graph, high, loaders, prompting, add_size(graph, 832, 480, 81))
    pictures = []
    if picture:
        image = graph.add("LoadImage", title="First frame")
        latent = conditioned(scene, "WanImageToVideo", start_image=image["IMAGE"])
        prompts, noise, pictures = [latent["positive"], latent["negative"]], latent["latent"], [image, latent]
    else:
        latent = graph.add("EmptyHunyuanLatentVideo", **scene.sizes.wires)
        prompts, noise = [node[0] for node in prompting], latent[0]
    plan = add_plan(graph, high[-1][0], scene.sizes, guidance=False)
    sampling = add_expert_samplers(graph, [high[-1][0], low[-1][0]], prompts, noise)
    sizing = scene.sizes.nodes if picture else [*scene.sizes.nodes, latent]
    folded = Folded([*high, *low, *loaders.nodes], prompting, sizing, pictures, sampling)
    saving = add_output(graph, sampling[-1][0], loaders.vae, fps=16.0)
    report = graph.add("LowVRAMMemoryReport", model=low[-1][0], after=sampling[-1][0])
    return place(graph, Parts(WAN, NOTES[name].text(), folded.columns, folded.promoted, saving, plan, report))


def add_expert_samplers(
    graph: Workflow, models: Sequence[Output], prompts: Sequence[Output], noise: Output
) -> list[Node]:
    shifted = [graph.add("ModelSamplingSD3", model=model) for model in models]
    given = {"positive": prompts[0], "negative": prompts[1]}
    first = graph.add(
        "KSamplerAdvanced", title="High noise: steps 0 to 2", model=shifted[0][0], latent_image=noise, **given,
        end_at_step=2, return_with_leftover_noise="enable",
    )  # fmt: skip
    second = graph.add(
        "KSamplerAdvanced", title="Low noise: steps 2 to 4", model=shifted[1][0], latent_image=first[0], **given,
        keep_seed=True, add_noise="disable", start_at_step=2,
    )  # fmt: skip
    return [*shifted, first, second]


def t2v_experts() -> dict[str, Any]:
    experts = ((files.T2V_HIGH, files.T2V_LORA_HIGH), (files.T2V_LOW, files.T2V_LORA_LOW))
    prompt = "A steam locomotive crosses a stone viaduct in autumn, smoke drifts over the valley, wide aerial shot"
    return two_experts("wan2.2_t2v_A14B_4steps", experts, prompt, picture=False)


def i2v_experts() -> dict[str, Any]:
    experts = ((files.I2V_HIGH, files.I2V_LORA_HIGH), (files.I2V_LOW, files.I2V_LORA_LOW))
    prompt = "The figure looks around and starts to walk, the camera moves slowly closer"
    return two_experts("wan2.2_i2v_A14B_4steps", experts, prompt, picture=True)


def demo() -> dict[str, Any]:
    graph = Workflow("demo")
    loader = graph.add("LowVRAMLoadDemo")
    swap = graph.add("LowVRAMBlockSwap", model=loader["MODEL"])
    prompts = add_prompts(graph, loader["CLIP"], "a red ball moves left", "")
    sizes = add_size(graph, 96, 96, 17)
    latent = graph.add("EmptyHunyuanLatentVideo", **sizes.wires)
    plan = add_plan(graph, swap[0], sizes, guidance=True)
    sampling = add_sampler(graph, swap[0], [prompts[0][0], prompts[1][0]], latent[0], Sampling(3.0, 4.0, 20))
    decode, video, saving = add_output_in_parts(graph, sampling[-1][0], loader["VAE"], "demo", 8.0)
    report = graph.add("LowVRAMMemoryReport", model=swap[0], after=sampling[-1][0])
    folded = Folded([loader, swap], prompts, [*sizes.nodes, latent], [], [*sampling, decode, video])
    return place(graph, Parts(WAN, DEMO_NOTE, folded.columns, folded.promoted, saving, plan, report))


WORKFLOWS = {
    "demo": demo,
    "wan2.1_t2v_1.3B": t2v_small,
    "wan2.1_t2v_1.3B_resumable": resumable,
    "wan2.1_t2v_1.3B_nag": negative_guidance,
    "wan2.1_v2v_1.3B": video_to_video,
    "wan2.1_t2v_1.3B_sparse": sparse,
    "wan2.1_t2v_1.3B_step_cache": step_cache,
    "wan2.1_t2v_1.3B_compiled": compiled,
    "wan2.1_t2v_1.3B_several_gpus": several_gpus,
    "wan2.1_i2v_14B_480p_fp8": i2v_480p,
    "wan2.1_flf2v_14B_fp8": flf2v,
    "wan2.1_vace_1.3B": vace_small,
    "wan2.2_t2v_A14B_4steps": t2v_experts,
    "wan2.2_i2v_A14B_4steps": i2v_experts,
    "wan2.2_ti2v_5B": ti2v,
    "wan2.1_t2v_1.3B_upscale": t2v_upscaled,
    "flashvsr_upscale_video": upscale_video,
    "doctor": doctor,
    **FRAMEPACK_WORKFLOWS,
}


BLUEPRINTS = {WAN: wan_blueprint, FRAMEPACK: framepack_blueprint}


def main() -> None:
    for folder, builders in ((FOLDER, WORKFLOWS), (BLUEPRINT_FOLDER, BLUEPRINTS)):
        folder.mkdir(exist_ok=True)
        for name, build in builders.items():
            text = json.dumps(build(), indent=1, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
