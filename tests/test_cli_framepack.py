"""FramePack on the command line, from end to end on tiny files: what it makes, keeps, goes on from and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from lowvram_video.cli import framepack, framepack_run
from lowvram_video.cli.framepack import _sampling, _size
from lowvram_video.cli.main import main, make_parser
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel
from lowvram_video.framepack.request import EncodedInputs, Sampling
from lowvram_video.framepack.run.run import FramePackRun
from lowvram_video.framepack.text.images import ImageEncoder
from lowvram_video.framepack.text.prompts import PromptEncoder
from lowvram_video.framepack.timed_prompts import parse_timed_prompt
from lowvram_video.framepack.vae.model import HunyuanVAE, VAEConfig
from lowvram_video.video.pictures import load_image
from lowvram_video.video.reader import read_end, read_pieces, read_video, video_seconds, video_size
from lowvram_video.video.writer import VideoWriter
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, SiglipVisionConfig, SiglipVisionModel

from .test_cli import refusal
from .test_framepack_encoders import clip_vocab, llama_tokenizer, spoiled, write
from .test_framepack_generation import run
from .tiny import randomize, save_wan
from .tiny_framepack import CONFIG as TINY
from .tiny_framepack import make_tensors, save_framepack
from .written import unnamed

CPU = torch.device("cpu")
# heads of LLaMA are 128 wide, those of CLIP 64, those of SigLIP 72
TEXT_DIM, POOLED_DIM, IMAGE_DIM = 32, 64, 72
CONFIG = replace(
    TINY, num_layers=1, num_single_layers=1, text_dim=TEXT_DIM, pooled_dim=POOLED_DIM, image_dim=IMAGE_DIM
)  # fmt: skip
WIDTH, HEIGHT = 48, 32
WINDOW, STEPS, SECONDS = 2, 2, 0.5  # two sections: round(0.5 * 30 / 8)
NEW_FRAMES = 4 * WINDOW * 2
PROMPT = "she stands still"


@dataclass(frozen=True)
class Files:
    """The flags that name tiny files."""

    model: Path
    text_encoder: Path
    clip_l: Path
    clip_vision: Path
    vae: Path
    image: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tiny files: the encoders with their tokenizers, base and F1, pictures and videos."""
    folder = tmp_path_factory.mktemp("framepack_files")
    torch.manual_seed(0)
    save_encoders(folder, TEXT_DIM)
    save_framepack(folder / "framepack.safetensors", CONFIG)
    save_framepack(folder / "FramePack_F1.safetensors", replace(CONFIG, model_type="f1"))
    vae = randomize(HunyuanVAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=8)))
    write(folder / "vae.safetensors", vae.state_dict())
    save_wan(folder / "wan.safetensors")
    pictures = np.random.default_rng(1).integers(0, 255, (2, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    for name, pixels in zip(("girl", "end"), pictures, strict=True):
        Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    for name, num_frames in (("long", 40), ("short", 5)):
        with VideoWriter(folder / f"{name}.mp4", 30) as writer:
            writer.write(gradient(num_frames, WIDTH, HEIGHT))
    return folder


def save_encoders(folder: Path, text_dim: int) -> None:
    fast = llama_tokenizer(whole_words=True)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=fast.get_vocab_size() + 3, hidden_size=text_dim, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=1, num_key_value_heads=1, head_dim=128, pad_token_id=None,
        )
    )  # fmt: skip
    vocab, merges = clip_vocab()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=POOLED_DIM, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=IMAGE_DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=384,
            patch_size=14,
        )
    )  # fmt: skip
    for name, model in (("llava_llama3", llama), ("clip_l", clip), ("sigclip", siglip)):
        write(folder / f"{name}.safetensors", spoiled(model.eval().requires_grad_(False)).state_dict())
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer_2" / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "tokenizer_2" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def gradient(num_frames: int, width: int, height: int) -> torch.Tensor:
    """A smooth picture that changes evenly, uint8 `[T, H, W, 3]`."""
    t, y, x = (torch.linspace(0, 1, size) for size in (num_frames, height, width))
    red, green, blue = torch.meshgrid(t, y, x, indexing="ij")
    return (torch.stack([red, green, blue], dim=-1) * 255).to(torch.uint8)


