"""Show Video: which file the page shows, and FramePack's film while it grows."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import imageio_ffmpeg
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from lowvram_pack.nodes.bridge import framepack_run, page
from lowvram_pack.nodes.bridge.page import showing_nodes, shown_video
from lowvram_pack.nodes.show_video import ShowVideo

pytestmark = pytest.mark.newest
HIDDEN = SimpleNamespace(
    unique_id="4:2",
    prompt={
        "1": {"class_type": "LowVRAMShowVideo", "inputs": {"video": ["4:2", 1]}},
        "2": {"class_type": "LowVRAMShowVideo", "inputs": {"video": ["4:2", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["4:2", 1]}},
        "5:6": {"class_type": "LowVRAMShowVideo", "inputs": {"video": ["4:2", 1]}},
    },
)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))


def video(frames: int = 5) -> Any:
    images = torch.rand(frames, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(8)))


def test_a_video_of_the_output_folder_is_shown_where_it_is() -> None:
    path = Path(folder_paths.output_directory) / "video" / "film_00001_.mp4"
    path.parent.mkdir()
    video().save_to(str(path))
    done = ShowVideo.execute(InputImpl.VideoFromFile(str(path)))
    (shown,) = done.ui.as_dict()["images"]
    assert (shown["filename"], shown["subfolder"], shown["type"]) == ("film_00001_.mp4", "video", "output")
    assert done.result[0].get_stream_source() == str(path)
    assert not list(Path(folder_paths.temp_directory).iterdir())


def test_another_video_is_shown_from_the_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    elsewhere = tmp_path / "input" / "film.mp4"
    video(7).save_to(str(elsewhere))
    for given, frames in ((video(5), 5), (InputImpl.VideoFromFile(str(elsewhere)), 7)):
        shown = shown_video(given)
        path = Path(folder_paths.temp_directory) / shown.filename
        assert (shown.subfolder, shown.type.value) == ("", "temp")
        assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == frames


def test_the_nodes_that_show_an_output_are_found_inside_subgraphs_too() -> None:
    assert showing_nodes(HIDDEN, 1) == ["1", "5:6"]
    assert showing_nodes(HIDDEN, 0) == ["2"]
    assert showing_nodes(None, 1) == showing_nodes(SimpleNamespace(prompt=None), 1) == []


@pytest.mark.parametrize("client", ["page", None])
def test_a_film_is_shown_whenever_more_of_it_can_be_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str | None
) -> None:
    told: list[tuple[str, dict[str, Any], str]] = []
    server = SimpleNamespace(client_id=client, last_prompt_id="run", send_sync=lambda *event: told.append(event))
    monkeypatch.setattr(page, "running_server", lambda: server)
    monkeypatch.setattr(framepack_run, "vae_fingerprint", str)
    places = framepack_run.run_places("VAE", False, "video/film", (), ["1", "5:6"])
    assert places.output is not None
    film = places.output(tmp_path / "run", "back")
    for _ in range(3):
        film.add(torch.zeros(6, 32, 48, 3, dtype=torch.uint8), 1)
    assert [event for event, *_ in told] == (["executed"] * len(told))
    assert len(told) == (6 if client else 0), "two nodes, three sections"
    for _, message, receiver in told:
        assert (message["node"] in ("1", "5:6"), message["prompt_id"], receiver) == (True, "run", "page")
        (shown,) = message["output"]["images"]
        assert Path(folder_paths.output_directory, shown["subfolder"], shown["filename"]) == film.video
