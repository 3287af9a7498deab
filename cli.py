"""The command line: `lowvram-video generate | plan | inspect | convert | demo`."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .attention.select import ATTENTION_MODES
from .demo.show import make_demo
from .diffusion.file_kinds import file_kind
from .diffusion.settings import RunSettings, usable_device
from .framepack.checkpoint import open_framepack
from .identify import describe, identify
from .memory.footprint import WorkSize
from .memory.limits import limits_for
from .memory.plan import describe as describe_plan
from .memory.timeline import draw_timeline
from .progress import TerminalProgress
from .sampling.samplers import SAMPLERS
from .sampling.schedules import SPACINGS
from .video import VideoWriter, check_writable
from .wanvideo.checkpoint import open_wan
from .wanvideo.pipeline import WanFiles, WanPipeline
from .wanvideo.request import NEGATIVE_PROMPT, WanRequest, check_size, defaults_for
from .wanvideo.streamed import StreamedWan
from .wanvideo.vae import WAN21_VAE, WAN22_VAE
from .weights.compute import QUANTIZATIONS
from .weights.convert import FILE_FORMATS, convert
from .weights.lora import LoraChoice
from .weights.lora_source import LORA_MODES
from .weights.reader import Checkpoint, CheckpointError, open_checkpoint

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 with one line on stderr that says what to do."""
    options = make_parser().parse_args(arguments)
    if sys.platform == "linux":  # elsewhere PyTorch does not know it; read when the GPU is first used
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        with torch.inference_mode():
            command(options)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted")
    except torch.cuda.OutOfMemoryError as error:
        return _fail(f"the GPU ran out of memory ({str(error).splitlines()[0]}): lower --vram-budget, size or frames")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(prog="lowvram-video", description="Wan video on small graphics cards")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is chosen and why")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_generate(commands.add_parser("generate", help="make a video from checkpoint files and a prompt"))
    _add_plan(commands.add_parser("plan", help="show what a run would use, without a GPU"))
    _add_inspect(commands.add_parser("inspect", help="say what a checkpoint file is"))
    _add_convert(commands.add_parser("convert", help="write a quantised copy of a checkpoint"))
    _add_demo(commands.add_parser("demo", help="make a video with the pack's own tiny model"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--model", type=Path, required=True, help="Wan transformer (Wan 2.2 A14B: the high-noise one)")
    files.add_argument("--model-low", type=Path, help="the low-noise expert of Wan 2.2 A14B")
    files.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="FILE:STRENGTH",
        help="a LoRA for the model (strength left out: 1); may be given several times",
    )  # fmt: skip
    files.add_argument(
        "--lora-low", type=_lora, action="append", default=[], metavar="FILE:STRENGTH",
        help="the same for the low-noise expert",
    )  # fmt: skip
    files.add_argument("--text-encoder", type=Path, required=True, help="umt5-xxl encoder")
    files.add_argument("--vae", type=Path, required=True, help="Wan 2.1 VAE, or Wan 2.2 VAE for TI2V 5B")
    files.add_argument("-o", "--output", type=Path, default=Path("output/video.mp4"))
    what = parser.add_argument_group("what to make (left out: the model's published setting)")
    what.add_argument("--prompt", required=True)
    what.add_argument("--negative-prompt", default=NEGATIVE_PROMPT)
    what.add_argument("--image", type=Path, help="first frame, for image-to-video models")
    what.add_argument("--end-image", type=Path, help="last frame, for first-last-frame models")
    what.add_argument("--width", type=int)
    what.add_argument("--height", type=int)
    what.add_argument("--frames", type=int, help="4n + 1")
    what.add_argument("--fps", type=_positive)
    what.add_argument("--seed", type=int, default=0)
    how = parser.add_argument_group("sampling")
    how.add_argument("--steps", type=int)
    how.add_argument("--sampler", choices=list(SAMPLERS), default="unipc")
    how.add_argument("--spacing", choices=list(SPACINGS), default="uniform")
    how.add_argument("--timesteps", type=_floats, help="a distilled model's own list, e.g. 1000,937.5,833.3,625")
    how.add_argument("--shift", type=float)
    how.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 turns it off")
    how.add_argument("--guidance-high", type=float, help="the same for the high-noise expert")
    how.add_argument("--boundary", type=float, help="sigma where the low-noise expert takes over")
    how.add_argument("--batch-cfg", action="store_true", help="cond and uncond in one batch instead of in turn")
    _add_machine(parser)
    parser.set_defaults(command=generate)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="Wan transformer; only its header is read")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int, help="4n + 1")
    parser.add_argument("--vram-budget", type=_positive, metavar="GIB", required=True)
    parser.add_argument("--ram-budget", type=_positive, metavar="GIB")
    parser.add_argument("--blocks-to-swap", type=int, default=-1)
    parser.add_argument("--batch-cfg", action="store_true", help="cond and uncond in one batch")
    parser.add_argument("--cfg-1", action="store_true", help="no guidance: one pass per step, as distilled models run")
    parser.set_defaults(command=plan)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.set_defaults(command=inspect)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a new .safetensors file")
    parser.add_argument("--to", choices=list(FILE_FORMATS), required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(command=convert_file)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, default=Path("output/demo.mp4"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.set_defaults(command=demo)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    machine.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="compute dtype")
    machine.add_argument(
        "--quantization", choices=list(QUANTIZATIONS), default="none",
        help="none: as stored; fp8, int8: quantise 16-bit files as they are read; fp8_fast: and multiply in fp8",
    )  # fmt: skip
    machine.add_argument(
        "--lora-mode", choices=list(LORA_MODES), default="auto",
        help="auto: LoRAs run beside the weights where they can, else they are merged; side, merge: only one of these",
    )  # fmt: skip
    machine.add_argument("--attention", choices=list(ATTENTION_MODES), default="auto")
    machine.add_argument("--vram-budget", type=_positive, metavar="GIB", help="hard limit (left out: what is free)")
    machine.add_argument("--ram-budget", type=_positive, metavar="GIB", help="smaller than the model: stream from disk")
    machine.add_argument("--blocks-to-swap", type=int, default=-1, help="-1: planned; else how many blocks stream")
    machine.add_argument("--prefetch", type=int, help="blocks fetched ahead (left out: planned)")
    machine.add_argument("--no-pinned", action="store_true", help="stream from pageable memory")
    machine.add_argument("--report", type=Path, help="write what the run used as JSON, and a timeline PNG beside it")


def generate(options: argparse.Namespace) -> None:
    """Make one video, its frames written as they are decoded."""
    loras = tuple(options.lora), tuple(options.lora_low)
    files = WanFiles(options.model, options.text_encoder, options.vae, options.model_low, *loras)
    request = WanRequest(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        width=options.width,
        height=options.height,
        num_frames=options.frames,
        seed=options.seed,
        num_steps=options.steps,
        sampler=options.sampler,
        spacing=options.spacing,
        shift=options.shift,
        guidance=options.guidance,
        guidance_high=options.guidance_high,
        boundary=options.boundary,
        timesteps=options.timesteps,
        image=options.image,
        end_image=options.end_image,
    )
    pipeline = WanPipeline(files, settings_of(options), TerminalProgress(sys.stderr))
    for lora in pipeline.lora_reports():
        print(lora.summary)  # what was not applied is in the log
    if options.report is not None:
        check_writable(options.report)
    writer = VideoWriter(options.output, options.fps or pipeline.defaults.fps)
    try:
        with writer:
            for frames in pipeline.generate(request):
                writer.write(frames)
    except KeyboardInterrupt:
        kept = f"{options.output} holds the {writer.num_frames} frames made so far"
        raise KeyboardInterrupt(f"interrupted: {kept if writer.num_frames else 'no frame was made yet'}") from None
    print(f"{options.output}: {writer.num_frames} frames")
    report = pipeline.report()
    print(report.table())
    if options.report is not None:
        report.save(options.report)
        draw_timeline(report, options.report.with_suffix(".png"))


def plan(options: argparse.Namespace) -> None:
    """Print how a run would use a card that need not be in this machine."""
    model = StreamedWan(options.model, RunSettings(dtype=torch.bfloat16))
    known = defaults_for(model.config, experts=False)
    vae = WAN22_VAE if model.config.model_type == "ti2v" else WAN21_VAE
    request = WanRequest("any", width=options.width, height=options.height, num_frames=options.frames)
    width, height, num_frames = request.completed(known).size
    check_size(vae, model.config.patch_size[1], width, height, num_frames)
    work = WorkSize(
        num_frames,
        height,
        width,
        batch=2 if options.batch_cfg else 1,
        passes_per_step=1 if options.batch_cfg or options.cfg_1 else 2,
        stride=(vae.temporal_stride, vae.spatial_stride, vae.spatial_stride),
        patch=model.config.patch_size,
    )
    limits = limits_for(
        torch.device("cuda"),
        vram_budget_gib=options.vram_budget,
        ram_budget_gib=options.ram_budget,
        blocks_to_swap=options.blocks_to_swap,
        fused=True,
        measure=False,
    )
    print(describe_plan(model.make_plan(work, limits)))


def inspect(options: argparse.Namespace) -> None:
    """Print what a checkpoint file is and what it needs beside it."""
    print(describe(identify(open_checkpoint(options.file))))


def convert_file(options: argparse.Namespace) -> None:
    """Write a quantised copy of a Wan or FramePack transformer, tensor by tensor."""
    checkpoint = _open_transformer(options.source)
    progress = TerminalProgress(sys.stderr)
    progress.begin("convert")
    try:
        path = convert(checkpoint, options.target, options.to, progress.update, usable_device(options.device))
    finally:
        progress.end()
    print(f"{path}: {path.stat().st_size / 2**30:.2f} GiB")


def _open_transformer(path: Path) -> Checkpoint:
    found = file_kind(open_checkpoint(path).tensors)
    if found.kind == "wan transformer":
        return open_wan(path)[1]
    if found.kind == "framepack transformer":
        return open_framepack(path)[1]
    raise CheckpointError(
        f"{path}: this is {found.title}; expected a Wan or FramePack transformer; "
        "choose such a file (wan2.1_…, wan2.2_… or FramePackI2V_HY_…)"
    )


def demo(options: argparse.Namespace) -> None:
    """Make a few videos with the pack's own tiny model: one mp4 and a contact sheet beside it."""
    torch.set_num_threads(1)  # its tensors are so small that threads cost more than they give
    shown = make_demo(options.output, options.seed, usable_device(options.device), TerminalProgress(sys.stderr))
    print(shown)


def settings_of(options: argparse.Namespace) -> RunSettings:
    """The machine's flags as settings."""
    dtypes = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return RunSettings(
        device=usable_device(options.device),
        dtype=dtypes[options.dtype],
        attention_mode=options.attention,
        quantization=options.quantization,
        lora_mode=options.lora_mode,
        vram_budget_gib=options.vram_budget,
        ram_budget_gib=options.ram_budget,
        blocks_to_swap=options.blocks_to_swap,
        prefetch=options.prefetch,
        pinned_memory=not options.no_pinned,
        timed=True,
        batched_guidance=getattr(options, "batch_cfg", False),
    )


def _fail(message: str) -> int:
    print(f"lowvram-video: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _lora(text: str) -> LoraChoice:
    path, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:
        return LoraChoice(Path(text))  # no strength, though Windows paths have colons
    if not path or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no LoRA file and strength such as style.safetensors:0.8")
    return LoraChoice(Path(path), value)


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1000,750,500,250") from None


if __name__ == "__main__":
    sys.exit(main())
