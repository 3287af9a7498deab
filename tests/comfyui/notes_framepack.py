"""What the note beside each FramePack workflow says."""

from __future__ import annotations

from . import model_files as files
from .notes import PLANNED_BUDGET, Note

ENCODERS = (files.LLAVA, files.CLIP_L, files.SIGCLIP, files.HUNYUAN_VAE)

HELP = f"""## If something fails
- **It stopped (a crash, an interrupt, no memory left):** press **Run** again with the same settings and seed. Finished
sections are kept in `output/framepack` and are not made again. The seed is set to *fixed* for that; change it by hand
for another video.
- **A node is red or missing:** update ComfyUI (0.8.0 or newer) and this pack, then restart.
{PLANNED_BUDGET}
- **The machine stutters or pinning fails:** turn `pinned_memory` off in *Block Swap*.
- Right-click a node and choose *Node Info* for its help page."""

ENCODER_GPU = (
    "- **Text encoder:** *Load CLIP (Dual)* is set to `default`: ComfyUI puts as much of its 9.1 GB on the GPU as "
    "fits. With 6 GB or less, or if it runs out of memory, choose `cpu`: slower, once per new prompt."
)
ENCODER_CPU = (
    "- **Text encoder:** *Load CLIP (Dual)* is set to `cpu`, because its 9.1 GB do not fit on a 6 GB card: slower, "
    "once per new prompt."
)
RAM_FP8 = (
    "- **RAM:** 32 GB is comfortable. With 16 GB the weights that do not fit are read from the disk in every step: it "
    "runs, but only as fast as the SSD."
)
RAM_GGUF = "- **RAM:** 24 GB is comfortable; 16 GB is enough with little else open."
SIZE = (
    "- **Length:** `total_second_length` in *FramePack Sampler*, at 30 frames a second. A longer video takes more "
    "time, not more memory.\n"
    "- **Size:** `base_resolution` in *FramePack Find Nearest Bucket*. 640 is what FramePack was made for; 480 is "
    "about twice as fast."
)
FITS = (
    ("6 GB", "640x608, any length, two thirds of the blocks streamed"),
    ("8 GB", "640x608, any length, less than half streamed"),
    ("12 GB and more", "640x608, any length, all in VRAM"),
)
FITS_GGUF = (
    ("6 GB", "640x608, any length, less than half of the blocks streamed (Q4_K_M)"),
    ("8 GB and more", "640x608, any length, nearly all or all in VRAM"),
)
GIVEN_BUDGET = HELP.replace("to 1 less than the budget that *VRAM Plan* shows", "half a GB lower")
QUALITY = (
    "- **Speed:** `use_teacache` skips steps that change little. Turn it off where hands or fine motion look bad; 25 "
    "steps are enough for a draft."
)
LORA = (
    "- **LoRA:** put *Load LoRA (Low VRAM)* behind *Block Swap*. LoRAs for FramePack and for HunyuanVideo apply, also "
    "on fp8 and GGUF."
)


def _note(title: str, intro: str, model: files.ModelFile, *changes: str, **more: str) -> Note:
    given = {"ram": RAM_FP8, "encoder": ENCODER_GPU, "help": HELP} | more
    listed = ENCODERS if model is files.FRAMEPACK_GGUF else (model, *ENCODERS)
    return Note(
        title, intro, listed, FITS_GGUF if model is files.FRAMEPACK_GGUF else FITS, given["ram"], "\n".join(changes),
        given["encoder"], SIZE, given["help"],
    )  # fmt: skip


