"""Save Video (Low VRAM): its files read by PyAV, as ComfyUI reads them, beside core's Save Video."""

from __future__ import annotations

import gc
import json
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import comfy.model_management as mm
import comfy_extras.nodes_video as core_nodes
import folder_paths
import psutil
import pytest
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from lowvram_pack.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE
from lowvram_pack.nodes.decode import DecodeVideo
from lowvram_pack.nodes.save_video import SaveVideo
from lowvram_pack.system.atomic_files import partial_name
from lowvram_pack.video.codecs import available_codecs
from lowvram_pack.video.writer import VideoError, VideoWriter
from lowvram_pack.wanvideo.vae.model import WanVAE
from test_nodes import random_latent, tiny_vae
from torch import Tensor
from torch.nn.functional import avg_pool2d

PROMPT = {"1": {"class_type": "LowVRAMSaveVideo", "inputs": {"text": "a = b; # \\ \n 日本 'q' \"d\""}}}
WORKFLOW = {"nodes": [{"id": 1, "widgets_values": ["ü" * 40000, None, 0.5]}], "version": 0.4}  # beyond Windows' 32 KB
HIDDEN = {io.Hidden.prompt: PROMPT, io.Hidden.extra_pnginfo: {"workflow": WORKFLOW, "other": [1]}}
WIDGETS = {"filename_prefix": "video/Test", "fps": 16.0, "codec": "H.264", "crf": 12, "tile_size": 0}


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny_vae("2.1")


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path / "video"


def told(node: Any, **hidden: Any) -> Any:
    """The node with what ComfyUI gives it of the prompt."""

    class Told(node):  # type: ignore[misc]
        pass

    Told.hidden = io.HiddenHolder.from_dict(hidden or HIDDEN) if hasattr(io, "HiddenHolder") else _holder(hidden)
    return Told


def _holder(hidden: dict[Any, Any]) -> Any:
    from comfy_api.latest._io import HiddenHolder

    return HiddenHolder.from_dict(hidden or HIDDEN)


def save(latent: dict[str, Tensor], vae: Any, node: Any = None, **changes: Any) -> Any:
    return (node or told(SaveVideo)).execute(latent, vae, **(WIDGETS | {"keep_latent": False} | changes))


def read(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])


def shows(path: Path, images: Tensor) -> bool:
    """Whether a file has these pictures; colours of a video are coarser than its pixels, and these are noise."""
    pooled = [avg_pool2d(each.permute(0, 3, 1, 2).float(), 8) for each in (read(path) / 255, images)]
    return pooled[0].shape == pooled[1].shape and float((pooled[0] - pooled[1]).abs().mean()) < 0.02


def tags(path: Path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return dict(container.metadata)


# --- the file --------------------------------------------------------------------------------------------


def test_the_file_is_the_decoded_video_with_its_workflow(vae: Any, output: Path) -> None:
    latent = random_latent()
    done = save(latent, vae)
    path = output / "Test_00001_.mp4"
    assert [each["filename"] for each in done.ui.as_dict()["images"]] == [path.name]
    assert done.ui.as_dict()["images"][0]["subfolder"] == "video" and done.ui.as_dict()["animated"] == (True,)
    images = DecodeVideo.execute(latent, vae, 0, 0, False).result[0]
    assert shows(path, images) and images.shape == (9, 64, 96, 3)
    assert not shows(path, images.flip(0))
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, float(stream.average_rate), stream.frames) == ("h264", 16.0, 9)
    assert {name: json.loads(tags(path)[name]) for name in ("prompt", "workflow", "other")} == {
        "prompt": PROMPT, "workflow": WORKFLOW, "other": [1],
    }  # fmt: skip
    assert done.result[0].get_dimensions() == (96, 64)
    assert float(done.result[0].get_components().frame_rate) == 16


def test_the_tags_are_cores(vae: Any, output: Path) -> None:
    done = save(random_latent(), vae)
    told(core_nodes.SaveVideo).execute(done.result[0], "video/core", "auto", {"codec": "auto"} if _is_new() else "auto")
    core, ours = tags(next(output.glob("core*.mp4"))), tags(output / "Test_00001_.mp4")
    assert {name: core[name] for name in ("prompt", "workflow", "other")} == {
        name: ours[name] for name in ("prompt", "workflow", "other")
    }


def _is_new() -> bool:
    return any(each.id == "format" and not isinstance(each, io.Combo.Input) for each in _core_inputs())


def _core_inputs() -> list[Any]:
    return list(core_nodes.SaveVideo.define_schema().inputs)


def test_disable_metadata(vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "disable_metadata", True)
    save(random_latent(), vae)
    assert not set(tags(output / "Test_00001_.mp4")) & {"prompt", "workflow", "other"}


