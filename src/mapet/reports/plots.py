"""Figures by matplotlib, without pyplot: tensors in, a `Figure` out."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from mapet.evaluation.imbalance import is_imbalanced
from mapet.files import atomic_write
from mapet.models.objectives import Segment
from mapet.reports.render import LINE_STYLES

HIDDEN_GRAY = 0.88
"""Gray level, 0 (black) to 1, of a masked patch, and of the mean patch of a code without patches."""
MAX_COUNTED_CLASSES, MAX_NAMED_CLASSES = 20, 60
"""Classes of a confusion matrix up to which counts, and names, are written out."""
NUM_CODES_SHOWN, NUM_PATCHES_SHOWN = 12, 12
"""Rows of the figures of codes, and patches of a code."""
SVG_INK = "#010203"
"""Color of axes in an SVG, a placeholder for the page's text color, dark or light."""


# ---- images and patches


def to_rgb(image: UInt8[Tensor, "C H W"]) -> Float[np.ndarray, "H W 3"]:
    """Return the first three channels of an image (0..255) as values in 0..1; with fewer than three, the first one as gray."""
    channels = image if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return channels[:3].permute(1, 2, 0).float().numpy() / 255


def to_image(pixels: UInt8[Tensor, "C H W"]) -> Image.Image:
    """Convert pixels, 0..255, to an RGB image: the first three channels; with fewer than three, the first one as gray."""
    return Image.fromarray((255 * to_rgb(pixels)).round().astype(np.uint8))


def patchify(images: UInt8[Tensor, "B C H W"], grid: tuple[int, int]) -> UInt8[Tensor, "B N C h w"]:
    """Cut images into patches, in row-major order; `grid` has rows and columns."""
    batch, channels, height, width = images.shape
    h, w = height // grid[0], width // grid[1]
    patches = images.view(batch, channels, grid[0], h, grid[1], w)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels, h, w)


def unpatchify(patches: Float[Tensor, "N C h w"], grid: tuple[int, int]) -> Float[Tensor, "C H W"]:
    """Assemble an image from its patches, which are in row-major order; `grid` has rows and columns."""
    _, channels, h, w = patches.shape
    return patches.view(*grid, channels, h, w).permute(2, 0, 3, 1, 4).reshape(channels, grid[0] * h, grid[1] * w)


def mean_patches(
    patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int
) -> Float[Tensor, "V C h w"]:
    """Return the mean of the patches that have each code as their token, 0..255; `HIDDEN_GRAY` for a code without patches.

    Args:
        patches: pixels of n patches.
        tokens: code of each patch, 0 to V - 1.
        vocab_size: V.
    """
    flat = patches.flatten(1).float()
    sums = torch.zeros(vocab_size, flat.shape[1]).index_add_(0, tokens, flat)
    counts = torch.bincount(tokens, minlength=vocab_size)[:, None]
    means = torch.where(counts > 0, sums / counts.clamp_min(1), torch.tensor(HIDDEN_GRAY * 255))
    return means.view(vocab_size, *patches.shape[1:])


def code_colors(vocab_size: int) -> Float[np.ndarray, "V 3"]:
    """Return a random RGB color (0..1) for each code, the same in every figure; none is nearly black."""
    return np.random.default_rng(7).uniform(0.05, 1.0, (vocab_size, 3))


def sample_codes_by_usage(counts: Int[Tensor, " V"]) -> Int[Tensor, " n"]:
    """Pick up to `NUM_CODES_SHOWN` used codes, evenly spaced from the most frequent code (first) to the least frequent one.

    Args:
        counts: patches of each code; a code without patches is not picked.
    """
    used_codes = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    return used_codes[torch.linspace(0, len(used_codes) - 1, min(NUM_CODES_SHOWN, len(used_codes))).round().long()]


# ---- axes


