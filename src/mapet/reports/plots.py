"""Figures by matplotlib, without pyplot: tensors in, a `Figure` out."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mapet.files import atomic_write
from mapet.models.objectives import Segment
from mapet.reports.render import LOOKS

HIDDEN = 0.88
"""Gray of a patch that is not shown."""
MAX_NUMBERED, MAX_NAMED = 20, 60
"""Classes of a confusion matrix up to which counts are written out, and names."""
SHOWN_CODES, SHOWN_PATCHES = 12, 12
"""Codes of the figure of patches by code, and patches of each, at most."""
INK = "#010203"
"""What matplotlib draws in an SVG and the page shows in its own text color, dark or light."""


# ---- images and patches


def to_picture(image: UInt8[Tensor, "C H W"]) -> Float[np.ndarray, "H W 3"]:
    """Convert to values in 0..1: the first three channels, or gray."""
    channels = image if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return channels[:3].permute(1, 2, 0).float().numpy() / 255


def patchify(images: UInt8[Tensor, "B C H W"], grid: tuple[int, int]) -> UInt8[Tensor, "B N C h w"]:
    """Cut images into patches in row-major order."""
    batch, channels, height, width = images.shape
    h, w = height // grid[0], width // grid[1]
    patches = images.view(batch, channels, grid[0], h, grid[1], w)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels, h, w)


def unpatchify(patches: Float[Tensor, "N C h w"], grid: tuple[int, int]) -> Float[Tensor, "C H W"]:
    """Lay patches together again."""
    _, channels, h, w = patches.shape
    return patches.view(*grid, channels, h, w).permute(2, 0, 3, 1, 4).reshape(channels, grid[0] * h, grid[1] * w)


def mean_patches(
    patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int
) -> Float[Tensor, "V C h w"]:
    """Average the patches of each code; gray for a code without patches."""
    flat = patches.flatten(1).float()
    sums = torch.zeros(vocab_size, flat.shape[1]).index_add_(0, tokens, flat)
    counts = torch.bincount(tokens, minlength=vocab_size)[:, None]
    means = torch.where(counts > 0, sums / counts.clamp_min(1), torch.tensor(HIDDEN * 255))
    return means.view(vocab_size, *patches.shape[1:])


def code_colors(vocab_size: int) -> Float[np.ndarray, "V 3"]:
    """Return a fixed color for each code."""
    return np.random.default_rng(7).uniform(0.05, 1.0, (vocab_size, 3))


def spread_of_codes(counts: Int[Tensor, " V"], most: int) -> Int[Tensor, " n"]:
    """Pick used codes over the range of frequency, most frequent first."""
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    return used[torch.linspace(0, len(used) - 1, min(most, len(used))).round().long()]


# ---- axes


def one_axis(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of one axis; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def montage(
    tiles: Sequence[Sequence[Float[np.ndarray, "h w 3"]]], names: Sequence[str], size: float
) -> tuple[Figure, Axes, list[float]]:
    """Draw rows of named tiles, each 1 x 1 on one axis (matplotlib takes seconds for an axis per tile), with room above.

    Returns:
        the figure, its axis, and the y of each row's center.
    """
    columns, step = max(map(len, tiles)), 1.2
    figure, axis = one_axis(size * columns + 1, size * step * len(tiles) + 0.6)
    centers = [step * row + 0.7 for row in range(len(tiles))]
    for y, row in zip(centers, tiles, strict=True):
        for x, tile in enumerate(row):
            axis.imshow(tile, interpolation="nearest", extent=(x + 0.04, x + 0.96, y + 0.46, y - 0.46))
    axis.set(xlim=(0, columns), ylim=(step * len(tiles) + 0.2, 0), aspect="equal", xticks=[], frame_on=False)
    axis.set_yticks(centers, names, fontsize=7)
    axis.tick_params(length=0)
    return figure, axis, centers


def save_figure(figure: Figure, path: Path) -> None:
    """Write PNG atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


# ---- visual tokens


def plot_code_usage(counts: Int[Tensor, " V"]) -> Figure:
    """Draw the share of patches of each used code, most frequent first, on log axes, beside even use."""
    shares = counts.sort(descending=True).values.double() / counts.sum()
    used = int((counts > 0).sum())
    figure, axis = one_axis(6, 4)
    axis.loglog(np.arange(1, used + 1), shares[:used].numpy(), marker=".", label=f"{used:,} used codes")
    axis.axhline(1 / len(counts), color="gray", linestyle="--", label=f"even use of {len(counts):,}")
    covered = shares.cumsum(0)
    for share, style in ((0.5, ":"), (0.9, "-.")):
        rank = int((covered < share - 1e-12).sum()) + 1
        axis.axvline(rank, color="black", linewidth=0.8, linestyle=style, label=f"{share:.0%} of patches: {rank:,}")
    dead = f"{len(counts) - used:,} of {len(counts):,} dead in {int(counts.sum()):,} patches"
    axis.set(xlabel="code, most frequent first", ylabel="share of patches", title=f"Use of codes ({dead})")
    axis.legend()
    return figure


