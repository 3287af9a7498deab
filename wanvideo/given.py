"""The pictures and videos of a request: which of them a model takes, and reading them."""

from __future__ import annotations

from ..video.pictures import from_uint8, load_image
from ..video.reader import read_video
from .clip_vision import FILE_NAME
from .conditioning import Pictures
from .identity import WanFiles
from .network.config import WanConfig
from .request import WanRequest

SOURCE = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"


def check_pictures(request: WanRequest, config: WanConfig, files: WanFiles) -> None:
    """ValueError, before anything is loaded, where a request's pictures do not suit the model."""
    model, picture = files.model.name, request.image or request.end_image
    takes_channels = config.in_channels > config.out_channels
    takes_picture = takes_channels or config.model_type in ("ti2v", "vace")
    steered = config.model_type == "vace" or (config.model_type == "control" and not _from_pictures(config))
    if picture and not takes_picture:
        raise ValueError(f"{model} is a text-to-video model and takes no picture: leave out {picture}")
    if request.end_image and (config.model_type == "ti2v" or (steered and config.model_type != "vace")):
        raise ValueError(f"{model} takes a first frame only: leave out {request.end_image}")
    if request.control is not None and not steered:
        raise ValueError(f"{model} takes no control video: leave out --control, or choose a VACE or Fun Control model")
    if request.reference is not None and not (config.model_type == "vace" or config.reference_channels):
        raise ValueError(f"{model} takes no reference picture: leave out --reference, or choose a VACE model")
    if request.control_strength is not None and config.model_type != "vace":
        raise ValueError(f"{model} has no strength of a control video: leave out --control-strength (it is VACE's)")
    if takes_channels and not picture and not (steered and (request.control or request.reference)):
        if steered:
            raise ValueError(f"{model} is steered by a control video: give --control")
        raise ValueError(f"{model} makes a video of a picture: give --image")
    if config.image_dim and (picture or request.reference) and files.clip_vision is None:
        raise ValueError(
            f"{model} reads CLIP's features of a picture: give --clip-vision, which is {FILE_NAME}; download it from "
            f"{SOURCE} at Hugging Face"
        )


def load_pictures(request: WanRequest) -> Pictures:
    """The pictures and the control video of a completed request, in its size. ValueError where one cannot be read."""
    width, height, num_frames = request.size
    pictures = (request.image, request.end_image, request.reference)
    first, last, reference = (None if path is None else load_image(path, width, height) for path in pictures)
    if request.control is None:
        return Pictures(first, last, reference)
    assert request.control_fps is not None
    video = read_video(request.control, width, height, request.control_fps, first=num_frames)
    whole = (len(video) - 1) // 4 * 4 + 1  # what the VAE takes
    return Pictures(first, last, reference, from_uint8(video[:whole]))


def _from_pictures(config: WanConfig) -> bool:
    """Whether the channels beside the noise are a mask and given frames, as those of image-to-video models."""
    return config.in_channels == 2 * config.out_channels + 4
