"""The example workflows for FramePack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import model_files as files
from .folding import Promoted
from .graph import GREEN_BOX, RED_BOX, Group, ModelFile, Node, Output, Workflow
from .layout import Parts, place, place_alone, promoted_of
from .notes_framepack import FRAMEPACK_NOTES

FRAMEPACK = "FramePack (Low VRAM)"
SMALL_CARD_GB = 5.0  # of 6: the desktop and other programs have the rest


@dataclass
class Scene:
    """A workflow while it is built: its model, what reads prompts and pictures, and the nodes of each group."""

    graph: Workflow
    model: Output
    clip: Output
    vision: Output
    vae: Output
    loading: list[Node]
    prompting: list[Node] = field(default_factory=list)
    pictures: list[Node] = field(default_factory=list)

    def picture(self, type: str, **given: Any) -> Node:
        """Another node in the group of pictures."""
        node = self.graph.add(type, **given)
        self.pictures.append(node)
        return node

    def folded(self, sampler: Node, groups: Sequence[Group] = ()) -> tuple[list[list[Group]], list[Promoted]]:
        """The nodes that are one on the page, in columns, and what is set outside of them."""
        columns = [
            [Group("Model files", self.loading)],
            [Group("Prompt", self.prompting, GREEN_BOX)],
            *([group] for group in groups or [Group("Picture", self.pictures, GREEN_BOX)]),
            [Group("Video", [sampler], RED_BOX)],
        ]
        prompts = [Promoted(node, "text", "prompt") for node in self.prompting]
        return columns, [*prompts, *promoted_of([sampler, *self.pictures, *self.loading])]


@dataclass(frozen=True)
class Bucket:
    """A picture (or video) in a size that FramePack knows; `width` and `height` are for all others."""

    images: Output
    width: Output
    height: Output

    @property
    def size(self) -> dict[str, Output]:
        return {"width": self.width, "height": self.height}


def start(name: str, file: ModelFile, device: str = "default", budget_gb: float = 0.0) -> Scene:
    """A workflow with its files; the text encoder on `device`."""
    graph = Workflow(name)
    linked = [] if file is files.FRAMEPACK_GGUF else [file]
    loader = graph.add("LowVRAMLoadFramePackModel", models=linked, model_name=file.name)
    swap = graph.add("LowVRAMBlockSwap", model=loader[0], vram_budget_gb=budget_gb)
    clip = graph.add(
        "DualCLIPLoader", models=[files.CLIP_L, files.LLAVA], clip_name1=files.CLIP_L.name,
        clip_name2=files.LLAVA.name, device=device,
    )  # fmt: skip
    vision = graph.add("CLIPVisionLoader", models=[files.SIGCLIP], clip_name=files.SIGCLIP.name)
    vae = graph.add("VAELoader", models=[files.HUNYUAN_VAE], vae_name=files.HUNYUAN_VAE.name)
    return Scene(graph, swap[0], clip[0], vision[0], vae[0], [loader, swap, clip, vision, vae])


def add_prompt(scene: Scene, text: str) -> Output:
    prompt = scene.graph.add("CLIPTextEncode", title="Prompt", clip=scene.clip, text=text)
    scene.prompting.append(prompt)
    return prompt[0]


def add_bucket(scene: Scene, images: Output) -> Bucket:
    """The size of the video, and the picture in it."""
    bucket = scene.picture("LowVRAMFramePackNearestBucket", image=images)
    size = {"width": bucket["width"], "height": bucket["height"]}
    return Bucket(scene.picture("ImageScale", image=images, **size)[0], **size)


def add_encoders(scene: Scene, images: Output, title: str = "") -> tuple[Output, Output]:
    """A picture of the video's size as a latent and as SigLIP's features."""
    latent = scene.picture("VAEEncode", title=f"VAE Encode{title}", pixels=images, vae=scene.vae)
    seen = scene.picture("CLIPVisionEncode", title=f"CLIP Vision Encode{title}", clip_vision=scene.vision, image=images)
    return latent[0], seen[0]


def add_start_image(scene: Scene) -> tuple[Bucket, dict[str, Output]]:
    """What the sampler gets of a start image."""
    bucket = add_bucket(scene, scene.picture("LoadImage", title="Start image")["IMAGE"])
    latent, seen = add_encoders(scene, bucket.images)
    return bucket, {"start_latent": latent, "image_embeds": seen}


def add_sampler(scene: Scene, prompt: Output, prefix: str, **given: Any) -> Node:
    """Its seed stays, so that the same request goes on where it stopped."""
    return scene.graph.add(
        "LowVRAMFramePackSampler", model=scene.model, positive=prompt, vae=scene.vae, keep_seed=True,
        filename_prefix=prefix, **given,
    )  # fmt: skip


def finish(
    scene: Scene,
    bucket: Bucket,
    prompt: Output,
    given: dict[str, Output],
    groups: Sequence[Group] = (),
    **widgets: Any,
) -> dict[str, Any]:
    """From the plan on: sampler, the video that is shown as it grows, and report. `groups` are those of pictures."""
    graph = scene.graph
    plan = graph.add("LowVRAMPlan", model=scene.model, length=33, guidance=False, **bucket.size)
    plan.values |= {"width": 640, "height": 608}  # what Nodes 2.0 shows in the place of what a picture decides
    sampler = add_sampler(scene, prompt, f"video/{graph.name}", **given, **widgets)
    report = graph.add("LowVRAMMemoryReport", model=scene.model, after=sampler["samples"])
    film = graph.add("LowVRAMShowVideo", video=sampler["video"])
    columns, promoted = scene.folded(sampler, groups)
    note = FRAMEPACK_NOTES[graph.name].text()
    return place(graph, Parts(FRAMEPACK, note, columns, promoted, film, plan, report))


def from_picture(
    name: str, file: ModelFile, prompt: str, device: str = "default", budget_gb: float = 0.0
) -> dict[str, Any]:
    """A video of a picture and a prompt."""
    scene = start(name, file, device, budget_gb)
    positive = add_prompt(scene, prompt)
    bucket, pictures = add_start_image(scene)
    return finish(scene, bucket, positive, pictures)


def framepack_blueprint() -> dict[str, Any]:
    """A picture's video as one node, from which people build their own."""
    scene = start(FRAMEPACK, files.FRAMEPACK)
    prompt = add_prompt(scene, "The girl dances gracefully, with clear movements")
    _, pictures = add_start_image(scene)
    sampler = add_sampler(scene, prompt, "video/framepack", **pictures)
    columns, promoted = scene.folded(sampler)
    about = (
        "A long video of a picture by FramePack on a card with little VRAM: its blocks are streamed within a budget."
    )
    return place_alone(scene.graph, FRAMEPACK, columns, promoted, {"video": sampler["video"]}, about)