def plot_patches_by_code(patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int) -> Figure:
    """Draw patches that share a code, for codes spread over the range of frequency."""
    counts = torch.bincount(tokens, minlength=vocab_size)
    chosen = spread_of_codes(counts, SHOWN_CODES)
    tiles = [[to_picture(patch) for patch in patches[tokens == code][:SHOWN_PATCHES]] for code in chosen]
    figure, _, _ = montage(tiles, _with_shares(chosen, counts), size=0.7)
    figure.suptitle("Patches that share a token (code and share of patches)")
    return figure


def plot_nearest_codes(
    prototypes: Float[Tensor, "V C h w"],
    counts: Int[Tensor, " V"],
    codes: Int[Tensor, " n"],
    neighbors: Int[Tensor, "n k"],
    distances: Float[Tensor, "n k"],
) -> Figure:
    """Draw a row a code: its mean patch, then those of the codes with the nearest centroids; an unused code stays gray."""
    order = torch.cat([codes[:, None], neighbors], 1).tolist()
    tiles = [[to_picture(prototypes[code].round().to(torch.uint8)) for code in row] for row in order]
    figure, axis, centers = montage(tiles, _with_shares(codes, counts), size=0.8)
    for y, near, far in zip(centers, neighbors.tolist(), distances.tolist(), strict=True):
        for column, (code, distance) in enumerate(zip(near, far, strict=True), 1):
            axis.text(column + 0.5, y - 0.47, f"{code}: {distance:.2g}", fontsize=6, ha="center", va="bottom")
    figure.suptitle("Mean patches of codes and of their nearest codes (code: distance)", fontsize=9)
    return figure


def _with_shares(codes: Int[Tensor, " n"], counts: Int[Tensor, " V"]) -> list[str]:
    return [f"{code}\n{counts[code] / counts.sum():.1%}" for code in codes.tolist()]


# ---- the model


def plot_maps(
    images: UInt8[Tensor, "B C H W"], maps: Mapping[str, Float[np.ndarray, "B rows columns ..."]], title: str
) -> Figure:
    """Draw each image above its maps, by name: a color a patch, or a value a patch (dark is low)."""
    rows, columns = 1 + len(maps), len(images)
    figure = Figure(figsize=(max(5.0, 1.5 * columns + 1), 1.5 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axis, name in zip(axes[:, 0], ["image", *maps], strict=True):
        axis.set_ylabel(name)
    for column, picture in enumerate(map(to_picture, images)):
        for axis, pixels in zip(axes[:, column], [picture, *(values[column] for values in maps.values())], strict=True):
            axis.imshow(pixels, cmap="inferno", interpolation="nearest")
    figure.suptitle(title)
    return figure


def plot_token_maps(
    images: UInt8[Tensor, "B C H W"], tokens: Int[Tensor, "B N"], grid: tuple[int, int], vocab_size: int
) -> Figure:
    """Draw each image above its token map, one color a token."""
    colors = code_colors(vocab_size)[tokens.view(-1, *grid).numpy()]
    return plot_maps(images, {"tokens": colors}, "Images and their visual tokens (one color a token)")


def plot_attention_mask(mask: Bool[Tensor, "R R"], lengths: Mapping[Segment, int], name: str) -> Figure:
    """Draw the attention mask of an objective: rows attend to the dark columns."""
    figure, axis = one_axis(6, 6)
    axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    edges = np.cumsum([0, *lengths.values()])
    for edge in edges[1:-1]:
        axis.axhline(edge - 0.5, color="black", linewidth=0.8)
        axis.axvline(edge - 0.5, color="black", linewidth=0.8)
    labels = [f"{segment}\n({length})" for segment, length in lengths.items()]
    axis.set_xticks((edges[1:] + edges[:-1]) / 2 - 0.5, labels)
    axis.set_yticks((edges[1:] + edges[:-1]) / 2 - 0.5, labels)
    axis.set(xlabel="is attended to", ylabel="attends")
    about = "the context includes the class token; query columns are never attended to"
    axis.set_title(f"Attention mask of '{name}'\n{about}", fontsize=9)
    return figure


def plot_predictions(
    images: UInt8[Tensor, "B C H W"],
    tokens: Int[Tensor, "B N"],
    permutation: Int[Tensor, "B N"],
    logits: Float[Tensor, "B p V"],
    prototypes: Float[Tensor, "V C h w"],
    grid: tuple[int, int],
) -> Figure:
    """Draw what the model predicts for masked patches in a given order, tokens as their mean patch.

    Rows: the image; the context patches alone; the order of prediction; the true tokens; the likeliest tokens; the probability of
    the true token, from 0 (black) to the largest shown.
    """
    num_context, row = permutation.shape[1] - logits.shape[1], torch.arange(len(images))[:, None]
    given, masked = permutation[:, :num_context], permutation[:, num_context:]
    chance = logits.float().softmax(-1).gather(2, tokens[row, masked][..., None])[..., 0]
    largest = float(chance.max())  # of thousands of tokens even a likely one has a small probability
    truth = prototypes[tokens]
    context = torch.full_like(truth, HIDDEN * 255)
    context[row, given] = patchify(images, grid)[row, given].float()
    predicted = context.clone()
    predicted[row, masked] = prototypes[logits.argmax(-1)]
    rank, probability = torch.full((2, *permutation.shape), float("nan"))
    rank[row, masked], probability[row, masked] = torch.arange(masked.shape[1]).float(), chance

    def pictures(patches: Float[Tensor, "B N C h w"]) -> Float[np.ndarray, "B H W 3"]:
        return np.stack([to_picture(unpatchify(one.round().to(torch.uint8), grid)) for one in patches])

    maps = {
        "context": pictures(context), "order": rank.view(-1, *grid).numpy(), "true tokens": pictures(truth),
        "predicted": pictures(predicted), f"p(true)\n0 to {largest:.2g}": probability.view(-1, *grid).numpy(),
    }  # fmt: skip
    title = "Masked patches, predicted in the order shown (dark first);\ntokens drawn as their mean patch"
    figure = plot_maps(images, maps, title)
    for axis in figure.axes[-len(images) :]:
        axis.images[0].set_clim(0, largest)
    return figure


# ---- evaluation and fine-tuning


def plot_neighbors(rows: Sequence[Sequence[tuple[UInt8[Tensor, "C h w"], str]]], labeled: bool) -> Figure:
    """Draw rows of (image, name): a test image, then the training images nearest to it, best first.

    Args:
        labeled: names are classes; images of the row's first class get a green frame, others a dashed red one.
    """
    tiles = [[to_picture(image) for image, _ in row] for row in rows]
    figure, axis, centers = montage(tiles, [""] * len(rows), size=0.9)
    for y, row in zip(centers, rows, strict=True):
        for x, (_, name) in enumerate(row):
            if labeled and x:
                color, style = ("tab:green", "-") if name == row[0][1] else ("tab:red", "--")
                axis.add_patch(Rectangle((x + 0.04, y - 0.46), 0.92, 0.92, fill=False, ec=color, lw=2.5, ls=style))
            axis.text(x + 0.5, y - 0.49, name[:14], fontsize=7, ha="center", va="bottom", parse_math=False)
    figure.suptitle("Test images (left) and their nearest training images by cosine similarity", fontsize=9)
    return figure


def plot_confusion(counts: Int[np.ndarray, "K K"], classes: Sequence[str]) -> Figure:
    """Draw rows of true classes over columns of predicted ones, as shares of the row; numbers where there is room."""
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = min(12.0, max(4.0, 0.45 * len(classes) + 2))
    figure, axis = one_axis(side, side)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0) if len(classes) <= MAX_NUMBERED else ():
        color = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=color)
    if len(classes) <= MAX_NAMED:
        names = [name[:16].replace("$", r"\$") for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="predicted class", ylabel="true class")
    accuracy = np.trace(counts) / max(1, counts.sum())
    axis.set_title(f"Linear probe: {accuracy:.1%} of {counts.sum():,} images", fontsize=10)
    return figure


