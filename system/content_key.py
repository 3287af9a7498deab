"""One name for all that a result depends on: equal settings have equal keys, on every machine."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def run_key(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, in hex: dicts in any order, lists, strings, numbers, booleans, None and tensors.

    Tensors count with dtype, shape and bytes, wherever they are; 1 and 1.0 differ. ValueError names a value of
    another type.
    """
    return hashlib.sha256(json.dumps(_canonical(settings, "settings"), sort_keys=True).encode("ascii")).hexdigest()


def _canonical(value: Any, name: str) -> Any:
    """A JSON value that is another for every other value: lists are marked, so that none looks like a tensor."""
    if isinstance(value, Tensor):
        flat = plain(value).reshape(-1)
        if flat.numel() == 1:  # its stride may be anything
            flat = flat.clone(memory_format=torch.contiguous_format)
        content = flat.view(torch.uint8).numpy()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(content.data).hexdigest()]
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{name} has the key {bad[0]!r}; keys are strings")
        return {key: _canonical(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return ["list", *(_canonical(item, f"{name}[{index}]") for index, item in enumerate(value))]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"{name} is a {type(value).__name__}; what tells runs apart are strings, numbers, booleans, None, lists, "
        "dicts and tensors"
    )


def readable(value: Any, key: str) -> Any:
    """Settings for people who may look into a shared folder: tensors as their type and size, texts as their length.

    `key` makes a text's hash another in every run. Single words that settings are made of stay, but for those under
    the names that prompts go by.
    """
    if isinstance(value, Tensor):
        _, dtype, shape, digest = _canonical(value, "")
        return f"{dtype.removeprefix('torch.')} {shape} {digest[:16]}"
    if isinstance(value, Mapping):
        return {_unread(name, key, WORD): _readable_under(name, item, key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [readable(item, key) for item in value]
    return _unread(value, key, WORD) if isinstance(value, str) else value


WORD = re.compile(r"[\w.+-]{1,80}")  # a sampler, a file, a checksum
NOTHING = re.compile(r"(?!)")
OF_PROMPTS = ("prompt", "prompts", "negative", "negative_prompt", "text", "texts", "timed", "others")


def _readable_under(name: str, value: Any, key: str) -> Any:
    return _without_texts(value, key) if name in OF_PROMPTS else readable(value, key)


def _without_texts(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {
            name if name in FIELDS else _unread(name, key, NOTHING): _without_texts(item, key)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_texts(item, key) for item in value]
    return _unread(value, key, NOTHING) if isinstance(value, str) else readable(value, key)


FIELDS = ("base", "parts", "start", "end", "prompt", "cross_fade")  # of a timed prompt: no texts of the user's


def _unread(text: str, key: str, shown: re.Pattern[str]) -> str:
    if shown.fullmatch(text):
        return text
    digest = hmac.new(key.encode(), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
    return f"text of {len(text)} characters, {digest[:16]}"


def plain(tensor: Tensor) -> Tensor:
    """The tensor in host memory, element after element."""
    return tensor.detach().cpu().contiguous()