@pytest.fixture
def files(folder: Path) -> Files:
    names = ("framepack", "llava_llama3", "clip_l", "sigclip", "vae")
    return Files(*(folder / f"{name}.safetensors" for name in names), folder / "girl.png")


@pytest.fixture
def f1(files: Files, folder: Path) -> Files:
    return replace(files, model=folder / "FramePack_F1.safetensors")


def arguments(files: Files, output: Path, *more: object, prompt: str = PROMPT, image: bool = True) -> list[str]:
    words: list[object] = [
        "generate", "--model", files.model, "--text-encoder", files.text_encoder, "--clip-l", files.clip_l,
        "--clip-vision", files.clip_vision, "--vae", files.vae, "--prompt", prompt, "--output", output,
        "--device", "cpu", "--width", WIDTH, "--height", HEIGHT, "--window", WINDOW, "--steps", STEPS,
        *(["--image", files.image] if image else []), *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def video(*more: object) -> list[object]:
    return ["--seconds", SECONDS, *more]


def num_frames(path: Path) -> int:
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0]


def pixels(path: Path) -> torch.Tensor:
    return read_video(path, WIDTH, HEIGHT, 30)


def latents(runs: Path) -> list[torch.Tensor]:
    """Those of the only run's sections."""
    (folder,) = runs.iterdir()
    return [load_file(path)["latents"] for path in sorted(folder.glob("section_*.safetensors"))]


# --- what is made ----------------------------------------------------------------------------------------