def plot_learning_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the mean training loss of each epoch and, where it was measured, the accuracy on the test images."""
    figure, left = one_axis(6, 4)
    right = left.twinx()
    left.set_xlabel("epoch")
    right.set_ylim(0, 1)
    for axis, name, label, color in (
        (left, "loss", "training loss", "tab:blue"),
        (right, "accuracy", "test accuracy", "tab:orange"),
    ):
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        axis.plot([x for x, _ in points], [y for _, y in points], color=color, marker="o" if axis is right else "")
        axis.set_ylabel(label, color=color)
    return figure


# ---- studies


def plot_seeds(
    lines: Sequence[tuple[int, Sequence[tuple[float, float]]]], xlabel: str, ylabel: str, heights: tuple[float, float]
) -> str:
    """Draw the lines of seeds, each with the number of its style, and their mean over the part that all have, as SVG.

    No text of the user's is drawn: matplotlib would read `$` as mathematics and warn of letters that its font lacks.
    """
    colors = dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mapet", **colors}):
        figure, axis = one_axis(4, 2.8)
        for i in sorted({i for i, _ in lines}):
            color, dashes = LOOKS[i % len(LOOKS)]
            seeds = [np.array(line).T for number, line in lines if number == i]
            for x, y in seeds:
                axis.plot(x, y, color=color, linewidth=0.7, alpha=0.4)
            grid = np.unique(np.concatenate([x for x, _ in seeds]))
            grid = grid[(grid >= max(x[0] for x, _ in seeds)) & (grid <= min(x[-1] for x, _ in seeds))]
            mean = np.mean([np.interp(grid, x, y) for x, y in seeds], axis=0)
            axis.plot(grid, mean, color=color, linewidth=2, linestyle=(0, dashes), marker="." if len(grid) == 1 else "")
        low, high = heights
        pad = 0.05 * (high - low) or 0.05
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(low - pad, high + pad))
        axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # nothing that changes from call to call
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return file.getvalue()[file.getvalue().index("<svg") :].replace(INK, "currentColor")
