"""What the note beside each example workflow says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import model_files as files
from .graph import ModelFile

PLANNED_BUDGET = (
    "- **Out of memory while sampling:** set `vram_budget_gb` in *Block Swap* to 1 less than the budget that *VRAM "
    "Plan* shows, or make the video smaller."
)
HELP = f"""## If something fails
- **A node is red or missing:** update ComfyUI (0.8.0 or newer) and this pack, then restart.
{PLANNED_BUDGET}
- **The machine stutters or pinning fails:** turn `pinned_memory` off in *Block Swap*.
- **Saving fails:** set its `tile_size` to 256 (6 GB) or 128 (4 GB). Nothing is lost: the latent is in `output/latents`.
- Right-click a node and choose *Node Info* for its help page."""

ENCODER_CPU = (
    "- **Text encoder:** *Load CLIP* is set to `cpu`, because the 6.7 GB encoder does not fit on a 6 GB card. With 8 "
    "GB or more choose `default`: prompts are then read faster."
)
ENCODER_GPU = (
    "- **Text encoder:** *Load CLIP* is set to `default`: ComfyUI puts it on the GPU, as much of it as fits. With 6 GB "
    "or less, or if it runs out of memory, choose `cpu`: slower, once per new prompt."
)
RAM_SMALL = "- **RAM:** 16 GB is enough."
RAM_14B = (
    "- **RAM:** 32 GB is comfortable. With 16 GB the weights that do not fit are read from the disk in every step: it "
    "runs, but only as fast as the SSD."
)
RAM_EXPERTS = (
    "- **RAM:** 32 GB holds one expert at a time, so that the other is read from the disk when its turn comes; 64 GB "
    "holds both. The LoRAs run beside the layers and stream with them, from the disk too: nothing is merged in RAM."
)
FITS_480P = (
    ("6 GB", "832x480, 81 frames, nearly all blocks streamed"),
    ("8 GB", "832x480, 81 frames, less streamed"),
    ("12 GB and more", "832x480, 81 frames, less than half streamed"),
)
FITS_720P = (
    ("6 GB", "832x480, 81 frames, nearly all blocks streamed"),
    ("8 GB", "832x480 or 1280x720, 81 frames"),
    ("12 GB and more", "the same, with fewer blocks streamed"),
)
FITS_SMALL = (("4 GB", "832x480, 81 frames, some blocks streamed"), ("6 GB and more", "the same, all in VRAM"))
CHANGES_EXPERTS = (
    "- **Without the LoRAs:** bypass both, set 20 steps, the switch at step 10 in both samplers (`end_at_step`, "
    "`start_at_step`), CFG 3.5, and `guidance` on in *VRAM Plan*. Ten times the work, for more motion."
)


SIZE = "- **Size and length** are set on the large node. Length is 4n + 1 frames."


def unwrapped(text: str) -> str:
    """A line for each paragraph: the page breaks lines by itself, and translates whole ones."""
    lines: list[str] = []
    for line in text.splitlines():
        goes_on = lines and lines[-1] and not lines[-1].startswith(("#", "|")) and not line.startswith(("#", "-", "|"))
        if goes_on and line and "](http" not in lines[-1]:
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


@dataclass(frozen=True)
class Note:
    """`fits` are (VRAM, what runs there); `changes` and `size` are lines of their own."""

    title: str
    intro: str
    files: Sequence[ModelFile]
    fits: Sequence[tuple[str, str]]
    ram: str
    changes: str
    encoder: str = ENCODER_GPU
    size: str = SIZE
    help: str = HELP

    def text(self) -> str:
        links = [f"- [{f.name}]({f.url}) ({files.SIZES[f]:g} GB) → `models/{f.directory}`" for f in self.files]
        table = [f"| {vram} | {what} |" for vram, what in self.fits]
        return "\n".join(
            [
                f"# {self.title}",
                self.intro,
                "## Files",
                *links,
                "",
                "ComfyUI offers missing files for download when this workflow opens. Where huggingface.co is slow or "
                "blocked, put the mirror hf-mirror.com in its place. After a download by hand press **R**.",
                "## What fits",
                "| VRAM | video |",
                "|---|---|",
                *table,
                "",
                "- **VRAM:** planned for a card with half a GB in use elsewhere. *VRAM Plan* shows yours; for another "
                "card set `card_gb`.",
                self.ram,
                "## What to change",
                "- **All nodes:** the button at a corner of the large node opens it: files, *Block Swap*, sampler.",
                self.size,
                "- **Memory:** leave *Block Swap* alone at first: `-1` and `0` mean that it is planned.",
                self.encoder,
                self.changes,
                self.help,
            ]
        )


FLASHVSR_LINKS = "\n".join(
    f"- [{file.name}]({file.url}) → `models/{file.directory}`" for file in (files.FLASHVSR, *files.FLASHVSR_PARTS)
)

NOTES: dict[str, Note] = {
    "wan2.1_t2v_1.3B": Note(
        "Wan 2.1 text to video, 1.3B",
        "Five seconds of video from a text, with the smallest Wan model. Write a prompt and press **Run**.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **Quality:** 30 steps, CFG 6, shift 8. Fewer steps are faster and coarser.",
        ENCODER_CPU,
    ),
    "wan2.1_t2v_1.3B_resumable": Note(
        "Sampling that can be paused and goes on after a crash",
        "Wan 2.1 text to video, with *Resumable Sampling* behind *Block Swap*. Press **Run**; **Cancel** pauses: the "
        "VRAM is free at once, and **Run** with the same settings goes on from the last whole step, also after a crash "
        "or a restart, to the same video bit for bit.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **Another video:** any change of prompt, seed, size or sampling begins anew. What is kept is in "
        "`output/wan`; what was not used for a fortnight is removed.\n"
        "- **Other models:** put the node behind the last one that changes the MODEL; of two experts each takes one.",
        ENCODER_CPU,
    ),
    "wan2.1_t2v_1.3B_nag": Note(
        "A negative prompt at CFG 1",
        "Wan 2.1 text to video at CFG 1, one pass a step, with *Negative Guidance (NAG)* behind *Block Swap*: the "
        "negative prompt counts all the same. The same node goes behind 4-step models.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **More or less:** `nag_scale` 5 to 11; 1 switches it off. Leave KSampler's CFG at 1.\n"
        "- **Two experts:** each takes a node of its own.",
        ENCODER_CPU,
    ),
    "wan2.1_v2v_1.3B": Note(
        "Wan 2.1 video to video, 1.3B",
        "Makes a video anew by a prompt: *Encode Video* turns its frames into a latent, *KSampler* changes it at "
        "`denoise` 0.7, *Save Video* writes the result as it is decoded, with the sound and the rate of the old one. "
        "Choose a video.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **More or less of the old video:** `denoise` 0.5 keeps more, 0.9 little.",
        ENCODER_CPU,
    ),
    "wan2.1_t2v_1.3B_sparse": Note(
        "Sparse attention within a bound",
        "Wan 2.1 text to video with *Sparse Attention* behind *Block Swap*: after a quarter of the steps most of "
        "attention is left out, and *Memory Report* shows how far each step was from exact attention.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **Closer or faster:** `mode` quality, balanced, fast; `error_bound` 0 makes everything exact.\n"
        "- **Needs** an RTX 30 card or newer, and comfy-kitchen 0.2.40 or newer.",
        ENCODER_CPU,
    ),
    "wan2.1_t2v_1.3B_step_cache": Note(
        "Steps skipped by TeaCache",
        "Wan 2.1 text to video with *Step Cache* behind *Block Swap*: steps whose result would hardly change are "
        "skipped, and *Memory Report* shows which.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **Closer or faster:** a smaller `threshold` skips less; 0 is the table's own, 0.07 for this model.\n"
        "- **Other ways:** `method` magcache or first_block. With 8 steps or fewer nothing is skipped.",
        ENCODER_CPU,
    ),
    "wan2.1_t2v_1.3B_compiled": Note(
        "Blocks compiled by torch.compile",
        "Wan 2.1 text to video with *Torch Compile Settings* behind *Block Swap*: the first step takes longer. On an "
        "H200 the others gain nothing: measure it on your card.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **Needs** Triton: on Windows install `triton-windows`.\n"
        "- **Several sizes:** with `dynamic` true the code is made once for all of them.",
        ENCODER_CPU,
    ),
    "wan2.1_t2v_1.3B_several_gpus": Note(
        "One video on several GPUs",
        "Wan 2.1 text to video with *Several GPUs* behind *Block Swap*: each card computes part of every step, and one "
        "copy of the weights in RAM feeds them all. With one GPU it runs there alone.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **Which cards:** `devices` auto takes all; or a list such as cuda:0,cuda:1 with the one ComfyUI runs on.\n"
        "- **Other models:** put the node behind the last one that changes the MODEL; of two experts each takes one.",
        ENCODER_CPU,
    ),
    "wan2.1_t2v_1.3B_upscale": Note(
        "Wan 2.1 text to video, twice as large",
        "Wan 2.1 text to video at 832x480, and FlashVSR makes 1664x960 of it in one step before it is written.",
        (files.T2V_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        "- **RAM:** 32 GB is comfortable: FlashVSR remembers 10 GB of earlier frames. Fewer `kept_windows` take less.",
        f"- **FlashVSR's files:**\n{FLASHVSR_LINKS}\n- **Without it:** open *wan2.1_t2v_1.3B*.",
        ENCODER_CPU,
    ),
    "wan2.1_i2v_14B_480p_fp8": Note(
        "Wan 2.1 image to video, 14B, 480p, fp8",
        "Makes a picture move. Choose a picture, say in the prompt what happens, and press **Run**.",
        (files.I2V_480P, files.TEXT_ENCODER, files.CLIP_VISION, files.VAE_21),
        FITS_480P,
        RAM_14B,
        "- **Speed:** 20 steps at CFG 5 run the model 40 times. A distilled LoRA (lightx2v I2V 480p, with *Load LoRA "
        "(Model)* behind *Block Swap*) needs 4 to 6 steps at CFG 1, shift 5.",
    ),
    "wan2.1_flf2v_14B_fp8": Note(
        "Wan 2.1 first and last frame to video, 14B",
        "Makes the video between two pictures. Choose both; they should have the same shape.",
        (files.FLF2V, files.TEXT_ENCODER, files.CLIP_VISION, files.VAE_21),
        FITS_720P,
        RAM_14B,
        "- **Quality:** the model was made for 1280x720; 832x480 is much faster and good for trying prompts.",
    ),
    "wan2.1_vace_1.3B": Note(
        "Wan 2.1 VACE, 1.3B",
        "Makes a video with the person or thing of a reference picture. It can also follow a control video.",
        (files.VACE_SMALL, files.TEXT_ENCODER, files.VAE_21),
        FITS_SMALL,
        RAM_SMALL,
        "- **Reference:** a picture on a plain background works best; describe it in the prompt as well.\n"
        "- **Control video:** add *Load Video* and *Get Video Components*, and connect its images to `control_video` "
        "(depth, pose, edges, or a video whose masked part is to be painted anew with `control_masks`).",
        ENCODER_CPU,
    ),
    "wan2.2_t2v_A14B_4steps": Note(
        "Wan 2.2 text to video, A14B, 4 steps",
        "Two 14B experts: one for the coarse first steps, one for the details. With the 4-step LoRAs a video takes "
        "four passes.",
        (files.T2V_HIGH, files.T2V_LOW, files.T2V_LORA_HIGH, files.T2V_LORA_LOW, files.TEXT_ENCODER, files.VAE_21),
        FITS_720P,
        RAM_EXPERTS,
        CHANGES_EXPERTS,
    ),
    "wan2.2_i2v_A14B_4steps": Note(
        "Wan 2.2 image to video, A14B, 4 steps",
        "Makes a picture move with two 14B experts: one for the coarse first steps, one for the details. With the "
        "4-step LoRAs a video takes four passes. Choose a picture.",
        (files.I2V_HIGH, files.I2V_LOW, files.I2V_LORA_HIGH, files.I2V_LORA_LOW, files.TEXT_ENCODER, files.VAE_21),
        FITS_720P,
        RAM_EXPERTS,
        CHANGES_EXPERTS,
    ),
    "wan2.2_ti2v_5B": Note(
        "Wan 2.2 text or image to video, 5B",
        "Five seconds in 1280x704 at 24 frames per second. For a video of a picture select *First frame* "
        "and press **Ctrl+B**.",
        (files.TI2V, files.TEXT_ENCODER, files.VAE_22),
        (
            ("4 GB", "1280x704, 81 frames"),
            ("6 GB", "1280x704, 121 frames, two thirds of the blocks streamed"),
            ("8 GB", "1280x704, 121 frames, less streamed"),
            ("12 GB and more", "1280x704, 121 frames, all in VRAM"),
        ),
        "- **RAM:** 24 GB is comfortable; 16 GB is enough.",
        "- **Portrait:** 704x1280. Other sizes cost quality: the model was made for these two.\n"
        "- **Quality:** 30 steps, CFG 5, shift 5; the authors use 50 steps.",
    ),
}

UPSCALE_NOTE = f"""# A finished video, two to four times as large
Choose a video and press **Run**. FlashVSR makes it larger in one step; frames come from its file and go to
another as they are made, so that length costs neither VRAM nor RAM. Rate and sound are kept.
## Files
{FLASHVSR_LINKS}