def test_numbers_go_on_and_nothing_is_replaced(vae: Any, output: Path) -> None:
    output.mkdir()
    (output / "Test_00004_.png").write_bytes(b"a picture of the user's")
    (output / "Test_00002_.mp4").write_bytes(b"a video of the user's")
    save(random_latent(), vae)
    save(random_latent(), vae)
    names = sorted(path.name for path in output.iterdir())
    assert names == ["Test_00002_.mp4", "Test_00004_.png", "Test_00005_.mp4", "Test_00006_.mp4"]
    assert (output / "Test_00002_.mp4").read_bytes() == b"a video of the user's"


def test_a_name_that_somebody_takes_meanwhile_stays_theirs(
    vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VideoWriter.write

    def taken(writer: VideoWriter, frames: Tensor) -> None:
        write(writer, frames)
        (output / "Test_00001_.mp4").write_bytes(b"theirs")

    monkeypatch.setattr(VideoWriter, "write", taken)
    done = save(random_latent(), vae)
    assert (output / "Test_00001_.mp4").read_bytes() == b"theirs"
    assert done.ui.as_dict()["images"][0]["filename"] == "Test_00002_.mp4"
    assert len(read(output / "Test_00002_.mp4")) == 9


def test_what_a_killed_process_left_is_removed_and_its_name_used(vae: Any, output: Path) -> None:
    output.mkdir()
    left = partial_name(output / "Test_00001_.mp4", ".mp4")
    left.write_bytes(b"half a video")
    save(random_latent(), vae)
    assert [path.name for path in output.iterdir()] == ["Test_00001_.mp4"]


@pytest.mark.parametrize("codec", [codec.title for codec in available_codecs()])
def test_every_codec_that_is_offered(vae: Any, output: Path, codec: str) -> None:
    offered = next(each for each in SaveVideo.define_schema().inputs if each.id == "codec")
    assert codec in offered.options
    save(random_latent(), vae, codec=codec, crf=25)
    assert len(read(output / "Test_00001_.mp4")) == 9
    assert json.loads(tags(output / "Test_00001_.mp4")["workflow"]) == WORKFLOW


def test_videos_of_a_batch_are_files_of_their_own_with_their_own_sound(vae: Any, output: Path) -> None:
    latent = {"samples": torch.cat([random_latent()["samples"], -random_latent()["samples"]])}
    time = torch.arange(44100) / 44100
    audio = {"waveform": torch.sin(2 * torch.pi * 440 * time).expand(1, 2, -1), "sample_rate": 44100}
    done = save(latent, vae, audio=audio)
    assert len(done.ui.as_dict()["images"]) == 2
    for index, path in enumerate(sorted(output.glob("*.mp4"))):
        want = DecodeVideo.execute({"samples": latent["samples"][index : index + 1]}, vae, 0, 0, False).result[0]
        assert shows(path, want)
        with av.open(str(path)) as container:
            (stream,) = container.streams.audio
            length = sum(frame.samples for frame in container.decode(audio=0))
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("aac", 44100, 2)
        assert abs(length / 44100 - 9 / 16) < 0.1  # as long as the pictures


@pytest.mark.parametrize("samples", [0, 441])
def test_sound_that_ends_early_or_is_none(vae: Any, output: Path, samples: int) -> None:
    save(random_latent(), vae, audio={"waveform": torch.zeros(1, 1, samples), "sample_rate": 44100})
    with av.open(str(output / "Test_00001_.mp4")) as container:
        assert len(container.streams.audio) == (1 if samples else 0)
        assert len(list(container.decode(video=0))) == 9


def test_framepacks_latents(output: Path) -> None:
    config = replace(HUNYUAN_VAE, block_out_channels=(8, 8, 8, 8), num_groups=8, layers_per_block=1)
    torch.manual_seed(0)
    network = HunyuanVAE(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    class Native:
        first_stage_model, vae_dtype = network, torch.float32

    latent = random_latent(size=(3, 8, 8))
    save(latent, Native(), fps=30.0)
    want = DecodeVideo.execute(latent, Native(), 0, 0, False).result[0]
    assert shows(output / "Test_00001_.mp4", want)


def test_the_latent_is_kept_first(vae: Any, output: Path) -> None:
    save(random_latent(), vae, keep_latent=True)
    assert len(list((output.parent / "latents").glob("*.latent"))) == 1


# --- memory ----------------------------------------------------------------------------------------------


def large_frames(vae: WanVAE, latent: Tensor) -> Any:
    for index in range(latent.shape[2]):
        yield torch.full((1, 3, 4 if index else 1, 256, 256), index / latent.shape[2])


def test_frames_do_not_gather_in_ram(vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory above the process, and the pieces alive at a time, for 41 and for 441 frames."""
    monkeypatch.setattr(WanVAE, "decode_pieces", large_frames)
    process, write, alive = psutil.Process(), VideoWriter.write, list[weakref.ref[Tensor]]()
    peaks = {}

    def watched(writer: VideoWriter, frames: Tensor) -> None:
        write(writer, frames)
        alive.append(weakref.ref(frames))
        if len(alive) % 20 == 0:
            gc.collect()
        assert sum(each() is not None for each in alive) <= 2
        peaks[num_latents] = max(peaks.get(num_latents, 0), process.memory_info().rss)

    monkeypatch.setattr(VideoWriter, "write", watched)
    for num_latents in (10, 11, 111):  # the first has what is made once
        save({"samples": torch.zeros(1, 16, num_latents, 32, 32)}, vae)
    growth = (peaks[111] - peaks[11]) / 2**20
    print(f"400 further frames, 75 MiB as uint8 and 300 as floats: {growth:.1f} MiB of RAM")
    assert growth < 40


def test_an_out_of_memory_on_the_way_repeats_no_frame(vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, failing = WanVAE.decode_pieces, [True]

    def once(vae: WanVAE, latent: Tensor, *rest: Any) -> Any:
        for index, piece in enumerate(decode(vae, latent, *rest)):
            if index == 1 and failing and failing.pop():
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            yield piece

    monkeypatch.setattr(WanVAE, "decode_pieces", once)
    latent = random_latent(size=(3, 18, 8))  # one row of tiles of 128 does not do
    save(latent, vae)
    assert not failing and len(read(output / "Test_00001_.mp4")) == 9


# --- what ends it ----------------------------------------------------------------------------------------


def test_an_interrupt_leaves_nothing(vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = VideoWriter.write, []

    def interrupted(writer: VideoWriter, frames: Tensor) -> None:
        write(writer, frames)
        done.append(len(frames))
        mm.interrupt_current_processing()

    monkeypatch.setattr(VideoWriter, "write", interrupted)
    with pytest.raises(mm.InterruptProcessingException):
        save(random_latent(), vae)
    mm.interrupt_current_processing(False)
    assert done == [1] and list(output.iterdir()) == []


def test_an_encoder_that_dies_leaves_nothing(vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = VideoWriter.write

    def dies(writer: VideoWriter, frames: Tensor) -> None:
        write(writer, frames)
        assert writer._encoder is not None
        writer._encoder.kill()
        writer._encoder.wait()

    monkeypatch.setattr(VideoWriter, "write", dies)
    with pytest.raises(VideoError, match=r"Test_00001_\.mp4: ffmpeg stopped after \d+ frames"):
        save(random_latent(), vae)
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crf": 60}, r"crf is 60; H\.264 takes 0 \(best\) to 51"),
        ({"audio": {"waveform": torch.zeros(1, 9, 100), "sample_rate": 44100}}, "floats of 1 to 8 channels"),
        ({"audio": {"waveform": torch.zeros(1, 2, 100), "sample_rate": 0}}, "0 samples a second"),
    ],
)
def test_what_cannot_be_is_said_before_the_decoding(
    vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(WanVAE, "decode_pieces", None)
    with pytest.raises(ValueError, match=said):
        save(random_latent(), vae, keep_latent=True, **changes)
    assert list(output.parent.iterdir()) == []


def test_a_codec_that_ffmpeg_lacks_is_said_before_the_decoding(
    vae: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecs = sys.modules[available_codecs.__module__]
    monkeypatch.setattr(codecs, "_encoders", lambda program: frozenset({"libx264"}))
    assert next(each for each in SaveVideo.define_schema().inputs if each.id == "codec").options == ["H.264"]
    with pytest.raises(ValueError, match=r"has no libx265, which encodes HEVC: choose H\.264"):
        save(random_latent(), vae, codec="HEVC")


def test_other_vaes_are_named(vae: Any, output: Path) -> None:
    with pytest.raises(ValueError, match=r"Wan 2\.2 VAE"):
        save(random_latent(48), vae)

    class Other:
        first_stage_model = torch.nn.Conv2d(3, 3, 3)

    with pytest.raises(ValueError, match="needs a Wan or HunyuanVideo VAE"):
        save(random_latent(), Other())
    assert not output.exists()


def test_the_widgets_of_the_node() -> None:
    """Saved in workflows: they only ever grow at the end."""
    names = [each.id for each in SaveVideo.define_schema().inputs]
    wanted = "samples vae audio filename_prefix fps codec crf tile_size keep_latent"
    assert names == wanted.split()
    assert re.fullmatch(r"[A-Za-z]+", SaveVideo.define_schema().node_id)
