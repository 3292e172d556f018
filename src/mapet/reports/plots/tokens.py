"""Figures of visual tokens: token maps, how often each code comes, what patches of a code look like."""

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from mapet.reports.plots.base import HIDDEN, grid_of_axes, montage, one_axis, show, to_picture


def code_colors(vocab_size: int) -> Float[np.ndarray, "V 3"]:
    """Return a fixed colour for each code."""
    return np.random.default_rng(7).uniform(0.05, 1.0, (vocab_size, 3))


def plot_token_maps(
    images: UInt8[Tensor, "B C H W"], tokens: Int[Tensor, "B N"], grid: tuple[int, int], vocab_size: int
) -> Figure:
    """Draw each image above its token map, one colour a token."""
    colors = code_colors(vocab_size)
    figure, axes = grid_of_axes(["image", "tokens"], len(images))
    for column, (image, ids) in enumerate(zip(images, tokens, strict=True)):
        show(axes[0][column], to_picture(image))
        show(axes[1][column], colors[ids.view(grid).numpy()])
    figure.suptitle("Images and their visual tokens (one colour a token)")
    return figure


def plot_code_usage(counts: Int[Tensor, " V"]) -> Figure:
    """Draw the share of patches of each used code, most frequent first, on log axes, beside even use."""
    shares = counts.sort(descending=True).values.double() / counts.sum()
    used = int((counts > 0).sum())
    figure, axis = one_axis(6, 4)
    axis.loglog(np.arange(1, used + 1), shares[:used].numpy(), marker=".", label=f"{used:,} used codes")
    axis.axhline(1 / len(counts), color="grey", linestyle="--", label=f"even use of {len(counts):,}")
    covered = shares.cumsum(0)
    for share, style in ((0.5, ":"), (0.9, "-.")):
        rank = int((covered < share - 1e-12).sum()) + 1
        axis.axvline(rank, color="black", linewidth=0.8, linestyle=style, label=f"{share:.0%} of patches: {rank:,}")
    dead = f"{len(counts) - used:,} of {len(counts):,} dead in {int(counts.sum()):,} patches"
    axis.set(xlabel="code, most frequent first", ylabel="share of patches", title=f"Use of codes ({dead})")
    axis.legend()
    return figure


def spread_of_codes(counts: Int[Tensor, " V"], most: int) -> Int[Tensor, " n"]:
    """Pick used codes over the range of frequency, most frequent first."""
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    return used[torch.linspace(0, len(used) - 1, min(most, len(used))).round().long()]


def plot_patches_by_code(
    patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int, rows: int = 12, columns: int = 12
) -> Figure:
    """Draw patches that share a code, for codes spread over the range of frequency."""
    counts = torch.bincount(tokens, minlength=vocab_size)
    chosen = spread_of_codes(counts, rows)
    members = [patches[(tokens == code).nonzero().flatten()[:columns]] for code in chosen]
    tiles = [[to_picture(patch) for patch in row] for row in members]
    figure, _, _ = montage(tiles, _with_shares(chosen, counts), size=0.7)
    figure.suptitle("Patches that share a token (code and share of patches)")
    return figure


def plot_nearest_codes(
    prototypes: Float[Tensor, "V C h w"],
    counts: Int[Tensor, " V"],
    codes: Int[Tensor, " n"],
    neighbours: Int[Tensor, "n k"],
    distances: Float[Tensor, "n k"],
) -> Figure:
    """Draw a row a code: its mean patch, then those of the codes with the nearest centroids; an unused code stays grey."""
    order = torch.cat([codes[:, None], neighbours], 1).tolist()
    tiles = [[to_picture(prototypes[code].round().to(torch.uint8)) for code in row] for row in order]
    figure, axis, centres = montage(tiles, _with_shares(codes, counts), size=0.8)
    for y, near, far in zip(centres, neighbours.tolist(), distances.tolist(), strict=True):
        for column, (code, distance) in enumerate(zip(near, far, strict=True), 1):
            axis.text(column + 0.5, y - 0.47, f"{code}: {distance:.2g}", fontsize=6, ha="center", va="bottom")
    figure.suptitle("Mean patches of codes and of their nearest codes (code: distance)", fontsize=9)
    return figure


def mean_patches(
    patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int
) -> Float[Tensor, "V C h w"]:
    """Average the patches of each code; grey for a code without patches."""
    flat = patches.flatten(1).float()
    sums = torch.zeros(vocab_size, flat.shape[1]).index_add_(0, tokens, flat)
    counts = torch.bincount(tokens, minlength=vocab_size)[:, None]
    means = torch.where(counts > 0, sums / counts.clamp_min(1), torch.tensor(HIDDEN * 255))
    return means.view(vocab_size, *patches.shape[1:])


def _with_shares(codes: Int[Tensor, " n"], counts: Int[Tensor, " V"]) -> list[str]:
    return [f"{code}\n{counts[code] / counts.sum():.1%}" for code in codes.tolist()]