def test_a_picture_becomes_a_video_that_is_reported(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report = tmp_path / "new" / "girl.mp4", tmp_path / "reports" / "girl.json"
    assert main(arguments(files, output, *video("--report", report))) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{output}: {NEW_FRAMES + 1} frames; its sections are kept in {output.parent / 'framepack'}")
    assert num_frames(output) == NEW_FRAMES + 1
    assert next(imageio_ffmpeg.read_frames(str(output)))["fps"] == 30
    phases = json.loads(report.read_text())["phases"]
    assert [phase["name"] for phase in phases] == ["encode", "prepare", "denoise", "decode"]
    starts = [phase["start"] for phase in phases]
    assert starts == sorted(starts) and starts[1] >= phases[0]["seconds"]
    assert report.with_suffix(".png").stat().st_size > 0
    told = [line.split(":")[0] for line in err.splitlines()]
    assert told == [
        "prompts", "image features", "latents", "prepare", "section 1 of 2", "decode", "section 2 of 2", "decode",
    ]  # fmt: skip
    assert sorted(os.listdir(output.parent)) == ["framepack", "girl.mp4"]
    assert unnamed(tmp_path, out) == []


@pytest.mark.parametrize("mode", ["base", "f1"])
def test_sections_are_those_of_the_encoders_and_the_loop_by_hand(
    files: Files, folder: Path, tmp_path: Path, mode: str
) -> None:
    text = "she stands [0.3s: she waves]"
    flags = ["--end-image", folder / "end.png", "--cfg", 2, "--negative-prompt", "blurry", "--seed", 9, "--shift", 5]
    flags += ["--distilled-guidance", 8, "--sampler", "unipc_bh2", "--teacache", 0.3, "--cross-fade", 0.2]
    flags += ["--image-strength", 0.4, "--embed-interpolation", "weighted_average"]
    words = arguments(files, tmp_path / "a.mp4", *video(*flags, "--model-type", mode), prompt=text)
    assert main(words) == 0

    prompts = PromptEncoder(files.text_encoder, files.clip_l, None, CPU, torch.float32)
    vision = ImageEncoder(files.clip_vision, CPU, torch.float32)
    vae = HunyuanVAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=8))
    vae.load_state_dict(load_file(files.vae))
    start, end = (load_image(folder / f"{name}.png", WIDTH, HEIGHT) for name in ("girl", "end"))
    encoded = prompts.encode(["she stands", "she waves", "blurry"])
    material = EncodedInputs(
        latent_size=(HEIGHT // 8, WIDTH // 8),
        timed=parse_timed_prompt(text, 0.2),
        prompts=dict(zip(["she stands", "she waves"], encoded, strict=False)),
        negative=encoded[2],
        start=vae.encode(start),
        end=vae.encode(end),
        start_features=vision.encode(start[:, :, 0]),
        end_features=vision.encode(end[:, :, 0]),
        start_strength=0.4,
        interpolation="weighted_average",
    )
    sampling = Sampling(
        SECONDS, mode, WINDOW, STEPS, "unipc_bh2", guidance=8.0, cfg=2.0, shift=5.0, seed=9, cache_threshold=0.3
    )  # type: ignore[arg-type]
    path = save_framepack(tmp_path / "model.safetensors", replace(CONFIG, model_type=mode))
    wanted = run(path, sampling, material)
    made = latents(tmp_path / "framepack")
    assert len(made) == len(wanted) == 2
    for ours, theirs in zip(made, wanted, strict=True):
        assert torch.equal(ours, theirs.latents)


def test_what_is_not_given_is_as_in_the_node() -> None:
    options = make_parser().parse_args(["generate", "--model", "framepack.safetensors", "--prompt", PROMPT])
    assert _sampling(options, "base") == Sampling()


def test_f1_is_told_by_the_file_and_makes_another_video(files: Files, f1: Files, tmp_path: Path) -> None:
    for name, model in (("base", files), ("f1", f1)):
        assert main(arguments(model, tmp_path / f"{name}.mp4", *video("--runs", tmp_path / name))) == 0
        assert num_frames(tmp_path / f"{name}.mp4") == NEW_FRAMES + 1
    shapes = [[section.shape[2] for section in latents(tmp_path / name)] for name in ("base", "f1")]
    assert shapes == [[WINDOW, WINDOW + 1], [WINDOW, WINDOW]], "base has the start image's latent in its last section"


def test_timed_prompts_change_the_video_where_they_hold(f1: Files, tmp_path: Path) -> None:
    made = []
    for name, text in (("one", PROMPT), ("timed", f"{PROMPT} [0.3s: she waves]")):
        assert main(arguments(f1, tmp_path / f"{name}.mp4", *video("--runs", tmp_path / name), prompt=text)) == 0
        made.append(latents(tmp_path / name))
    assert torch.equal(made[0][0], made[1][0]) and not torch.equal(made[0][1], made[1][1])


def test_text_alone_needs_no_vision_model(files: Files, tmp_path: Path) -> None:
    words = arguments(files, tmp_path / "a.mp4", *video("--no-teacache"), image=False)
    where = words.index("--clip-vision")
    assert main(words[:where] + words[where + 2 :]) == 0
    assert num_frames(tmp_path / "a.mp4") == NEW_FRAMES - 3  # no start image: its sections alone


def test_one_frame_is_a_picture(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "later.png"
    assert main(arguments(files, path, "--one-frame", 4)) == 0
    said = capsys.readouterr().out
    assert f"{path}: a picture, 4 latents after the start" in said and unnamed(tmp_path, said) == []
    with Image.open(path) as picture:
        assert picture.size == (WIDTH, HEIGHT) and picture.mode == "RGB"
        first = np.asarray(picture)
    assert main(arguments(files, tmp_path / "much_later.png", "--one-frame", 30, "--no-resume")) == 0
    with Image.open(tmp_path / "much_later.png") as picture:
        assert not np.array_equal(first, np.asarray(picture))


# --- videos as material ----------------------------------------------------------------------------------


def test_a_video_is_extended_in_full(f1: Files, folder: Path, tmp_path: Path) -> None:
    given = folder / "long.mp4"
    output = tmp_path / "longer.mp4"
    assert main(arguments(f1, output, *video("--extend", given), image=False)) == 0
    assert num_frames(output) == 40 + NEW_FRAMES
    untouched = 40 - (4 * WINDOW - 3)  # the last ones fade into what was decoded
    ours, theirs = pixels(output)[:untouched].float(), pixels(given)[:untouched].float()
    print(f"frames before the continuation: mean difference {(ours - theirs).abs().mean():.2f} of 255")
    assert (ours - theirs).abs().mean() < 3
    assert main(arguments(f1, output, *video("--extend", given), image=False)) == 0, "and once more"
    assert num_frames(output) == 40 + NEW_FRAMES


def test_times_of_prompts_count_from_the_start_of_the_video_to_extend(f1: Files, tmp_path: Path) -> None:
    """Sections see the last 73 frames of it only."""
    given = tmp_path / "given.mp4"
    with VideoWriter(given, 30) as writer:
        writer.write(torch.randint(0, 255, (100, HEIGHT, WIDTH, 3), dtype=torch.uint8))
    made = []
    for name, text in (("one", PROMPT), ("timed", f"{PROMPT} [{(100 + 4 * WINDOW) / 30}s: she waves]")):
        words = arguments(
            f1, tmp_path / f"{name}.mp4", *video("--extend", given, "--runs", tmp_path / name), prompt=text
        )
        assert main(words) == 0
        made.append(latents(tmp_path / name))
    assert torch.equal(made[0][0], made[1][0]) and not torch.equal(made[0][1], made[1][1])


def test_a_window_wider_than_the_history_keeps_all_of_the_video(f1: Files, tmp_path: Path) -> None:
    given = tmp_path / "given.mp4"
    with VideoWriter(given, 30) as writer:
        writer.write(torch.randint(0, 255, (130, HEIGHT, WIDTH, 3), dtype=torch.uint8))
    words = arguments(f1, tmp_path / "a.mp4", *video("--extend", given, "--window", 25, "--no-resume"))
    assert main(words) == 0
    assert num_frames(tmp_path / "a.mp4") == 130 + 4 * 25


def test_a_video_shorter_than_a_window_is_in_the_first_section(f1: Files, folder: Path, tmp_path: Path) -> None:
    words = arguments(f1, tmp_path / "a.mp4", *video("--extend", folder / "short.mp4", "--window", 3))
    assert main(words) == 0
    num_sections = len(latents(tmp_path / "framepack"))
    assert num_frames(tmp_path / "a.mp4") == 5 + 12 * num_sections


@pytest.mark.parametrize(
    ("words", "name"), [(["--extend"], "read_pieces"), (["--strength", 0.5, "--video"], "read_video")]
)
def test_a_video_that_changes_between_two_readings_is_told(
    f1: Files,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[Any],
    name: str,
) -> None:
    """What is continued is not what plays before it; what is changed is not what was measured."""
    given = Path(shutil.copy(folder / "long.mp4", tmp_path / "given.mp4"))
    owner = framepack_run if name == "read_pieces" else framepack
    real = getattr(owner, name)

    def changing(*args: Any, **named: Any) -> Any:
        shutil.copy(folder / "short.mp4", given)
        return real(*args, **named)

    monkeypatch.setattr(owner, name, changing)
    assert main(arguments(f1, tmp_path / "a.mp4", *video(*words, given), image=False)) == 2
    assert "given.mp4 was changed while it was read" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a.mp4").exists() and not list(tmp_path.glob("framepack/*/section_*"))
    monkeypatch.undo()
    shutil.copy(folder / "long.mp4", given)
    assert main(arguments(f1, tmp_path / "a.mp4", *video(*words, given), image=False)) == 0, "put back"


def test_a_video_is_changed_by_strength(files: Files, folder: Path, tmp_path: Path) -> None:
    made = {}
    for strength in (0.0, 0.5):
        output = tmp_path / f"{strength}.mp4"
        more = video("--video", folder / "long.mp4", "--strength", strength, "--runs", tmp_path / str(strength))
        assert main(arguments(files, output, *more, image=False)) == 0
        made[strength] = torch.cat(latents(tmp_path / str(strength))[::-1], dim=2)
    vae = HunyuanVAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=8))
    vae.load_state_dict(load_file(files.vae))
    clip = pixels(folder / "long.mp4")[: NEW_FRAMES + 1].permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    want = torch.cat([vae.encode(clip[:, :, :1]), vae.encode(clip)[:, :, 1:]], dim=2)  # the start is a picture alone
    error = (made[0.0] - want).abs().max()
    print(f"strength 0 keeps the video's latents: max difference {error:.1e}")
    assert error < 1e-5
    assert not torch.equal(made[0.0], made[0.5])


# --- what is kept ----------------------------------------------------------------------------------------


def stopping(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """The run fails while it decodes its section number `after`."""
    decode, seen = FramePackRun._decode, []

    def fail(self: FramePackRun, made: object) -> torch.Tensor:
        seen.append(made)
        if len(seen) > after:
            raise error
        return decode(self, made)  # type: ignore[arg-type]

    monkeypatch.setattr(FramePackRun, "_decode", fail)


@pytest.mark.parametrize("kind", ["base", "extend"])
def test_an_interrupted_run_goes_on_to_the_same_frames(
    files: Files, f1: Files, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model, more = (files, []) if kind == "base" else (f1, ["--extend", folder / "long.mp4"])
    whole, output = tmp_path / "whole.mp4", tmp_path / "parts.mp4"
    assert main(arguments(model, whole, *video(*more), "--runs", tmp_path / "other")) == 0
    words = arguments(model, output, *video(*more))
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, KeyboardInterrupt(), after=1)
        assert main(words) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    print(last)
    shown = num_frames(output)
    assert re.search(r"interrupted: 2 of 2 sections are kept in .*framepack.[0-9a-f]{16}, ", last)
    assert f"{output} holds the {shown} frames made so far; the same command goes on from there" in last
    assert shown < num_frames(whole)

    def never(*_: object) -> None:
        raise AssertionError("a section that is kept was made again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FramePackRun, "_velocity", never)
        assert main(words) == 0
    assert torch.equal(pixels(output), pixels(whole))


def test_an_interrupt_in_the_first_section_keeps_nothing(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FramePackRun, "_velocity", interrupt)
    assert main(arguments(files, tmp_path / "a.mp4", *video())) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "lowvram-video: interrupted: no section was made yet"
    assert not (tmp_path / "a.mp4").exists()


def test_running_out_of_memory_says_what_is_kept(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(monkeypatch, torch.cuda.OutOfMemoryError("CUDA out of memory."), after=1)
    assert main(arguments(files, tmp_path / "a.mp4", *video())) == 2
    out, err = capsys.readouterr()
    assert "2 of 2 sections are kept" in out and "the same command goes on from there" in out
    assert "make a smaller or shorter video" in err.splitlines()[-1] and "--window" in err


def test_no_resume_leaves_the_video_alone(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(arguments(files, tmp_path / "a.mp4", *video("--no-resume"))) == 0
    assert os.listdir(tmp_path) == ["a.mp4"] and num_frames(tmp_path / "a.mp4") == NEW_FRAMES + 1
    stopping(monkeypatch, KeyboardInterrupt(), after=1)
    assert main(arguments(files, tmp_path / "b.mp4", *video("--no-resume"))) == 130
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


def test_a_finished_run_is_not_made_again(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(files, tmp_path / "a.mp4", *video())
    assert main(words) == 0
    before = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").unlink()
    monkeypatch.setattr(FramePackRun, "_velocity", None)
    monkeypatch.setattr(FramePackRun, "_decode", None)
    capsys.readouterr()
    assert main(words) == 0
    assert f"{NEW_FRAMES + 1} frames" in capsys.readouterr().out
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_loras_and_machine_flags(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = make_tensors(CONFIG)["transformer_blocks.0.attn.to_q.weight"]
    factors = {"lora_A": torch.ones(4, weight.shape[1]), "lora_B": torch.ones(weight.shape[0], 4)}
    lora = tmp_path / "style.safetensors"
    save_file({f"transformer.transformer_blocks.0.attn.to_q.{k}.weight": v for k, v in factors.items()}, lora)
    made = []
    machine = "--dtype bf16 --attention sdpa --ram-budget 64 --blocks-to-swap 2 --prefetch 1 --no-pinned"
    for number, more in enumerate(([], ["--lora", f"{lora}:0.5"], machine.split())):
        runs = tmp_path / str(number)
        assert main(arguments(files, tmp_path / f"{number}.mp4", *video(*more, "--runs", runs))) == 0
        made.append(latents(runs)[0])
    assert "style.safetensors: 2 of 2 keys applied" in capsys.readouterr().out
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2]) and (made[0] - made[2]).abs().max() < 0.5


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frames", 0], "--frames does not apply to FramePack models: FramePack takes --seconds"),
        (["--fps", 16], "--fps does not apply to FramePack models: FramePack makes 30 frames a second"),
        (["--guidance", 5], "--guidance does not apply to FramePack models: FramePack takes --distilled-guidance"),
        (["--model-low", "low.safetensors"], "--model-low does not apply to FramePack models"),
        (["--lora-low", "a.safetensors"], "give --lora"),
        (["--batch-cfg"], "FramePack makes the two passes of --cfg in turn"),
        (["--timesteps", "1000,500"], "noise levels follow --steps and --shift"),
        (["--sampler", "lcm"], "--sampler lcm does not apply to FramePack models: use unipc_bh1, unipc_bh2, euler"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "she [waves"], "The bracket '[waves' is not closed"),
        (["--prompt", "she [waves]"], "'[waves]' does not begin with a time"),
        (["--cross-fade", 1], "--cross-fade has nothing to fade"),
        (["--embed-interpolation", "linear"], "--embed-interpolation has nothing to go to: give --end-image"),
        (["--width", 50], "50x32 cannot be made: FramePack needs sides that are multiples of 16; use 48x32"),
        (["--steps", 0], "steps is 0: use 1 to"),
        (["--window", 0], "latent_window_size is 0; expected 1 to 33"),
        (["--seconds", 0], "'0' is no number above 0"),
        (["--strength", 2], "'2' is no number from 0 to 1"),
        (["--strength", 0.5], "--video and --strength belong together"),
        (["--video", "a.mp4"], "--video and --strength belong together"),
        (["--teacache", -1], "argument --teacache: '-1' is no number from 0 up"),
        (["--teacache", 0.1, "--no-teacache"], "not allowed with argument"),
        (["--runs", "runs", "--no-resume"], "--runs and --no-resume exclude each other"),
        (["--one-frame", 1, "--seconds", 2], "--one-frame and --seconds exclude each other"),
        (["--one-frame", 1, "--end-image", "end.png"], "--one-frame and --end-image exclude each other"),
        (["--one-frame", 1], "a.mp4 is no picture file name: end it in .png"),
        (["--one-frame", 0], "target_index is 0; expected 1 or more"),
        (["--image", "gone.png"], "gone.png: there is no such picture"),
        (["--end-image", "gone.png"], "gone.png: there is no such picture"),
        (["--video", "gone.mp4", "--strength", 0.5], "gone.mp4: there is no such video"),
        (["--extend", "gone.mp4"], "framepack.safetensors is a base model, which works from the end to the start"),
        (["--extend", "gone.mp4", "--model-type", "f1"], "gone.mp4: there is no such video"),
        (["--extend", "a.mp4", "--video", "b.mp4", "--strength", 1], "--extend and --video exclude each other"),
        (["--blocks-to-swap", 9], "blocks_to_swap is 9, but framepack.safetensors has 2 blocks"),
    ],
)
def test_wrong_flags(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[object], words: str
) -> None:
    line = refusal(capsys, arguments(files, tmp_path / "a.mp4", *flags))
    assert words in line and "lowvram-video" in line
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seconds", 5], "--seconds does not apply to Wan models: Wan takes --frames"),
        (["--cfg", 2], "--cfg does not apply to Wan models: Wan takes --guidance"),
        (["--one-frame", 1], "for a single picture give --frames 1"),
        (["--extend", "a.mp4"], "only FramePack F1 models go on from a video"),
        ([], "wan.safetensors needs --text-encoder, a umt5-xxl encoder: download umt5_xxl"),
    ],
)
def test_framepack_flags_for_a_wan_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[object], words: str
) -> None:
    line = refusal(
        capsys, [str(w) for w in ("generate", "--model", folder / "wan.safetensors", "--prompt", "x", *flags)]
    )
    assert words in line


@pytest.mark.parametrize(
    ("option", "file_name", "source"),
    [
        ("--text-encoder", "llava_llama3_fp8_scaled.safetensors", "Comfy-Org/HunyuanVideo_repackaged"),
        ("--clip-l", "clip_l.safetensors", "Comfy-Org/HunyuanVideo_repackaged"),
        ("--clip-vision", "sigclip_vision_patch14_384.safetensors", "Comfy-Org/sigclip_vision_384"),
        ("--vae", "hunyuan_video_vae_bf16.safetensors", "Comfy-Org/HunyuanVideo_repackaged"),
    ],
)
def test_a_missing_file_says_where_to_get_it(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, file_name: str, source: str
) -> None:
    words = arguments(files, tmp_path / "a.mp4")
    where = words.index(option)
    line = refusal(capsys, words[:where] + words[where + 2 :])
    assert f"needs {option}, " in line and f"download {file_name} from {source}" in line
    line = refusal(capsys, [*words[: where + 1], str(tmp_path / "gone.safetensors"), *words[where + 2 :]])
    assert "gone.safetensors: no such file" in line and f"download {file_name} from {source}" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("slot", "given", "words"),
    [
        ("text_encoder", "clip_l", "expected a LLaMA 3 text encoder"),
        ("clip_l", "llava_llama3", "expected a CLIP-L text encoder"),
        ("clip_vision", "clip_l", "expected a SigLIP vision model"),
        ("vae", "wan", "expected a HunyuanVideo VAE"),
        ("model", "vae", "this is a HunyuanVideo VAE; expected a Wan 2.1 or 2.2 transformer"),
    ],
)
def test_a_wrong_file_for_the_slot(
    files: Files, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], slot: str, given: str, words: str
) -> None:
    path = folder / f"{given}.safetensors"
    line = refusal(capsys, arguments(replace(files, **{slot: path}), tmp_path / "a.mp4"))
    assert line.startswith(f"lowvram-video: {path}") or "does not apply" in line
    assert words in line or slot == "model"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", ["text_dim", "pooled_dim", "image_dim"])
def test_encoders_of_another_width(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    model = save_framepack(tmp_path / "other.safetensors", replace(CONFIG, **{option: 40}))
    line = refusal(capsys, arguments(replace(files, model=model), tmp_path / "a.mp4"))
    path = {"text_dim": files.text_encoder, "pooled_dim": files.clip_l, "image_dim": files.clip_vision}[option]
    found = {"text_dim": TEXT_DIM, "pooled_dim": POOLED_DIM, "image_dim": IMAGE_DIM}[option]
    assert line.startswith(f"lowvram-video: {path}: makes ") and f"{found}, but other.safetensors reads 40" in line


def test_a_negative_prompt_without_cfg_is_told_to_be_unread(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = ["--window", 0]  # before it does anything
    assert main(arguments(files, tmp_path / "a.mp4", "--negative-prompt", "blurry", *refused)) == 2
    assert "the negative prompt is not read: it takes --cfg above 1, or --nag" in caplog.text


def test_nag_has_the_negative_prompt_count(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {}
    for name, flags in {
        "plain": (),
        "off": ("--nag", 1),
        "guided": ("--nag", 9, "--nag-tau", 5, "--nag-alpha", 0.9),
        "blurry": ("--nag", 9, "--nag-tau", 5, "--nag-alpha", 0.9, "--negative-prompt", "blurry"),
    }.items():
        runs = tmp_path / name
        assert main(arguments(files, tmp_path / f"{name}.mp4", *video(*flags, "--runs", runs))) == 0
        made[name] = torch.cat(latents(runs), dim=2)
    assert torch.equal(made["plain"], made["off"])
    assert not torch.equal(made["guided"], made["plain"]) and not torch.equal(made["guided"], made["blurry"])
    words = arguments(files, tmp_path / "a.mp4", *video("--nag", 200))
    assert "nag_scale is 200" in refusal(capsys, words)


# --- size, and video files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ([], (640, 608)),
        (["--image", "wide.png"], (832, 480)),
        (["--end-image", "wide.png"], (832, 480)),
        (["--image", "turned.jpg"], (480, 832)),
        (["--extend", "tall.mp4"], (480, 832)),
        (["--image", "wide.png", "--width", "64", "--height", "32"], (64, 32)),
    ],
)
def test_the_size_is_the_nearest_bucket_of_what_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], size: tuple[int, int]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (160, 90)).save("wide.png")
    lying = Image.new("RGB", (160, 90))
    exif = lying.getexif()
    exif[0x0112] = 6  # as a phone saves it
    lying.save("turned.jpg", exif=exif)
    with VideoWriter("tall.mp4", 30) as writer:
        writer.write(gradient(2, 90, 160))
    options = make_parser().parse_args(["generate", "--model", "m", "--prompt", "p", *flags])
    assert _size(options) == size


def test_an_input_is_not_written_over(
    f1: Files, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes((folder / "short.mp4").read_bytes())
    line = refusal(capsys, arguments(f1, path, "--extend", path))
    assert f"{path} is the file of --extend too" in line


def test_a_changed_video_is_as_long_as_the_given_one(files: Files, folder: Path, tmp_path: Path) -> None:
    words = arguments(files, tmp_path / "a.mp4", "--video", folder / "long.mp4", "--strength", 0, image=False)
    assert main(words) == 0
    assert num_frames(tmp_path / "a.mp4") == 41  # 1.33 s are five sections of 8 frames


def test_one_side_alone_is_refused(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(files, tmp_path / "a.mp4")
    where = words.index("--height")
    assert "--width and --height belong together" in refusal(capsys, words[:where] + words[where + 2 :])


def test_videos_are_read_at_the_wanted_rate_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a video.mp4"
    frames = gradient(20, 64, 32)
    with VideoWriter(path, 15, crf=0) as writer:
        writer.write(frames)
    assert video_size(path) == (64, 32) and video_seconds(path) == pytest.approx(20 / 15, abs=0.01)
    same = read_video(path, 64, 32, 15)
    assert same.shape == frames.shape and (same.int() - frames.int()).abs().float().mean() < 3
    assert len(read_video(path, 64, 32, 30)) == 40
    assert torch.equal(read_video(path, 64, 32, 15, first=7), same[:7])
    last, num_before = read_end(path, 64, 32, 15, last=7)
    assert torch.equal(last, same[-7:]) and num_before == len(same) - 7
    assert torch.equal(torch.cat(list(read_pieces(path, 64, 32, 15, num_frames=8))), same)
    middle = read_video(path, 32, 32, 15)  # the sides are cut off
    assert (middle.int() - frames[:, :, 16:48].int()).abs().float().mean() < 3


@pytest.mark.parametrize("read", [video_size, lambda path: read_video(path, 32, 32, 30)])
def test_what_is_no_video_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "a.mp4").write_text("no video at all")
    with pytest.raises(ValueError, match=r"a\.mp4: cannot be read as a video \(.+\); give an MP4"):
        read(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"gone\.mp4: there is no such video"):
        read(tmp_path / "gone.mp4")


# --- plan ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-size bf16 file that is all header and hole: it takes no room on the disk."""
    path = tmp_path_factory.mktemp("full") / "FramePackI2V_HY_bf16.safetensors"
    header, end = {}, 0
    for name, tensor in FramePackModel(FramePackConfig(), device="meta").state_dict().items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(file.tell() + end)
    return path


def peak(out: str) -> float:
    match = re.search(r"denoise, predicted peak +(\d+\.\d\d) GiB", out)
    assert match is not None
    return float(match[1])


def test_plan_of_a_section(full_size: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(full_size), "--vram-budget", "6"]
    assert main(words) == 0
    out = capsys.readouterr().out
    print(out)
    assert "FramePackI2V_HY_bf16.safetensors: 640x608, sections of 33 frames\nVRAM budget 6.00 GiB\n" in out
    assert peak(out) <= 6 and "of 60 blocks stream" in out
    assert main([*words, "--window", "5", "--width", "480", "--height", "480"]) == 0
    assert "480x480, sections of 17 frames" in capsys.readouterr().out
    assert main([*words, "--blocks-to-swap", "60"]) == 0
    cached = peak(capsys.readouterr().out)
    assert main([*words, "--blocks-to-swap", "60", "--no-teacache"]) == 0
    assert peak(capsys.readouterr().out) < cached, "without the step cache's two tensors"
    moved = []
    for cfg in ("1", "2"):
        assert main([*words, "--blocks-to-swap", "60", "--cfg", cfg]) == 0
        text = capsys.readouterr().out
        moved.append(float(re.search(r"per step: ([\d.]+) GB", text)[1]))  # type: ignore[index]
        assert (peak(text) > cached) == (cfg == "2"), "a step cache for each pass"
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.01)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frames", "5"], "--frames does not apply to FramePack models: FramePack takes --seconds"),
        (["--batch-cfg"], "--batch-cfg does not apply to FramePack models"),
        (["--window", "99"], "latent_window_size is 99; expected 1 to 33"),
        (["--width", "640"], "--width and --height belong together"),
        (["--width", "633", "--height", "608"], "use 640x608"),
        (["--blocks-to-swap", "61"], "blocks_to_swap is 61, but FramePackI2V_HY_bf16.safetensors has 60"),
    ],
)
def test_plan_checks_its_input(
    full_size: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert words in refusal(capsys, ["plan", str(full_size), "--vram-budget", "6", *flags])


def test_plan_names_what_would_fit(full_size: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, ["plan", str(full_size), "--vram-budget", "1.5"])
    assert "640x608, sections of 33 frames does not fit in 1.50 GiB of VRAM" in line
    line = refusal(capsys, ["plan", str(folder / "wan.safetensors"), "--vram-budget", "8", "--window", "5"])
    assert "--window does not apply to Wan models" in line