FRAMEPACK_NOTES: dict[str, Note] = {
    "framepack_i2v": _note(
        "FramePack image to video, fp8",
        "Makes a picture move, for seconds or for minutes. Choose a picture, say in the prompt what "
        "happens, and press **Run**. The video is made in sections of 1.2 seconds, the last one first: it grows "
        "towards its start. It is saved after each section, and *Show Video* shows it as it grows.",
        files.FRAMEPACK,
        "- **Prompt:** short, and about motion: *The girl dances gracefully, with clear movements.*",
        QUALITY,
        LORA,
    ),
    "framepack_f1": _note(
        "FramePack F1 image to video, fp8",
        "F1 makes a video from its start on, with larger motion than FramePack; the picture may drift in long videos. "
        "Choose a picture, say in the prompt what happens, and press **Run**. The video is saved "
        "after each section, and *Show Video* shows it as it grows.",
        files.FRAMEPACK_F1,
        "- **Model type:** read from the file's name. If you renamed it, set `model_type` to `f1`.",
        QUALITY,
        LORA,
    ),
    "framepack_start_end": _note(
        "FramePack start and end image, fp8",
        "Makes the video between two pictures. Choose both; the end image is cut to the start's shape. "
        "Every section knows where it is heading, so the motion is spread over the whole video.",
        files.FRAMEPACK,
        "- **How strongly the end counts:** `embed_interpolation` in *FramePack End Image*. `linear` glides from the "
        "start's content to the end's; `disabled` uses only the end's pixels.",
        QUALITY,
        LORA,
    ),
    "framepack_timed_prompts": _note(
        "FramePack F1 with timed prompts, fp8",
        "The prompt changes along the video. `[2s-5s: she waves]` holds from second 2 to 5, `[5s: she walks away]` "
        "from second 5 on, and the text outside brackets at all other times.",
        files.FRAMEPACK_F1,
        "- **Times** are those of the finished video. A section of 1.2 seconds has one prompt; with `cross_fade` one "
        "turns into the next over that many seconds.",
        "- **The other model** (FramePackI2V) takes timed prompts as well.",
        QUALITY,
    ),
    "framepack_extend": _note(
        "FramePack F1: extend a video, fp8",
        "Goes on where a video ends. Choose the video, say in the prompt what happens next, and press "
        "**Run**. `total_second_length` is the length of what is added; the saved video has both.",
        files.FRAMEPACK_F1,
        "- **Frame rate:** the video is taken as it is, and plays at 30 frames a second. Videos of FramePack fit; "
        "convert others to 30 first.",
        "- **Memory:** a long video takes much RAM while it is encoded. FramePack looks back 19 latents (2.5 seconds), "
        "so a short end of it is enough.",
        QUALITY,
    ),
    "framepack_fp8_6gb": _note(
        "FramePack image to video on 6 GB",
        "FramePack on a small card: about two thirds of the blocks stream from RAM while the others compute, and "
        "everything stays within 5 GB. Choose a picture, say in the prompt what happens, and press **Run**.",
        files.FRAMEPACK,
        "- **The limit:** `vram_budget_gb` in *Block Swap* is 5: half a GB less if your desktop uses more; 0 plans "
        "with what is free.",
        QUALITY,
        LORA,
        encoder=ENCODER_CPU,
        help=GIVEN_BUDGET,
    ),
    "framepack_gguf": _note(
        "FramePack image to video, GGUF",
        "FramePack from a GGUF file, half as large as fp8: for less RAM and slow buses. Choose your file in *Load "
        f"FramePack Model*, a picture, and press **Run**. GGUF files of FramePack are found by [a search on "
        f"Hugging Face]({files.FRAMEPACK_GGUF.url}); every type from Q2_K to Q8_0 works. Put the file (Q4_K_M: about "
        f"{files.SIZES[files.FRAMEPACK_GGUF]:.0f} GB) into `models/{files.FRAMEPACK_GGUF.directory}` or `models/unet`.",
        files.FRAMEPACK_GGUF,
        "- **Quality:** larger types are closer to the original: Q8_0 hardly differs, below Q4 details suffer.",
        "- **F1:** for a file without F1 in its name set `model_type` to `f1`.",
        QUALITY,
        LORA,
        ram=RAM_GGUF,
    ),
}