def one_axis(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of this width and height, in inches, and its one axis."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


class Tile(NamedTuple):
    """A small image in a figure of rows of images.

    Attributes:
        image: pixels, 0..255.
        title: text above it; '' for none.
        frame: matplotlib color and line style of its frame, e.g. ('tab:red', '--'); None for no frame.
    """

    image: UInt8[Tensor, "C h w"]
    title: str = ""
    frame: tuple[str, str] | None = None


def plot_tiles(rows: Sequence[Sequence[Tile]], row_labels: Sequence[str], tile_inches: float, title: str) -> Figure:
    """Draw rows of small images, left to right, the first row at the top.

    All are drawn on one axis, because matplotlib takes seconds for an axis per tile. In units of this axis a tile is 1 x 1, with its
    margin; y grows downward.

    Args:
        rows: tiles of each row; rows may differ in length.
        row_labels: text to the left of each row.
        tile_inches: width of a tile.
        title: of the figure.

    Returns:
        The figure.
    """
    num_columns, row_height = max(map(len, rows)), 1.2  # with room for the title above a tile
    figure, axis = one_axis(tile_inches * num_columns + 1, tile_inches * row_height * len(rows) + 0.6)
    centers = [row_height * index + 0.7 for index in range(len(rows))]
    for y, row in zip(centers, rows, strict=True):
        for x, tile in enumerate(row):
            extent = (x + 0.04, x + 0.96, y + 0.46, y - 0.46)  # left, right, bottom, top: a square of 0.92
            axis.imshow(to_rgb(tile.image), interpolation="nearest", extent=extent)
            axis.text(x + 0.5, y - 0.49, tile.title, fontsize=7, ha="center", va="bottom", parse_math=False)
            if tile.frame:
                color, style = tile.frame
                axis.add_patch(Rectangle((x + 0.04, y - 0.46), 0.92, 0.92, fill=False, ec=color, lw=2.5, ls=style))
    axis.set(xlim=(0, num_columns), ylim=(row_height * len(rows) + 0.2, 0), aspect="equal", xticks=[], frame_on=False)
    axis.set_yticks(centers, row_labels, fontsize=7)
    axis.tick_params(length=0)
    figure.suptitle(title, fontsize=9)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, at 150 dpi."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


# ---- visual tokens


def plot_code_usage(counts: Int[Tensor, " V"]) -> Figure:
    """Draw the fraction of patches that have each used code, most frequent code first, on log-log axes.

    A horizontal line marks uniform use, 1 / V; vertical lines mark how many of the most frequent codes cover 50 % and 90 % of the
    patches; the title counts the dead codes (codes that no patch has).

    Args:
        counts: number of patches of each code.
    """
    fractions = counts.sort(descending=True).values.double() / counts.sum()
    num_used = int((counts > 0).sum())
    figure, axis = one_axis(6, 4)
    axis.loglog(np.arange(1, num_used + 1), fractions[:num_used].numpy(), marker=".", label=f"{num_used:,} used codes")
    axis.axhline(1 / len(counts), color="gray", linestyle="--", label=f"uniform use of {len(counts):,}")
    covered = fractions.cumsum(0)
    for target, style in ((0.5, ":"), (0.9, "-.")):
        num_codes = int((covered < target - 1e-12).sum()) + 1  # 1e-12: rounding of the cumulative sum
        label = f"{target:.0%} of patches: {num_codes:,}"
        axis.axvline(num_codes, color="black", linewidth=0.8, linestyle=style, label=label)
    dead = f"{len(counts) - num_used:,} of {len(counts):,} dead in {int(counts.sum()):,} patches"
    axis.set(xlabel="code, most frequent first", ylabel="fraction of patches", title=f"Use of codes ({dead})")
    axis.legend()
    return figure


def plot_patches_by_code(patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int) -> Figure:
    """Draw a row of patches that share a code, for `NUM_CODES_SHOWN` codes from frequent to rare.

    Args:
        patches: pixels of n patches, 0..255; the first `NUM_PATCHES_SHOWN` of a code are drawn.
        tokens: code of each patch.
        vocab_size: V.
    """
    counts = torch.bincount(tokens, minlength=vocab_size)
    codes = sample_codes_by_usage(counts)
    rows = [[Tile(patch) for patch in patches[tokens == code][:NUM_PATCHES_SHOWN]] for code in codes]
    title = "Patches that share a token (code and fraction of patches)"
    return plot_tiles(rows, _label_codes(codes, counts), 0.7, title)


def plot_nearest_codes(
    prototypes: Float[Tensor, "V C h w"], counts: Int[Tensor, " V"], codes: Int[Tensor, " n"], neighbors: Int[Tensor, "n k"],
    distances: Float[Tensor, "n k"],
) -> Figure:  # fmt: skip
    """Draw a row for each of `codes`: its mean patch, then the mean patches of the k other codes with the nearest centroids.

    Args:
        prototypes: mean patch of each code, 0..255; gray for a code without patches.
        counts: number of patches of each code, for the row labels.
        codes: codes that get a row.
        neighbors: the k codes nearest to each of `codes`, nearest first.
        distances: Euclidean distances of their centroids, in the space of features; they stand above the tiles.
    """

    def tile(code: int, title: str = "") -> Tile:
        """Return the mean patch of a code as a tile."""
        return Tile(prototypes[code].round().to(torch.uint8), title)

    rows = []
    for code, nearest, far in zip(codes.tolist(), neighbors.tolist(), distances.tolist(), strict=True):
        titles = [f"{neighbor}: {distance:.2g}" for neighbor, distance in zip(nearest, far, strict=True)]
        rows.append([tile(code), *map(tile, nearest, titles)])
    title = "Mean patches of codes and of their nearest codes (code: distance)"
    return plot_tiles(rows, _label_codes(codes, counts), 0.8, title)


def _label_codes(codes: Int[Tensor, " n"], counts: Int[Tensor, " V"]) -> list[str]:
    """Return a row label for each of `codes`: the code above its fraction of all patches, '17\\n3.2%'; `counts` are patches per code."""
    return [f"{code}\n{counts[code] / counts.sum():.1%}" for code in codes.tolist()]


# ---- the model


def plot_maps(
    images: UInt8[Tensor, "B C H W"], maps: Mapping[str, Float[np.ndarray, "B rows columns ..."]], title: str
) -> Figure:
    """Draw a column for each of B images: the image above its maps, a row for each kind of map.

    Args:
        images: pixels, 0..255.
        maps: row label -> one map per image, of any number of rows and columns: RGB colors (..., 3) in 0..1, or values (dark is low;
            each map has its own color scale; NaN stays blank).
        title: of the figure.
    """
    num_rows, num_columns = 1 + len(maps), len(images)
    size = max(5.0, 1.5 * num_columns + 1), 1.5 * num_rows + 0.6
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    rows = {"image": np.stack([to_rgb(image) for image in images]), **maps}
    for row_axes, (label, cells) in zip(axes, rows.items(), strict=True):
        row_axes[0].set_ylabel(label)
        for axis, cell in zip(row_axes, cells, strict=True):
            axis.imshow(cell, cmap="inferno", interpolation="nearest")
    figure.suptitle(title)
    return figure


def plot_token_maps(
    images: UInt8[Tensor, "B C H W"], tokens: Int[Tensor, "B N"], grid: tuple[int, int], vocab_size: int
) -> Figure:
    """Draw each image above its token map: a cell per patch, in the color of the patch's token.

    Args:
        tokens: token ids of the N = rows * columns patches, row-major, less than `vocab_size`.
        grid: rows and columns of patches.
    """
    colors = code_colors(vocab_size)[tokens.view(-1, *grid).numpy()]
    return plot_maps(images, {"tokens": colors}, "Images and their visual tokens (one color per token)")


def plot_attention_mask(mask: Bool[Tensor, "R R"], lengths: Mapping[Segment, int], name: str) -> Figure:
    """Draw the attention mask of a pre-training objective, with lines between the segments of the packed sequence.

    The packed sequence of an objective has the segments context, target, mask, query (or some of them), one after the other.

    Args:
        mask: true (dark) where the row's token attends to the column's token.
        lengths: number of tokens of each segment, in the order of rows and columns; they sum up to R.
        name: of the objective, for the title.
    """
    figure, axis = one_axis(6, 6)
    axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")  # 1 is blue, not nearly black
    edges = np.cumsum([0, *lengths.values()])
    for edge in edges[1:-1]:
        axis.axhline(edge - 0.5, color="black", linewidth=0.8)
        axis.axvline(edge - 0.5, color="black", linewidth=0.8)
    centers, labels = (edges[1:] + edges[:-1]) / 2 - 0.5, [f"{name}\n({length})" for name, length in lengths.items()]
    axis.set_xticks(centers, labels)
    axis.set_yticks(centers, labels)
    axis.set(xlabel="is attended to", ylabel="attends")
    note = "the context includes the class token; query columns are never attended to"
    axis.set_title(f"Attention mask of '{name}'\n{note}", fontsize=9)
    return figure


def plot_predictions(
    images: UInt8[Tensor, "B C H W"], tokens: Int[Tensor, "B N"], permutation: Int[Tensor, "B N"], logits: Float[Tensor, "B p V"],
    prototypes: Float[Tensor, "V C h w"], grid: tuple[int, int],
) -> Figure:  # fmt: skip
    """Draw a column for each image: its masked patches and the visual tokens that the model predicts for them.

    A row each, from the top: the image; its context patches, all others gray; the order in which the masked patches are predicted (dark
    first); the true tokens, each drawn as its mean patch; context patches with the likeliest tokens at the masked patches; the
    probability of the true token at each masked patch, from 0 (black) to the largest one in the figure.

    Args:
        images: pixels, 0..255.
        tokens: true token ids of the N patches, row-major.
        permutation: patch indices: the context, then the p masked patches in the order of prediction.
        logits: of the masked patches, in the order of prediction.
        prototypes: mean patch of each code, 0..255.
        grid: rows and columns of patches.

    Returns:
        The figure.
    """
    num_context, image = permutation.shape[1] - logits.shape[1], torch.arange(len(images))[:, None]
    context, masked = permutation[:, :num_context], permutation[:, num_context:]
    # [image, masked] selects the masked patches of every image: (B, p, ...)
    true_probability = logits.float().softmax(-1).gather(2, tokens[image, masked][..., None])[..., 0]
    # the top of the color scale: of thousands of tokens even a likely one has a small probability
    max_probability = float(true_probability.max())
    context_patches = torch.full_like(prototypes[tokens], HIDDEN_GRAY * 255)  # (B, N, C, h, w)
    context_patches[image, context] = patchify(images, grid)[image, context].float()
    predicted_patches = context_patches.clone()
    predicted_patches[image, masked] = prototypes[logits.argmax(-1)]
    order, probability = torch.full((2, *permutation.shape), float("nan"))  # NaN: context patches stay blank
    order[image, masked], probability[image, masked] = torch.arange(masked.shape[1]).float(), true_probability

    def assemble(patches: Float[Tensor, "B N C h w"]) -> Float[np.ndarray, "B H W 3"]:
        """Assemble images from their patches, as colors in 0..1."""
        return np.stack([to_rgb(unpatchify(one, grid).round().to(torch.uint8)) for one in patches])

    maps = {
        "context": assemble(context_patches), "order": order.view(-1, *grid).numpy(), "true tokens": assemble(prototypes[tokens]),
        "predicted": assemble(predicted_patches), f"p(true)\n0 to {max_probability:.2g}": probability.view(-1, *grid).numpy(),
    }  # fmt: skip
    title = "Masked patches, predicted in the order shown (dark first);\ntokens drawn as their mean patch"
    figure = plot_maps(images, maps, title)
    for axis in figure.axes[-len(images) :]:  # the row of probabilities
        axis.images[0].set_clim(0, max_probability)
    return figure


# ---- evaluation and fine-tuning


def plot_neighbors(rows: Sequence[Sequence[tuple[UInt8[Tensor, "C h w"], str]]], labeled: bool) -> Figure:
    """Draw a row for each test image: the image, then the training images nearest to it, nearest first.

    Args:
        rows: for each test image, (pixels 0..255, name) of the test image and of its nearest training images.
        labeled: whether names are classes: training images of the test image's class then get a green frame, others a dashed red one.
    """
    frames = {True: ("tab:green", "-"), False: ("tab:red", "--")}
    tiles = []
    for (test, test_name), *nearest in rows:
        tiles.append([Tile(test, test_name[:14])])
        for image, name in nearest:
            tiles[-1].append(Tile(image, name[:14], frames[name == test_name] if labeled else None))
    title = "Test images (left) and their nearest training images by cosine similarity"
    return plot_tiles(tiles, [""] * len(rows), 0.9, title)


def plot_confusion(counts: Int[np.ndarray, "K K"], classes: Sequence[str]) -> Figure:
    """Draw the confusion matrix of a linear probe; the title has its accuracy, on imbalanced images after the balanced accuracy.

    A cell's color is its fraction of the row's images, its text the count. Counts are written for up to `MAX_COUNTED_CLASSES` classes,
    class names for up to `MAX_NAMED_CLASSES`.

    Args:
        counts: number of images by true class (row) and predicted class (column).
        classes: names of the K classes.

    Returns:
        The figure.
    """
    fractions = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = min(12.0, max(4.0, 0.45 * len(classes) + 2))  # inches
    figure, axis = one_axis(side, side)
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0) if len(classes) <= MAX_COUNTED_CLASSES else ():
        color = "white" if fractions[row, column] > 0.6 else "black"  # readable on dark and light blue
        axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=color)
    if len(classes) <= MAX_NAMED_CLASSES:
        names = [name[:16].replace("$", r"\$") for name in classes]  # matplotlib reads $ as mathematics
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="predicted class", ylabel="true class")
    title, labels = "Linear probe: ", np.repeat(np.arange(len(counts)), counts.sum(1))
    if len(labels) and is_imbalanced(labels):
        title += f"balanced accuracy {fractions.diagonal()[np.unique(labels)].mean():.1%}; "
    axis.set_title(f"{title}{np.trace(counts) / max(1, len(labels)):.1%} of {len(labels):,} images", fontsize=10)
    return figure


