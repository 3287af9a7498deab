"""The command line from end to end on tiny files, and one clear line for everything that can be wrong."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from lowvram_video.cli.arguments import settings_of
from lowvram_video.cli.main import main, make_parser
from lowvram_video.cli.progress import TerminalProgress
from lowvram_video.vae.frame_watch import BadFrames
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .tiny import save_files, save_vae, save_wan
from .written import unnamed

SMALL = ["--width", "48", "--height", "32", "--frames", "5", "--steps", "2"]
GIB = 2**30
WAN_14B = WanConfig("t2v", 5120, 13824, 40, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tiny files that the tests need, plus a LoRA, a picture and an empty folder."""
    folder = tmp_path_factory.mktemp("files")
    save_files(folder, experts=True)
    for variant in ("i2v", "i2v clip", "flf2v", "ti2v"):
        save_wan(folder / f"wan_{variant.replace(' ', '_')}.safetensors", variant)
    save_vae(folder / "vae22.safetensors", "ti2v")
    save_wan(folder / "wan_4_blocks.safetensors", num_layers=4)
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 128)}
    save_file(lora, folder / "lora.safetensors")
    (folder / "empty").mkdir()
    picture = np.random.default_rng(1).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "cat.png")
    return folder


@pytest.fixture
def files(folder: Path) -> WanFiles:
    return WanFiles(
        folder / "wan_t2v.safetensors", folder / "umt5.safetensors", folder / "vae.safetensors", model_low=None
    )


def arguments(files: WanFiles, output: Path, *more: object, prompt: str = "a red ball moves left") -> list[str]:
    words: list[object] = [
        "generate", "--model", files.model, "--text-encoder", files.text_encoder, "--vae", files.vae,
        "--prompt", prompt, "--output", output, "--device", "cpu", *SMALL, *more,
    ]  # fmt: skip
    if files.model_low:
        words += ["--model-low", files.model_low]
    return [str(word) for word in words]


def num_frames(path: Path) -> int:
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0]


