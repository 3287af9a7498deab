"""The sizes FramePack was trained on, and the one nearest to a picture's shape."""

from __future__ import annotations

BASE_RESOLUTION = 640
MULTIPLE = 16  # the VAE's 8 times the patch's 2
# (height, width), as in lllyasviel/FramePack `diffusers_helper/bucket_tools.py`
BUCKETS = (
    (416, 960),
    (448, 864),
    (480, 832),
    (512, 768),
    (544, 704),
    (576, 672),
    (608, 640),
    (640, 608),
    (672, 576),
    (704, 544),
    (768, 512),
    (832, 480),
    (864, 448),
    (960, 416),
)


def nearest_bucket(width: int, height: int, base_resolution: int = BASE_RESOLUTION) -> tuple[int, int]:
    """Return the (width, height) in pixels of the bucket with the nearest aspect, both multiples of 16.

    For a base other than 640 the bucket is scaled by base / 640 and rounded to 16. Nearest is meant as in FramePack's
    `find_nearest_bucket`: the least |height * bucket width - width * bucket height|, the taller bucket of two equals.
    Raises ValueError for sizes below 1 and bases below 16.
    """
    if width < 1 or height < 1:
        raise ValueError(f"The picture is {width}x{height} pixels; expected at least 1x1. Check the image input.")
    if base_resolution < MULTIPLE:
        raise ValueError(
            f"base_resolution is {base_resolution}; expected {MULTIPLE} or more (640 is what FramePack was trained on)."
        )
    taller_first = reversed(BUCKETS)
    bucket_height, bucket_width = min(taller_first, key=lambda bucket: abs(height * bucket[1] - width * bucket[0]))
    return _scaled(bucket_width, base_resolution), _scaled(bucket_height, base_resolution)


def _scaled(side: int, base_resolution: int) -> int:
    return max(1, round(side * base_resolution / BASE_RESOLUTION / MULTIPLE)) * MULTIPLE
