"""What a video of the command line says of itself, and drafts by a tiny decoder."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.cli.main import main, make_parser
from lowvram_video.cli.output import command_key
from lowvram_video.cli.settings_tag import settings_tags
from lowvram_video.vae.tiny import TINY_16, TINY_48, TinyVAE
from safetensors.torch import save_file
from torch import nn

from .test_cli import arguments, files, folder, num_frames, refusal  # noqa: F401
from .test_video_streams import boxes_of, tags_of

WORDS = ["generate", "--model", "/secret place/wan_t2v.safetensors", "--prompt", "a hidden wish", "--seed", "7"]
MORE = ["--negative-prompt", "nobody", "--lora", "/secret place/style.safetensors:0.5", "-o", "/secret place/a.mp4"]


def parsed(*more: str) -> argparse.Namespace:
    return make_parser().parse_args([*WORDS, *MORE, *more])


def test_settings_have_no_prompt_and_no_folder() -> None:
    (comment,) = settings_tags(parsed("--vram-budget", "6")).values()
    told = json.loads(comment)
    assert told["model"] == "wan_t2v.safetensors" and told["lora"] == ["style.safetensors:0.5"]
    assert (told["seed"], told["vram_budget"], told["program"]) == (7, 6.0, "lowvram-video")
    assert not any(word in comment for word in ("hidden wish", "nobody", "secret place"))


def test_zeros_are_settings_and_flags_that_were_not_given_are_none() -> None:
    told = json.loads(settings_tags(parsed("--seed", "0", "--shift", "0"))["comment"])
    assert (told["seed"], told["shift"]) == (0, 0.0)
    assert not {"no_pinned", "lora_low", "steps"} & set(told)


def test_prompts_are_told_where_that_is_asked_for() -> None:
    told = json.loads(settings_tags(parsed("--metadata", "prompt"))["comment"])
    assert (told["prompt"], told["negative_prompt"]) == ("a hidden wish", "nobody")


def test_nothing_is_told_where_that_is_asked_for() -> None:
    assert settings_tags(parsed("--metadata", "none")) == {}


def test_a_run_goes_on_whatever_its_video_tells() -> None:
    assert command_key(parsed("--metadata", "none")) == command_key(parsed())


def test_a_video_has_its_settings(files, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "a.mp4"
    assert main(arguments(files, output, "--seed", 3)) == 0
    told = json.loads(tags_of(output)["comment"])
    assert told["model"] == files.model.name and (told["width"], told["frames"], told["seed"]) == (48, 5, 3)
    assert boxes_of(output).index("moov") < boxes_of(output).index("mdat")
    assert main(arguments(files, output, "--overwrite", "--metadata", "none")) == 0
    assert tags_of(output) == {}


# --- drafts ----------------------------------------------------------------------------------------------


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vae = TinyVAE(replace(TINY_16, widths=(16, 8, 8, 8)))
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_file({name: each.contiguous() for name, each in vae.state_dict().items()}, tmp_path / "taew2_1.safetensors")
    return tmp_path / "taew2_1.safetensors"


def test_a_draft_by_a_tiny_decoder(files, decoder: Path, tmp_path: Path) -> None:  # noqa: F811
    assert main(arguments(files, tmp_path / "whole.mp4")) == 0
    assert main(arguments(files, tmp_path / "draft.mp4", "--decoder", decoder)) == 0
    assert num_frames(tmp_path / "draft.mp4") == num_frames(tmp_path / "whole.mp4") == 5
    assert (tmp_path / "draft.mp4").read_bytes() != (tmp_path / "whole.mp4").read_bytes()


def test_decoders_that_do_not_fit(
    files,  # noqa: F811
    decoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal(capsys, arguments(files, tmp_path / "a.mp4", "--decoder", files.vae))
    assert "a Wan VAE; expected a tiny decoder" in said
    other = tmp_path / "taew2_2.safetensors"
    torch.manual_seed(0)
    vae = TinyVAE(replace(TINY_48, widths=(16, 8, 8, 8)))
    save_file({name: each.contiguous() for name, each in vae.state_dict().items()}, other)
    said = refusal(capsys, arguments(files, tmp_path / "a.mp4", "--decoder", other))
    assert "a tiny decoder of 48 latent channels" in said and "need taew2_1.safetensors" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taew2_1.safetensors", "taew2_2.safetensors"]