def refusal(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line that a command which must fail prints."""
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as stop:  # how argparse ends
        status = stop.code  # type: ignore[assignment]
    assert status == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1, err
    print(lines[0])
    return lines[0]


# --- generate --------------------------------------------------------------------------------------------


def test_generate_writes_a_video_and_says_what_it_used(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report = tmp_path / "new" / "ball.mp4", tmp_path / "reports" / "ball.json"
    assert main(arguments(files, output, "--report", report)) == 0
    assert num_frames(output) == 5
    out, err = capsys.readouterr()
    assert out.startswith(f"{output}: 5 frames")
    for word in ("encode", "denoise", "decode"):
        assert word in out  # the table
    assert [line.split(":")[0] for line in err.splitlines()] == ["encode", "load", "denoise", "decode"]
    phases = json.loads(report.read_text())["phases"]
    assert [phase["name"] for phase in phases] == ["encode", "denoise", "decode"]
    assert report.with_suffix(".png").stat().st_size > 0
    assert sorted(os.listdir(output.parent)) == ["ball.mp4"]
    assert unnamed(tmp_path, out) == []


def test_generate_takes_every_flag(files: WanFiles, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    flags = "--sampler euler --spacing simple --shift 3 --guidance 2 --guidance-high 3 --boundary 0.9 --batch-cfg"
    machine = "--dtype bf16 --attention sdpa --ram-budget 64 --blocks-to-swap 2 --prefetch 1 --no-pinned --fps 8"
    experts = replace(files, model_low=folder / "wan_low.safetensors")
    assert main(["-v", *arguments(experts, output, *flags.split(), *machine.split(), "--negative-prompt", "cats")]) == 0
    assert next(imageio_ffmpeg.read_frames(str(output)))["fps"] == 8
    lcm = ["--overwrite", "--sampler", "lcm", "--guidance", 1, "--timesteps", "1000,750,500"]
    assert main(arguments(files, output, *lcm)) == 0


def test_a_vram_budget_for_a_processor_is_told_to_be_of_no_matter(caplog: pytest.LogCaptureFixture) -> None:
    words = [
        "generate",
        "--model",
        "a.safetensors",
        "--vae",
        "b.safetensors",
        "--vram-budget",
        "6",
        "--prompt",
        "a cat",
    ]
    for device in ("--device", "--devices"):
        caplog.clear()
        settings_of(make_parser().parse_args([*words, device, "cpu"]))
        (told,) = (record.message for record in caplog.records)
        assert told == "--vram-budget is not heeded on a processor, whose memory is RAM: --ram-budget limits that"
    caplog.clear()
    settings_of(make_parser().parse_args([*words[:5], *words[7:], "--device", "cpu"]))
    assert not caplog.records


def test_what_is_not_read_is_told(files: WanFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unread = ["--timesteps", "1000,500", "--shift", 3, "--guidance", 1, "--negative-prompt", "cats"]
    assert main(arguments(files, tmp_path / "a.mp4", *unread)) == 0
    assert [record.message for record in caplog.records] == [
        "--steps, --shift are not read: --timesteps is the list of all steps",
        "the negative prompt is not read: it takes --guidance other than 1, or --nag",
    ]
    caplog.clear()
    read = ["--timesteps", "1000,500", "--guidance", 2, "--negative-prompt", "cats"]
    words = arguments(files, tmp_path / "b.mp4", *read)
    del words[(place := words.index("--steps")) : place + 2]
    assert main(words) == 0 and not caplog.records


def test_generate_a_video_of_a_picture(files: WanFiles, folder: Path, tmp_path: Path) -> None:
    images = ["--image", folder / "cat.png", "--end-image", folder / "cat.png"]
    i2v = replace(files, model=folder / "wan_i2v.safetensors")
    assert main(arguments(i2v, tmp_path / "a.mp4", *images)) == 0
    ti2v = replace(files, model=folder / "wan_ti2v.safetensors", vae=folder / "vae22.safetensors")
    assert main(arguments(ti2v, tmp_path / "b.mp4", *images[:2], "--width", 64)) == 0
    assert num_frames(tmp_path / "a.mp4") == num_frames(tmp_path / "b.mp4") == 5


def test_sharded_files_work(files: WanFiles, tmp_path: Path) -> None:
    index = save_shards(files.model, tmp_path)
    assert main(arguments(replace(files, model=index), tmp_path / "a.mp4")) == 0
    assert main(arguments(replace(files, model=tmp_path), tmp_path / "b.mp4")) == 0


def save_shards(path: Path, folder: Path) -> Path:
    tensors = sorted(load_file(path).items())
    names = [f"wan-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {}
    for name, shard in zip(names, (dict(tensors[::2]), dict(tensors[1::2])), strict=True):
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = folder / "wan.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


# --- bad files -------------------------------------------------------------------------------------------

SLOTS = ("model", "text_encoder", "vae", "model_low")


@pytest.mark.parametrize(
    ("slot", "given", "words"),
    [
        ("model", "vae", ["this is a Wan VAE", "expected a Wan 2.1 or 2.2 transformer", "load it as the VAE"]),
        ("model", "umt5", ["this is a UMT5 text encoder", "load it as the text encoder"]),
        ("model", "lora", ["this is a LoRA", "load it as a LoRA"]),
        ("model_low", "vae", ["this is a Wan VAE", "load it as the VAE"]),
        (
            "model_low",
            "wan_4_blocks",
            ["its dimensions differ from those of wan_t2v.safetensors", "give the high- and"],
        ),
        ("text_encoder", "wan_t2v", ["this is a Wan transformer", "expected a umt5-xxl encoder", "choose a file"]),
        ("text_encoder", "vae", ["this is a Wan VAE", "expected a umt5-xxl encoder"]),
        ("vae", "wan_t2v", ["is a Wan transformer; expected a Wan VAE", "Choose wan_2.1_vae.safetensors for Wan 2.1"]),
        ("vae", "umt5", ["is a UMT5 text encoder; expected a Wan VAE"]),
        ("vae", "vae22", ["this VAE has 48 latent channels but wan_t2v.safetensors makes 16", "use wan_2.1_vae"]),
    ],
)
def test_a_wrong_file_for_the_slot(
    files: WanFiles,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    slot: str,
    given: str,
    words: list[str],
) -> None:
    path = folder / f"{given}.safetensors"
    line = refusal(capsys, arguments(replace(files, **{slot: path}), tmp_path / "a.mp4"))
    assert line.startswith(f"lowvram-video: {path}")
    for part in words:
        assert part in line
    assert os.listdir(tmp_path) == []


def test_a_wan_21_vae_with_a_48_channel_model(
    files: WanFiles, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ti2v = replace(files, model=folder / "wan_ti2v.safetensors")
    line = refusal(capsys, arguments(ti2v, tmp_path / "a.mp4"))
    assert "this VAE has 16 latent channels but wan_ti2v.safetensors makes 48" in line
    assert "wan2.2_vae.safetensors for TI2V 5B" in line


@pytest.mark.parametrize("slot", SLOTS)
def test_truncated_files(files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], slot: str) -> None:
    whole = (getattr(files, slot) or files.model).read_bytes()
    path = tmp_path / "short.safetensors"
    for size in (len(whole) - 100, 200, 0):
        path.write_bytes(whole[:size])
        line = refusal(capsys, arguments(replace(files, **{slot: path}), tmp_path / "a.mp4"))
        assert line.startswith(f"lowvram-video: {path}: {'a truncated' if size else 'an empty'}")
        assert "download it again" in line
        assert not size or (f"{size:,} bytes; expected" in line)


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.safetensors", "no such file; expected a .safetensors model; check the name and folder"),
        ("empty", "a folder that does not hold just one safetensors model (found: none)"),
        ("cat.png", "the file type '.png' is not known"),
    ],
)
def test_what_is_no_model_file(
    files: WanFiles,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    slot: str,
    name: str,
    words: str,
) -> None:
    line = refusal(capsys, arguments(replace(files, **{slot: folder / name}), tmp_path / "a.mp4"))
    assert f"{folder / name}: {words}" in line


def test_a_missing_shard(files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = save_shards(files.model, tmp_path)
    (tmp_path / "wan-00002-of-00002.safetensors").unlink()
    for path in (index, tmp_path / "wan-00001-of-00002.safetensors"):
        line = refusal(capsys, arguments(replace(files, model=path), tmp_path / "a.mp4"))
        assert "1 of 2 shards are missing: wan-00002-of-00002.safetensors" in line
        assert f"expected all of them in {tmp_path}; download them into that folder" in line


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_more(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("slot", "change", "words"),
    [
        ("model", without("blocks.1.ffn.0.bias"), "lacks 1 tensor (blocks.1.ffn.0.bias) of this Wan transformer"),
        ("model", with_more("blocks.1.extra.weight"), "1 tensor (blocks.1.extra.weight) not known"),
        ("text_encoder", without("encoder.block.1.layer.0.SelfAttention.v.weight"), "SelfAttention.v.weight"),
        ("text_encoder", with_more("encoder.block.1.extra.weight"), "encoder.block.1.extra.weight"),
        ("text_encoder", without("spiece_model"), "spiece.model"),
        ("vae", without("decoder.head.2.bias"), "decoder.head.2.bias of a Wan 2.1 VAE is nothing; expected [3]"),
    ],
)
def test_missing_and_unknown_keys(
    files: WanFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    slot: str,
    change: Callable[[dict[str, Tensor]], None],
    words: str,
) -> None:
    tensors = load_file(getattr(files, slot))
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    line = refusal(capsys, arguments(replace(files, **{slot: path}), tmp_path / "a.mp4"))
    assert line.startswith(f"lowvram-video: {path}")
    assert words in line


def test_models_that_read_clip_features_want_the_model_that_makes_them(
    files: WanFiles, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wan_i2v_clip", "wan_flf2v"):
        model = folder / f"{name}.safetensors"
        line = refusal(capsys, arguments(replace(files, model=model), tmp_path / "a.mp4", "--image", "cat.png"))
        assert f"{model.name} reads CLIP's features of a picture: give --clip-vision, which is clip_vision_h" in line


# --- bad values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frames", "6"], "6 frames cannot be made: Wan makes 4n + 1 frames; use 5 or 9"),
        (["--frames", "0"], "0 frames cannot be made: Wan makes 4n + 1 frames; use 1 or 5"),
        (["--width", "50"], "50x32 cannot be made: this model needs sides that are multiples of 16; use 48x32"),
        (["--height", "0"], "48x0 cannot be made: this model needs sides that are multiples of 16; use 48x16"),
        (["--steps", "0"], "num_steps is 0; at least 1 step is needed"),
        (["--shift", "0"], "shift is 0.0; expected a number above 0"),
        (["--guidance", "nan"], "guidance is nan: use a finite number, such as 5 (1 turns guidance off)"),
        (["--boundary", "2"], "boundary is 2.0: use a sigma between 0 and 1, such as 0.875"),
        (
            ["--guidance-high", "4"],
            "guidance_high is 4.0, for the high-noise expert of Wan 2.2 A14B, but there is only wan_t2v.safetensors: "
            "leave it out, or give the low-noise model too (--model-low)",
        ),
        (["--guidance", "1", "--guidance-high", "1"], "guidance_high is 1.0, for the high-noise expert"),
        (["--boundary", "0.9"], "boundary is 0.9, where the low-noise expert of Wan 2.2 A14B takes over, but there"),
        (["--seed", "-1"], "seed is -1: use a whole number from 0 to"),
        (["--prompt", ""], "the prompt is empty: say what the video shows"),
        (["--prompt", "  "], "the prompt is empty: say what the video shows"),
        (["--timesteps", "500,1000"], "sigmas[0] = 0.5 is followed by 1.0; noise levels must strictly decrease"),
        (["--timesteps", "1,2"], "sigmas[0] = 0.001 is followed by 0.002; noise levels must strictly decrease"),
        (["--timesteps", "1,0.5"], "look like sigmas; timesteps are sigma x 1000"),
        (["--timesteps", "1000,many"], "'1000,many' is no list of numbers such as 1000,750,500,250"),
        (["--timesteps", ""], "'' is no list of numbers"),
        (
            ["--image", "cat.png"],
            "wan_t2v.safetensors is a text-to-video model and takes no picture: leave out cat.png",
        ),
        (["--device", "cuda"], "device 'cuda' cannot be used: "),
        (["--device", "gpu"], "device 'gpu' does not exist: use cpu, cuda or cuda:1"),
        (["--device", "meta"], "device 'meta' is not supported: use cpu or cuda"),
        (["--attention", "sageattn"], "attention_mode sageattn cannot run float32, head dim 128, on cpu: "),
        (["--attention", "flash_attn_2"], "attention_mode flash_attn_2 cannot run"),
        (["--attention", "magic"], "invalid choice: 'magic'"),
        (["--sampler", "magic"], "invalid choice: 'magic'"),
        (["--blocks-to-swap", "9"], "blocks_to_swap is 9, but wan_t2v.safetensors has 3 blocks: use -1 (planned) or 0"),
        (["--vram-budget", "0"], "'0' is no number above 0"),
        (["--vram-budget", "inf"], "'inf' is no number above 0"),
        (["--ram-budget", "lots"], "'lots' is no number above 0"),
        (["--prefetch", "0"], "'0' is no number of blocks from 1 up: one arrives while another computes"),
        (["--ram-budget", "1"], "cannot stream from disk in 1.00 GiB of RAM"),
        (["--fps", "0"], "'0' is no number above 0"),
        (["--width", "wide"], "argument --width: invalid int value: 'wide'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_values(
    files: WanFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(capsys, arguments(files, tmp_path / "a.mp4", *flags))
    assert words in line
    assert "lowvram-video" in line
    assert os.listdir(tmp_path) == []


def test_pictures_are_checked_first(
    files: WanFiles, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    i2v = replace(files, model=folder / "wan_i2v.safetensors")
    assert "makes a video of a picture: give --image" in refusal(capsys, arguments(i2v, tmp_path / "a.mp4"))
    line = refusal(capsys, arguments(i2v, tmp_path / "a.mp4", "--image", "gone.png"))
    assert "gone.png: there is no such picture; give the path of a PNG" in line
    line = refusal(capsys, arguments(i2v, tmp_path / "a.mp4", "--end-image", files.vae))
    assert f"{files.vae}: cannot be read as a picture" in line


@pytest.mark.parametrize("command", ["generate", "report", "demo"])
def test_outputs_that_cannot_be_written(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").touch()

    def words(output: Path) -> list[str]:
        if command == "demo":
            return ["demo", "--output", str(output)]
        if command == "report":
            return arguments(files, tmp_path / "a.mp4", "--report", output)
        return arguments(files, output)

    line = refusal(capsys, words(tmp_path / "file" / "a.mp4"))
    assert f"{tmp_path / 'file' / 'a.mp4'} cannot be written" in line
    assert "choose another output path" in line
    assert f"{tmp_path} is a folder: give a file name such as" in refusal(capsys, words(tmp_path))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("words", [[], ["paint"], ["generate"], ["plan"], ["inspect"], ["plan", "x.safetensors"]])
def test_incomplete_commands(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    line = refusal(capsys, words)
    assert "required" in line or "invalid choice: 'paint'" in line
    command = "" if words in ([], ["paint"]) else f" {words[0]}"
    assert line.startswith(f"lowvram-video{command}: ")
    assert line.endswith(f"; lowvram-video{command} --help shows what there is")


def test_a_flag_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, ["plan", "wan.safetensors", "--vram-budget", "8", "--frame", "5"])
    assert line == (
        "lowvram-video plan: unrecognized arguments: --frame 5, did you mean --frames?; "
        "lowvram-video plan --help shows what there is"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
            "the GPU ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): close what else uses it",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            "the GPU ran out of memory (cuDNN error: CUDNN_STATUS_ALLOC_FAILED): close what else uses it",
        ),
        (MemoryError("could not allocate 9.00 GiB of host memory"), "could not allocate 9.00 GiB of host memory"),
        (MemoryError(), "out of RAM: close other programs"),
        (KeyboardInterrupt(), "interrupted: no frame was made yet"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_ends_a_run_early_is_one_line(
    files: WanFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    words: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lowvram_video.wanvideo.pipeline.WanPipeline._denoise", fail)
    assert main(arguments(files, tmp_path / "a.mp4")) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    *phases, line = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"\w+: \d+\.\d s", phase) for phase in phases)
    assert line.startswith("lowvram-video: ") and words in line
    assert os.listdir(tmp_path) == []


def test_frames_that_are_no_numbers_are_no_video(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def black(*_: object) -> Iterator[Tensor]:
        yield torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
        raise BadFrames("decoded frames have NaN")

    monkeypatch.setattr("lowvram_video.wanvideo.pipeline.WanPipeline.generate", black)
    assert "decoded frames have NaN" in refusal(capsys, arguments(files, tmp_path / "a.mp4"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a single process")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_leaves_a_video_that_plays(files: WanFiles, tmp_path: Path, name: str) -> None:
    output = tmp_path / "a.mp4"
    words = arguments(files, output, "--frames", 2001, "--steps", 1, "--guidance", 1)
    program = "import sys; from lowvram_video.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal sends the signal to the whole group
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background jobs
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not list(tmp_path.glob("a.*.partial.mp4")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    if process.poll() is None:
        os.killpg(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)
    last = err.splitlines()[-1]
    print(last)
    assert process.returncode == 130
    assert "Traceback" not in err
    match = re.fullmatch(
        rf"lowvram-video: interrupted: {re.escape(str(output))} holds the (\d+) frames made so far, "
        rf"all steps are kept in {re.escape(str(tmp_path / 'wan'))}.\w{{16}}; the same command goes on from there",
        last,
    )
    assert match is not None
    assert 0 < num_frames(output) == int(match[1]) < 2001
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "wan"]


def test_a_frame_that_was_written_but_not_counted_is_told(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ctrl-C comes between the two."""
    write = VideoWriter.write

    def interrupted(self: VideoWriter, frames: Tensor) -> None:
        write(self, frames)
        self.num_frames -= 1
        if self.num_frames > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "write", interrupted)
    assert main(arguments(files, tmp_path / "a.mp4", "--frames", 13, "--steps", 1)) == 130
    assert f"a.mp4 holds the {num_frames(tmp_path / 'a.mp4')} frames made so far" in capsys.readouterr().err


