"""One function a picture: tensors in, a matplotlib figure out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from mapet.files import atomic
from mapet.models.objectives import Segment

HIDDEN = 0.88
"""Grey of a patch that is not shown."""


def to_picture(image: UInt8[Tensor, "C H W"]) -> Float[np.ndarray, "H W 3"]:
    """Something matplotlib can show: the first three channels, or grey."""
    channels = image if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return channels[:3].permute(1, 2, 0).float().numpy() / 255


def patchify(images: UInt8[Tensor, "B C H W"], grid: tuple[int, int]) -> UInt8[Tensor, "B N C h w"]:
    """Patches in row-major order."""
    batch, channels, height, width = images.shape
    h, w = height // grid[0], width // grid[1]
    patches = images.view(batch, channels, grid[0], h, grid[1], w)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels, h, w)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (C, H, W)."""
    _, channels, h, w = patches.shape
    return patches.view(*grid, channels, h, w).permute(2, 0, 3, 1, 4).reshape(channels, grid[0] * h, grid[1] * w)


def code_colors(vocab_size: int) -> Float[np.ndarray, "V 3"]:
    """A fixed colour for each code."""
    return np.random.default_rng(7).uniform(0.05, 1.0, (vocab_size, 3))


def token_maps(
    images: UInt8[Tensor, "B C H W"], tokens: Int[Tensor, "B N"], grid: tuple[int, int], vocab_size: int
) -> Figure:
    """Each image beside its token map: one colour a visual word."""
    colors = code_colors(vocab_size)
    figure, axes = panels(2, len(images))
    for column, (image, ids) in enumerate(zip(images, tokens, strict=True)):
        _show(axes[0][column], to_picture(image))
        _show(axes[1][column], colors[ids.view(grid).numpy()])
    axes[0][0].set_ylabel("image")
    axes[1][0].set_ylabel("tokens")
    figure.suptitle("Images and their visual words (one colour a word)")
    return figure


def usage_histogram(counts: Int[Tensor, " V"]) -> Figure:
    """Share of patches of each used code, commonest first, on log axes, beside even use."""
    shares = counts.sort(descending=True).values.double() / counts.sum()
    used = int((counts > 0).sum())
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    ranks = np.arange(1, used + 1)
    axis.loglog(ranks, shares[:used].numpy(), marker=".", label=f"{used:,} used codes")
    axis.axhline(1 / len(counts), color="grey", linestyle="--", label=f"even use of {len(counts):,}")
    covered = shares.cumsum(0)
    for share, style in ((0.5, ":"), (0.9, "-.")):
        rank = int((covered < share - 1e-12).sum()) + 1
        axis.axvline(rank, color="black", linewidth=0.8, linestyle=style, label=f"{share:.0%} of patches: {rank:,}")
    axis.set_xlabel("code, commonest first")
    axis.set_ylabel("share of patches")
    axis.set_title(
        f"Use of visual words ({len(counts) - used:,} of {len(counts):,} dead in {int(counts.sum()):,} patches)"
    )
    axis.legend()
    return figure


def nearest_codes(
    prototypes: Float[Tensor, "V C h w"],
    counts: Int[Tensor, " V"],
    codes: Int[Tensor, " n"],
    neighbours: Int[Tensor, "n k"],
    distances: Float[Tensor, "n k"],
) -> Figure:
    """A row a code: its mean patch, then those of the codes with the nearest centroids; a code nobody has stays grey."""
    order = torch.cat([codes[:, None], neighbours], 1).tolist()
    tiles = [[to_picture(prototypes[code].round().to(torch.uint8)) for code in row] for row in order]
    figure, centres = _montage(tiles, _names(codes, counts), size=0.8)
    for y, row, told in zip(centres, neighbours.tolist(), distances.tolist(), strict=True):
        for column, (code, distance) in enumerate(zip(row, told, strict=True), 1):
            figure.axes[0].text(column + 0.5, y - 0.47, f"{code}: {distance:.2g}", fontsize=6, ha="center", va="bottom")
    figure.suptitle("Mean patches of words and of their nearest words (code: distance)", fontsize=9)
    return figure