def plot_learning_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw two plots over epochs: the training loss, and below it the accuracy on the test images, and their balanced accuracy if it is there.

    Args:
        rows: records of fine-tuning's metrics.jsonl, with "epoch" and "loss" (mean of the epoch), "accuracy" (0..1) or both, and perhaps
            "balanced_accuracy"; other keys are ignored.
    """
    figure = Figure(figsize=(6, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    lines = (upper, "loss"), (lower, "balanced_accuracy"), (lower, "accuracy")
    for axis, name in lines:
        if points := [(row["epoch"], row[name]) for row in rows if name in row]:
            axis.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
    upper.set_ylabel("training loss")
    lower.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1))
    if len(lower.lines) > 1:
        lower.legend()
    return figure


# ---- studies


class Curve(NamedTuple):
    """The learning curve of one trial of a study.

    Attributes:
        style: index, in `LINE_STYLES`, of the color and dashes; the trials of one compared value, which differ in their seed, share it.
        points: (x, y) in ascending order of x; at least one.
    """

    style: int
    points: Sequence[tuple[float, float]]


def plot_seeds(curves: Sequence[Curve], xlabel: str, ylabel: str, ylim: tuple[float, float]) -> str:
    """Draw the curves of all seeds thinly, and for each style a thick mean of its curves over the range of x that all of them cover.

    Labels are texts of mapet, not of the user: matplotlib would read `$` as mathematics and warn about letters that its font lacks.

    Args:
        curves: one per seed; those of equal `style` are averaged, by linear interpolation at every x of any of them.
        ylim: lowest and highest y, to which a margin of 5 % is added at both ends.
        xlabel, ylabel: labels of the axes.

    Returns:
        The <svg> element; its axes and texts have the color of the text around it (currentColor), and equal curves give equal SVG.
    """
    colors = dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], SVG_INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mapet", **colors}):
        figure, axis = one_axis(4, 2.8)
        for style in sorted({curve.style for curve in curves}):
            color, dashes = LINE_STYLES[style % len(LINE_STYLES)]
            seeds = [np.array(curve.points).T for curve in curves if curve.style == style]
            for x, y in seeds:
                axis.plot(x, y, color=color, linewidth=0.7, alpha=0.4)
            xs = np.unique(np.concatenate([x for x, _ in seeds]))
            xs = xs[(xs >= max(x[0] for x, _ in seeds)) & (xs <= min(x[-1] for x, _ in seeds))]
            mean = np.mean([np.interp(xs, x, y) for x, y in seeds], axis=0)
            axis.plot(xs, mean, color=color, linewidth=2, linestyle=(0, dashes), marker="." if len(xs) == 1 else "")
        margin = 0.05 * (ylim[1] - ylim[0]) or 0.05  # 0.05 if all y are equal
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(ylim[0] - margin, ylim[1] + margin))
        axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # nothing that changes from call to call
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return file.getvalue()[file.getvalue().index("<svg") :].replace(SVG_INK, "currentColor")