ComfyUI offers missing files for download when this workflow opens. Where huggingface.co is slow or blocked, put the
mirror hf-mirror.com in its place. After a download by hand press **R**.
## What it takes
- **VRAM:** planned for what is free; `vram_budget_gb` is a hard limit.
- **RAM:** what is remembered of earlier frames: 10 GB for a video that becomes 1664x960, 37 GB for one that becomes
3328x1920. Fewer `kept_windows` take less.
## What to change
- **Size:** `scale` 2, 3 or 4.
- **Details:** `local_range` 9 is sharper, 11 steadier.
- **Cancel** pauses: queue the same again and it goes on.
- **Version 1:** with its files set `version` to 1.
- Right-click a node and choose *Node Info* for its help page."""

DOCTOR_NOTE = """# What of this machine works?
Press **Run**. *Doctor* tries PyTorch, the driver, Triton, attention packages, memory and the link, and says how to mend
what does not work. It takes about a minute. Nothing is downloaded, and nothing is changed.
## What to change
- **Disk:** `read_disk` reads a gigabyte of the largest model file too: how fast models stream from the disk.
- **For a bug report:** `save_report` writes a file into the output folder, without prompts and user names.
- On the command line the same is `lowvram-video doctor`."""

DEMO_NOTE = """# Demo: does everything work here?
Press **Run**. There is nothing to download: the tiny model comes with this pack and draws a coloured shape that
moves. It takes seconds, also on a CPU. The nodes are those of the large workflows: *Block Swap*, *KSampler*, *Decode
Video*.
## Prompts it knows
`a <colour> <shape> moves <speed> <direction> <place>`, with

| | |
|---|---|
| colour | red, yellow, green, cyan, blue, pink |
| shape | ball, square, triangle |
| speed | slowly, quickly, or nothing |
| direction | left, right, up, down |
| place | at night, in the snow, or nothing |

Such as *a blue square moves quickly right in the snow*. The negative prompt stays empty.
## What to change
- The prompt and the seed.
- Keep 96x96, 17 frames, 20 steps, CFG 4 and shift 3: the model was trained for them.
- Set `blocks_to_swap` to 4 to see all of its blocks streamed: the video stays the same. On a GPU *Memory Report*
shows the transfers.
## Next
*Templates → ComfyUI-LowVRAM-Video* has workflows for the real Wan models."""