def stop_at_step(monkeypatch: pytest.MonkeyPatch, stop_at: int, error: BaseException) -> list[int]:
    """Have the model fail in one of its passes; returns the passes that were made."""
    passes: list[int] = []
    forward = WanModel.forward

    def counted(self: WanModel, *arguments: Any, **named: Any) -> Tensor:
        if len(passes) == stop_at:
            raise error
        passes.append(len(passes))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(WanModel, "forward", counted)
    return passes


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_the_same_command_goes_on_where_it_stopped(
    files: WanFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    assert main(arguments(files, tmp_path / "whole.mp4", "--steps", 4)) == 0
    assert sorted(os.listdir(tmp_path)) == ["whole.mp4"], "nothing is kept of a whole video"
    stop_at_step(monkeypatch, 5, error)
    words = arguments(files, tmp_path / "a.mp4", "--steps", 4)
    assert main(words) != 0
    out, err = capsys.readouterr()
    said = (
        rf"2 steps are kept in {re.escape(str(tmp_path / 'wan'))}.[0-9a-f]{{16}}; the same command goes on from there"
    )
    assert re.search(said, out + err)
    assert sorted(os.listdir(tmp_path)) == ["wan", "whole.mp4"]
    monkeypatch.undo()
    passes = stop_at_step(monkeypatch, 99, error)
    assert main(words) == 0
    assert len(passes) == 4
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "whole.mp4"]


