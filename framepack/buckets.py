"""The sizes FramePack was trained on, and the one nearest to a picture's shape."""

from __future__ import annotations

BASE_RESOLUTION = 640
MULTIPLE = 16  # the VAE's 8 times the patch's 2
# as in lllyasviel/FramePack `diffusers_helper/bucket_tools.py`: the n-th height goes with the n-th width from the end
SIDES = (416, 448, 480, 512, 544, 576, 608, 640, 672, 704, 768, 832, 864, 960)
BUCKETS = tuple(zip(SIDES, reversed(SIDES), strict=True))  # (height, width)


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