def i2v() -> dict[str, Any]:
    return from_picture("framepack_i2v", files.FRAMEPACK, "The girl dances gracefully, with clear movements")


def f1() -> dict[str, Any]:
    prompt = "The man walks along the street, looks around and waves, the camera follows him"
    return from_picture("framepack_f1", files.FRAMEPACK_F1, prompt)


def small_card() -> dict[str, Any]:
    prompt = "The woman turns her head and smiles, her hair moves in the wind"
    return from_picture("framepack_fp8_6gb", files.FRAMEPACK, prompt, "cpu", SMALL_CARD_GB)


def gguf() -> dict[str, Any]:
    prompt = "The cat stretches, yawns and lies down again"
    return from_picture("framepack_gguf", files.FRAMEPACK_GGUF, prompt)


def start_end() -> dict[str, Any]:
    scene = start("framepack_start_end", files.FRAMEPACK)
    prompt = add_prompt(scene, "The woman sits down on the chair and picks up the book")
    bucket, given = add_start_image(scene)
    num_of_start = len(scene.pictures)
    image = scene.picture("LoadImage", title="End image")
    scaled = scene.picture("ImageScale", title="Scale to the start's size", image=image["IMAGE"], **bucket.size)
    latent, seen = add_encoders(scene, scaled[0], " (end)")
    end = scene.picture("LowVRAMFramePackEndImage", latent=latent, image_embeds=seen)
    groups = [
        Group("Start image", scene.pictures[:num_of_start], GREEN_BOX),
        Group("End image", scene.pictures[num_of_start:], GREEN_BOX),
    ]
    return finish(scene, bucket, prompt, {**given, "end_image": end[0]}, groups)


def timed_prompts() -> dict[str, Any]:
    scene = start("framepack_timed_prompts", files.FRAMEPACK_F1)
    prompt = scene.graph.add(
        "LowVRAMFramePackTimedPrompt", title="Timed prompt", clip=scene.clip, cross_fade=1.0,
        text="The woman stands still and looks into the camera [2s-5s: The woman waves with her right hand] "
        "[5s: The woman turns around and walks away]",
    )  # fmt: skip
    scene.prompting.append(prompt)
    bucket, pictures = add_start_image(scene)
    return finish(scene, bucket, prompt[0], pictures, total_second_length=8.0)


def extend() -> dict[str, Any]:
    scene = start("framepack_extend", files.FRAMEPACK_F1)
    prompt = add_prompt(scene, "The man goes on walking, then sits down on a bench")
    video = scene.picture("LoadVideo", title="Video to go on from")
    frames = scene.picture("GetVideoComponents", video=video[0])
    bucket = add_bucket(scene, frames["images"])
    given = scene.picture("VAEEncode", pixels=bucket.images, vae=scene.vae)
    first = scene.picture("ImageFromBatch", title="Its first frame", image=bucket.images)
    seen = scene.picture("CLIPVisionEncode", clip_vision=scene.vision, image=first[0])
    wires = {"extend_samples": given[0], "image_embeds": seen[0]}
    return finish(scene, bucket, prompt, wires, [Group("Video to extend", scene.pictures, GREEN_BOX)])


FRAMEPACK_WORKFLOWS: dict[str, Callable[[], dict[str, Any]]] = {
    "framepack_i2v": i2v,
    "framepack_f1": f1,
    "framepack_start_end": start_end,
    "framepack_timed_prompts": timed_prompts,
    "framepack_extend": extend,
    "framepack_fp8_6gb": small_card,
    "framepack_gguf": gguf,
}
