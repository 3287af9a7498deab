"""FlashVSR once more, in plain fp32 PyTorch after the paper: a whole window of tokens under one dense mask.

It shares no code with the package. Beside the public code (OpenImagingLab/FlashVSR at ccac0ac, its block-sparse kernel
replaced by masked softmax, and Causal_LQ4x_Proj of its version 1.1), random weights of 96 x 3 layers, 37 frames of
256 x 128: the package differs from it by at most 8.8e-6 (version 1.1) and 9.5e-6 (version 1) in -1 ... 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
SIDE = 8


def project(weights: Weights, frames: Tensor, causal: bool) -> list[list[Tensor]]:
    """Tokens of each clip for each layer; `frames [3, T, H, W]`, T = 4n + 1."""
    first = frames[:, :1].expand(-1, 4, -1, -1)
    clips = [first, *frames[:, 1:].split(4, 1)]
    before1: Tensor | None = None
    before2: Tensor | None = None
    made = []
    for number, clip in enumerate(clips):
        x = F.pixel_unshuffle(clip.transpose(0, 1), 16).transpose(0, 1)  # [768, 4, h, w]
        own1 = x[:, -2:]
        x = _causal(weights, "1", x, before1 if causal else own1)
        own2 = x[:, -2:]
        if number:
            y = _causal(weights, "2", x, before2 if causal else own2)
            rows = y.flatten(1).t()
            layers = sorted(name for name in weights if name.startswith("linear_layers") and name.endswith("weight"))
            made.append([F.linear(rows, weights[name], weights[name.replace("weight", "bias")]) for name in layers])
        before1, before2 = own1, own2
    return made


def _causal(weights: Weights, number: str, x: Tensor, before: Tensor | None) -> Tensor:
    x = torch.cat([x[:, :1].expand(-1, 2, -1, -1) if before is None else before, x], 1)
    x = F.pad(x[None], (1, 1, 1, 1, 0, 0), "replicate")
    x = F.conv3d(x, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"], stride=(2, 1, 1))[0]
    x = x / x.norm(dim=0, keepdim=True) * math.sqrt(x.shape[0]) * weights[f"norm{number}.gamma"]
    return F.silu(x)


class Transformer:
    """The network over windows; `kept` are keys and values of each layer, window by window, in the order of grids."""

    def __init__(self, weights: Weights, text: Tensor, num_heads: int, sparse: tuple[int, int], most_kept: int) -> None:
        """`sparse` is (pairs of blocks for a window and head, local range)."""
        self.w, self.heads, (self.pairs, self.range), self.most = weights, num_heads, sparse, most_kept
        self.text = F.linear(
            F.gelu(self._linear("text_embedding.0", text), approximate="tanh"), *self._both("text_embedding.2")
        )
        self.layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.layers)]

    def __call__(self, latent: Tensor, first: int, additions: list[Tensor]) -> Tensor:
        """The velocity of `latent [16, T, h, w]`, whose first frame has place `first`."""
        channels, frames, height, width = latent.shape
        weight = self.w["patch_embedding.weight"]
        x = F.conv3d(latent[None], weight, self.w["patch_embedding.bias"], stride=(1, 2, 2))[0]
        grid = tuple(x.shape[1:])
        x = x.flatten(1).t()
        half = self.w["time_embedding.0.weight"].shape[1] // 2
        angles = 1000.0 * torch.pow(10000.0, -torch.arange(half, dtype=torch.float64) / half)
        time = torch.cat([angles.cos(), angles.sin()]).float()
        time = self._linear("time_embedding.2", F.silu(self._linear("time_embedding.0", time)))
        steer = self._linear("time_projection.1", F.silu(time)).view(6, -1)
        for layer in range(self.layers):
            if layer < len(additions):
                x = x + additions[layer]
            x = self._block(layer, x, steer, grid, first)
        shift, scale = self.w["head.modulation"][0] + time
        x = self._linear("head.head", _norm(x) * (1 + scale) + shift)
        x = x.view(*grid, 1, 2, 2, channels).permute(6, 0, 3, 1, 4, 2, 5)
        return x.reshape(channels, frames, height, width)

    def _block(self, layer: int, x: Tensor, steer: Tensor, grid: tuple[int, ...], first: int) -> Tensor:
        name = f"blocks.{layer}."
        shift1, scale1, gate1, shift2, scale2, gate2 = self.w[name + "modulation"][0] + steer
        normed = _norm(x) * (1 + scale1) + shift1
        q, k = (self._turned(name + "self_attn.", part, normed, grid, first) for part in "qk")
        v = self._linear(name + "self_attn.v", normed).unflatten(1, (self.heads, -1))
        y = self._attend(layer, q, k, v, grid)
        x = x + gate1 * self._linear(name + "self_attn.o", y)
        normed = F.layer_norm(x, x.shape[-1:], *self._both(name + "norm3"), 1e-6)
        cross = name + "cross_attn."
        q = self._rms(cross + "norm_q", self._linear(cross + "q", normed)).unflatten(1, (self.heads, -1))
        k = self._rms(cross + "norm_k", self._linear(cross + "k", self.text)).unflatten(1, (self.heads, -1))
        v = self._linear(cross + "v", self.text).unflatten(1, (self.heads, -1))
        shares = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])).softmax(-1)
        x = x + self._linear(cross + "o", torch.einsum("hqk,khd->qhd", shares, v).flatten(1))
        hidden = F.gelu(self._linear(name + "ffn.0", _norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self._linear(name + "ffn.2", hidden)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Under one mask of tokens; earlier windows come first."""
        rows = 2 * grid[1] * grid[2]
        windows = list(zip(k.split(rows), v.split(rows), strict=True))
        shown = [*self.kept[layer], *windows]
        self.kept[layer] = shown[1:] if len(shown) > self.most else shown
        keys, values = (torch.cat(each) for each in zip(*shown, strict=True))
        block = self._blocks(grid)  # of a window's tokens
        count = int(block.max()) + 1
        out = []
        for part in q.split(rows):
            keep = self._keep(part, keys, block, count, grid)  # [H, blocks, all blocks]
            of_keys = torch.cat([block + count * number for number in range(len(shown))])
            allowed = keep[:, block][:, :, of_keys]
            scores = torch.einsum("qhd,khd->hqk", part, keys) / math.sqrt(q.shape[2])
            shares = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0)
            out.append(torch.einsum("hqk,khd->qhd", shares, values).flatten(1))
        return torch.cat(out)

    def _keep(self, q: Tensor, keys: Tensor, block: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:
        def means(x: Tensor) -> Tensor:
            parts = [part[block == number].mean(0) for part in x.split(len(block)) for number in range(count)]
            return torch.stack(parts)  # [blocks, H, D]

        scores = torch.einsum("qhd,khd->hqk", means(q), means(keys)) / math.sqrt(q.shape[2])
        across = grid[2] // SIDE
        place = torch.arange(count)
        row, column = place // across, place % across
        reach, more = self.range // 2, self.range - self.range // 2 - 1
        near = torch.ones(count, count, dtype=torch.bool)
        for along in (row, column):
            away = along[None] - along[:, None]
            near &= (away >= -reach) & (away <= more)
        scores = scores.masked_fill(~near.repeat(1, scores.shape[2] // count), -math.inf).softmax(-1)
        flat = scores.flatten(1)
        least = flat.sort(1, descending=True).values[:, min(self.pairs, flat.shape[1] - 1)]
        return scores > least[:, None, None]

    def _blocks(self, grid: tuple[int, ...]) -> Tensor:
        """The block of each token of two frames, in the order of the grid."""
        down, across = torch.arange(grid[1]) // SIDE, torch.arange(grid[2]) // SIDE
        of_frame = down[:, None] * (grid[2] // SIDE) + across[None]
        return of_frame.flatten().repeat(2)

    def _turned(self, name: str, part: str, x: Tensor, grid: tuple[int, ...], first: int) -> Tensor:
        x = self._rms(f"{name}norm_{part}", self._linear(name + part, x)).unflatten(1, (self.heads, -1))
        size = x.shape[2]
        third = 2 * (size // 6)
        t, h, w = (each.flatten() for each in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        angles = []
        for place, dim in ((t + first, size - 2 * third), (h, third), (w, third)):
            speed = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles.append(place[:, None] * speed)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, 1))[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(2, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(2).float()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self._both(name))

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        return self.w[name + ".weight"], self.w[name + ".bias"]

    def _rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[name + ".weight"]


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def decode(weights: Weights, latent: Tensor, shown: Tensor) -> Tensor:
    """All frames `[3, T, H, W]` at once of `latent [16, T', h, w]` and the small frames `shown [3, T, H, W]`."""
    missing = 4 * latent.shape[1] - shown.shape[1]
    pixels = torch.cat([shown[:, :1].expand(-1, missing, -1, -1), shown], 1).unflatten(1, (-1, 4))  # [3, t, 4, H, W]
    beside = F.pixel_unshuffle(pixels.permute(1, 0, 2, 3, 4).flatten(1, 2), 8)
    x = torch.tanh(torch.cat([beside, latent.transpose(0, 1)], 1) / 3) * 3
    x = _conv(weights, 1, x).relu()
    x = _conv(weights, 3, x).relu()
    for first, grown in ((5, 1), (11, 2), (17, 2)):
        for index in range(first, first + 3):
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            for number in (0, 2, 4):
                y = _conv(weights, f"{index}.conv.{number}", y)
                y = y.relu() if number < 4 else y
            x = (x + y).relu()
        x = F.interpolate(x, scale_factor=2)
        channels = x.shape[1]
        x = _conv(weights, f"{first + 4}.conv", x, 0).reshape(len(x) * grown, channels, *x.shape[2:])
        x = _conv(weights, first + 5, x)
    x = _conv(weights, 24, x.relu()).relu()
    return _conv(weights, 26, x)[3:].transpose(0, 1)


def _conv(weights: Weights, index: int | str, x: Tensor, padding: int = 1) -> Tensor:
    name = f"decoder.{index}"
    return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)


def recolour(made: Tensor, small: Tensor) -> Tensor:
    """Frames `[3, T, H, W]` with each channel's mean and deviation of the small ones."""
    dims = (2, 3)
    mean, std = made.mean(dims, keepdim=True), (made.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
    wanted_mean = small.mean(dims, keepdim=True)
    wanted_std = (small.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (made - mean) / std * wanted_std + wanted_mean