def neighbour_panel(rows: Sequence[Sequence[tuple[UInt8[Tensor, "C h w"], str]]], labelled: bool) -> Figure:
    """Rows of (image, name): a test image, then the training images nearest to it, best first.

    Args:
        labelled: names are classes; images of the row's first class get a green frame, others a dashed red one.
    """
    figure, centres = _montage([[to_picture(image) for image, _ in row] for row in rows], [""] * len(rows), size=0.9)
    for y, row in zip(centres, rows, strict=True):
        for column, (_, name) in enumerate(row):
            if labelled and column:
                color, style = ("tab:red", "--") if name != row[0][1] else ("tab:green", "-")
                frame = plt.Rectangle((column + 0.04, y - 0.46), 0.92, 0.92, fill=False, ec=color, lw=2.5, ls=style)
                figure.axes[0].add_patch(frame)
            figure.axes[0].text(
                column + 0.5, y - 0.49, name[:14], fontsize=7, ha="center", va="bottom", parse_math=False
            )
    figure.suptitle("Test images (left) and their nearest training images by cosine similarity", fontsize=9)
    return figure


def learning_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Mean training loss of each epoch and, where it was measured, the accuracy on the test images."""
    figure, left = plt.subplots(figsize=(6, 4), layout="constrained")
    trained, judged = ([row for row in rows if name in row] for name in ("loss", "accuracy"))
    left.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], color="tab:blue")
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color="tab:blue")
    right = left.twinx()
    right.plot([row["epoch"] for row in judged], [row["accuracy"] for row in judged], color="tab:orange", marker="o")
    right.set_ylabel("test accuracy", color="tab:orange")
    right.set_ylim(0, 1)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG, atomically."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def spread_of_codes(counts: Int[Tensor, " V"], most: int) -> Int[Tensor, " n"]:
    """Used codes, spread over the range of frequency, commonest first."""
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    return used[torch.linspace(0, len(used) - 1, min(most, len(used))).round().long()]


def code_montage(
    patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int, rows: int = 12, columns: int = 12
) -> Figure:
    """Patches that share a code, for codes spread over the range of frequency."""
    counts = torch.bincount(tokens, minlength=vocab_size)
    chosen = spread_of_codes(counts, rows)
    members = [patches[(tokens == code).nonzero().flatten()[:columns]] for code in chosen]
    figure, _ = _montage([[to_picture(patch) for patch in row] for row in members], _names(chosen, counts), size=0.7)
    figure.suptitle("Patches that share a visual word (number and share of patches)")
    return figure


def visibility_table(table: Bool[Tensor, "R R"], lengths: Mapping[Segment, int], name: str) -> Figure:
    """Who sees whom: rows attend to the dark columns."""
    figure, axis = plt.subplots(figsize=(6, 6), layout="constrained")
    axis.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    edges = np.cumsum([0, *lengths.values()])
    centres = (edges[1:] + edges[:-1]) / 2 - 0.5
    for edge in edges[1:-1]:
        axis.axhline(edge - 0.5, color="black", linewidth=0.8)
        axis.axvline(edge - 0.5, color="black", linewidth=0.8)
    labels = [f"{segment}\n({length})" for segment, length in lengths.items()]  # the class token is in the context
    axis.set_xticks(centres, labels)
    axis.set_yticks(centres, labels)
    axis.set_xlabel("is seen")
    axis.set_ylabel("sees")
    axis.set_title(
        f"Visibility table of '{name}'\ncontext with the class token; query columns are never seen", fontsize=9
    )
    return figure


def predictions(
    images: UInt8[Tensor, "B C H W"],
    tokens: Int[Tensor, "B N"],
    permutation: Int[Tensor, "B N"],
    logits: Float[Tensor, "B p V"],
    prototypes: Float[Tensor, "V C h w"],
    grid: tuple[int, int],
) -> Figure:
    """What the model predicts for hidden patches in a given order.

    Words are drawn as their mean patch. Rows: the image; the context patches alone; the order of prediction; the true
    words; the likeliest words; the probability of the true word, from nought (black) to the largest shown.
    """
    hidden = permutation.shape[1] - logits.shape[1]
    true = tokens.gather(1, permutation[:, hidden:])
    chance = logits.float().softmax(-1).gather(2, true[..., None])[..., 0]
    most = float(chance.max())  # of thousands of words even a likely one has a small probability
    names = ["image", "context", "order", "true words", "predicted", f"p(true)\n0 to {most:.2g}"]
    figure, axes = panels(len(names), len(images))
    for b in range(len(images)):
        order = permutation[b, hidden:]
        words = prototypes[tokens[b]]
        context = torch.full_like(words, HIDDEN * 255)
        context[permutation[b, :hidden]] = patchify(images[b : b + 1], grid)[0][permutation[b, :hidden]].float()
        guessed = context.clone()
        guessed[order] = prototypes[logits[b].argmax(-1)]
        rank = torch.full((permutation.shape[1],), float("nan"))
        rank[order] = torch.arange(len(order)).float()
        probability = torch.full((permutation.shape[1],), float("nan"))
        probability[order] = chance[b]
        _show(axes[0][b], to_picture(images[b]))
        for row, patches in ((1, context), (3, words), (4, guessed)):
            _show(axes[row][b], to_picture(unpatchify(patches.round().to(torch.uint8), grid)))
        axes[2][b].imshow(rank.view(grid), cmap="viridis")
        axes[5][b].imshow(probability.view(grid), cmap="magma", vmin=0, vmax=most)
    for row, name in enumerate(names):
        axes[row][0].set_ylabel(name)
    figure.suptitle("Hidden patches, predicted in the order shown (dark first);\nwords drawn as their mean patch")
    return figure


def cls_attention(
    images: UInt8[Tensor, "B C H W"], attention: Float[Tensor, "B heads N"], grid: tuple[int, int]
) -> Figure:
    """Where the class token looks in the last block: mean over heads, then each head."""
    heads = min(attention.shape[1], 6)
    figure, axes = panels(2 + heads, len(images))
    for b, image in enumerate(images):
        _show(axes[0][b], to_picture(image))
        for row, values in enumerate([attention[b].mean(0), *attention[b, :heads]], 1):
            axes[row][b].imshow(values.view(grid).numpy(), cmap="inferno")
    for row, name in enumerate(["image", "mean", *(f"head {h}" for h in range(heads))]):
        axes[row][0].set_ylabel(name)
    figure.suptitle("Attention of the class token to the patches, last block")
    return figure


def mean_patches(
    patches: UInt8[Tensor, "n C h w"], tokens: Int[Tensor, " n"], vocab_size: int
) -> Float[Tensor, "V C h w"]:
    """The mean patch of each code; grey for a code without patches."""
    flat = patches.flatten(1).float()
    one_hot_sums = torch.zeros(vocab_size, flat.shape[1]).index_add_(0, tokens, flat)
    counts = torch.bincount(tokens, minlength=vocab_size)[:, None]
    means = torch.where(counts > 0, one_hot_sums / counts.clamp_min(1), torch.tensor(HIDDEN * 255))
    return means.view(vocab_size, *patches.shape[1:])


def panels(rows: int, columns: int, size: float = 1.5) -> tuple[Figure, Sequence[Sequence[plt.Axes]]]:
    """Rows of square axes without ticks."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(5.0, size * columns + 1), size * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _names(codes: Int[Tensor, " n"], counts: Int[Tensor, " V"]) -> list[str]:
    return [f"{code}\n{counts[code] / counts.sum():.1%}" for code in codes.tolist()]


def _montage(tiles: Sequence[Sequence[np.ndarray]], names: Sequence[str], size: float) -> tuple[Figure, list[float]]:
    """Rows of named tiles, each 1 x 1 on the one axis (an axis for every tile takes matplotlib seconds), with room above.

    Returns:
        the figure, and where the middle of each row is.
    """
    columns, step = max(map(len, tiles)), 1.2
    figure, axis = plt.subplots(figsize=(size * columns + 1, size * step * len(tiles) + 0.6), layout="constrained")
    centres = [step * row + 0.7 for row in range(len(tiles))]
    for y, row in zip(centres, tiles, strict=True):
        for x, tile in enumerate(row):
            axis.imshow(tile, interpolation="nearest", extent=(x + 0.04, x + 0.96, y + 0.46, y - 0.46))
    axis.set(xlim=(0, columns), ylim=(step * len(tiles) + 0.2, 0), aspect="equal", xticks=[], frame_on=False)
    axis.set_yticks(centres, names, fontsize=7)
    axis.tick_params(length=0)
    return figure, centres


def _show(axis: plt.Axes, picture: np.ndarray) -> None:
    axis.imshow(picture, interpolation="nearest")