def test_no_resume_keeps_nothing(files: WanFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_step(monkeypatch, 3, KeyboardInterrupt())
    main(arguments(files, tmp_path / "a.mp4", "--no-resume"))
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    stop_at_step(monkeypatch, 3, KeyboardInterrupt())
    main(arguments(files, tmp_path / "a.mp4", "--runs", tmp_path / "kept"))
    assert os.listdir(tmp_path) == ["kept"]


# --- plan ------------------------------------------------------------------------------------------------


def save_sparse(path: Path, config: WanConfig) -> Path:
    """A full-size fp8 file that is all header and hole: it takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in WanModel(config, device="meta").state_dict().items():
        packed = name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2
        size = (1 if packed else 2) * tensor.numel()
        header[name] = {
            "dtype": "F8_E4M3" if packed else "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    data = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(file.tell() + end)
    return path


@pytest.fixture(scope="module")
def wan_14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse(tmp_path_factory.mktemp("14b") / "wan_14b.safetensors", WAN_14B)


def test_plan_shows_where_the_memory_goes(wan_14b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(wan_14b), "--vram-budget", "3.5"]) == 0
    out = capsys.readouterr().out
    print(out)
    assert "wan_14b.safetensors: 832x480, 81 frames\nVRAM budget 3.50 GiB\n" in out
    for row in ("weights outside the blocks", "ring of streamed blocks", "activations", "denoise, predicted peak"):
        assert re.search(rf"{row} +\d+\.\d\d GiB", out)
    peaks = [float(peak) for peak in re.findall(r"predicted peak +(\d+\.\d\d) GiB", out)]
    assert len(peaks) == 2 and max(peaks) <= 3.5
    assert re.search(r"blocks: \d+ resident, \d+ streamed through 2 slots", out)
    assert "of 40 blocks stream" in out
    assert "Times are those of a card with 40 TFLOP/s in products" in out, "no card was measured"


def test_without_triton_a_plan_streams_more(wan_14b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streamed = []
    for words in ([], ["--no-triton"]):
        assert main(["plan", str(wan_14b), "--vram-budget", "11.5", *words]) == 0
        told = re.search(r"blocks: \d+ resident, (\d+) streamed", capsys.readouterr().out)
        assert told is not None
        streamed.append(int(told[1]))
    assert streamed[0] < streamed[1]


@pytest.mark.parametrize("kind", [{"vace_layers": 15, "vace_channels": 96}, {"camera_channels": 24}])
def test_models_that_only_comfyui_can_feed_are_planned(
    kind: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = "vace" if "vace_layers" in kind else "camera"
    channels = {"in_channels": 16} if variant == "vace" else {"in_channels": 32, "image_dim": 1280}
    path = save_sparse(tmp_path / "wan.safetensors", WanConfig(variant, 1536, 8960, 12, 30, **channels, **kind))
    assert main(["plan", str(path), "--vram-budget", "8"]) == 0
    assert "wan.safetensors: 832x480, 81 frames" in capsys.readouterr().out


def test_plan_refuses_what_cannot_be_and_names_what_can(wan_14b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, ["plan", str(wan_14b), "--vram-budget", "2"])
    assert "wan_14b.safetensors at 832x480, 81 frames does not fit in 2.00 GiB of VRAM" in line
    smallest = re.search(r"raise the VRAM budget to at least ([\d.]+)", line)
    frames = re.search(r"make at most (\d+) frames", line)
    assert smallest is not None and frames is not None
    assert main(["plan", str(wan_14b), "--vram-budget", smallest[1]]) == 0
    assert main(["plan", str(wan_14b), "--vram-budget", "2", "--frames", frames[1]]) == 0
    assert main(["plan", str(wan_14b), "--vram-budget", str(float(smallest[1]) - 0.0625)]) == 2


def test_plan_checks_its_input(wan_14b: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(wan_14b), "--vram-budget", "8"]
    assert "82 frames cannot be made" in refusal(capsys, [*words, "--frames", "82"])
    assert "use 832x480" in refusal(capsys, [*words, "--width", "833"])
    assert "blocks_to_swap is 41, but wan_14b.safetensors has 40" in refusal(capsys, [*words, "--blocks-to-swap", "41"])
    assert "cannot stream from disk in 1.00 GiB of RAM" in refusal(capsys, [*words, "--ram-budget", "1"])
    assert "this is a Wan VAE" in refusal(capsys, ["plan", str(folder / "vae.safetensors"), "--vram-budget", "8"])
    assert "gone.json: there is no such profile of a card; give one" in refusal(capsys, [*words, "--card", "gone.json"])


def test_plan_of_other_work(wan_14b: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(wan_14b), "--vram-budget", "8", "--width", "640", "--height", "384", "--frames", "17"]
    assert main([*words, "--cfg-1"]) == 0
    alone = capsys.readouterr().out
    assert main([*words, "--batch-cfg", "--ram-budget", "12", "--blocks-to-swap", "40"]) == 0
    batched = capsys.readouterr().out
    assert "640x384, 17 frames" in alone and "640x384, 17 frames" in batched
    assert "read from the file in every pass" in batched and "read from the file" not in alone
    assert main([*words, "--cfg-1", "--batch-cfg"]) == 0
    assert capsys.readouterr().out == alone, "nothing to batch without guidance"
    assert main(["plan", str(folder / "wan_ti2v.safetensors"), "--vram-budget", "8"]) == 0
    assert "1280x704, 121 frames" in capsys.readouterr().out


# --- inspect ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wan_t2v", ["Wan 2.1 T2V", "16 -> 16 channels, text 32", "text encoder: UMT5", "Wan 2.1 VAE (wan_2.1_vae)"]),
        ("wan_i2v", ["Wan 2.2 I2V", "36 -> 16 channels", "3 blocks"]),
        ("wan_i2v_clip", ["Wan 2.1 I2V", "image 1280", "image encoder: CLIP ViT-H vision"]),
        ("wan_flf2v", ["Wan 2.1 FLF2V", "image 1280 with 514 positions", "CLIP ViT-H"]),
        ("wan_ti2v", ["Wan 2.2 TI2V", "48 -> 48 channels", "Wan 2.2 VAE (wan2.2_vae)"]),
        ("vae", ["Wan 2.1 VAE  (wan vae)", "16 latent channels"]),
        ("vae22", ["Wan 2.2 VAE  (wan vae)", "48 latent channels"]),
        ("umt5", ["UMT5 text encoder  (umt5 encoder)", "width 32, 64 tokens, with its tokenizer", "2 blocks"]),
        ("lora", ["LoRA  (lora)", "rank 4", "the transformer that it was trained on"]),
    ],
)
def test_inspect_says_what_a_file_is(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str]
) -> None:
    path = folder / f"{name}.safetensors"
    assert main(["inspect", str(path)]) == 0
    out, err = capsys.readouterr()
    print(out)
    assert err == ""
    for part in words:
        assert part in out
    tensors = load_file(path)
    sizes = re.findall(r"^  (\w+) +(\w+) +(\d+) tensors", out, re.MULTILINE)
    assert sum(int(count) for _, _, count in sizes) == len(tensors)
    assert re.search(r"^  total +[\d.]+ (B|KiB|MiB)$", out, re.MULTILINE)


def test_inspect_a_full_size_model(wan_14b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(wan_14b)]) == 0
    out = capsys.readouterr().out
    print(out)
    # fp8 matrices: q, k, v, o twice and the feed-forward pair; in bf16 their biases, norms and the modulation
    dim, ffn = WAN_14B.dim, WAN_14B.ffn_dim
    block_bytes = 8 * dim**2 + 2 * dim * ffn + 2 * (8 * dim + (ffn + dim) + 6 * dim + 6 * dim)
    for part in (
        "Wan 2.1 T2V 14B or Wan 2.2 T2V A14B, one of two experts",
        "dim 5120, ffn 13824, 40 heads x 128, 40 blocks, 16 -> 16 channels, text 4096",
        f"per block   {block_bytes / 2**20:.2f} MiB, 40 blocks",
        "text encoder: UMT5-XXL",
        "VAE: Wan 2.1 VAE (wan_2.1_vae)",
        "for Wan 2.2 A14B: both experts",
    ):
        assert part in out
    parts = re.findall(r"^  (embeddings|blocks|head) +(\w+) ", out, re.MULTILINE)
    assert parts == [
        ("embeddings", "bfloat16"), ("blocks", "float8_e4m3fn"), ("blocks", "bfloat16"), ("head", "bfloat16"),
    ]  # fmt: skip


def test_inspect_names_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(2)}, path)
    assert main(["inspect", str(path)]) == 0
    assert "no known model (1 tensor (some.weight))" in capsys.readouterr().out
    path.write_bytes(b"<html>")
    assert f"{path}: this is a web page" in refusal(capsys, ["inspect", str(path)])
    assert "gone.safetensors: no such file" in refusal(capsys, ["inspect", str(tmp_path / "gone.safetensors")])


# --- progress --------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> str:
    progress = TerminalProgress(stream)
    progress.begin("load")
    progress.begin("denoise")
    for done in range(1, 5):
        progress.update(done, 4)
    progress.end()
    progress.end()
    return stream.getvalue()


def test_a_file_gets_one_line_per_phase() -> None:
    assert re.fullmatch(r"load: \d+\.\d s\ndenoise: \d+\.\d s\n", show(io.StringIO()))


def test_a_terminal_gets_a_bar() -> None:
    text = show(Terminal())
    assert "\rdenoise ..." in text
    assert f"denoise [{'#' * 12}{'.' * 12}] 2/4" in text
    assert f"denoise [{'#' * 24}] 4/4" in text
    assert re.search(r"\r *\rdenoise: \d+\.\d s\n$", text)


def test_the_command_line_runs_as_a_module() -> None:
    """Where nothing was installed, as in a portable ComfyUI."""
    command = [sys.executable, "-X", "importtime", "-m", "lowvram_video.cli", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0 and "convert" in ran.stdout, ran.stderr
    assert "lowvram_video.cli.main" in ran.stderr and "matplotlib" not in ran.stderr, "a quarter of the start"
