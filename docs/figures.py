"""The figures of docs/concepts.md, drawn from the objectives' own tables and a tokenizer of two photographs.

python docs/figures.py --out docs/images
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

import mapet
from mapet.models.objectives import MAPET, MIM, PIM, Objective
from mapet.models.packing import attention_mask, segment_lengths
from mapet.reports.plots import HIDDEN_GRAY, patchify, plot_attention_mask, plot_token_maps, unpatchify
from mapet.tokenizers.tokenizer import load_tokenizer

GRID, CONTEXT = (4, 4), 4
"""Patches of the photograph and how many of them are context."""
PREDICTED = GRID[0] * GRID[1] - CONTEXT
SHOWN = (0, 3, 7, 11)
"""Indices of the masked patches whose prediction is drawn."""


def attended_patches(objective: Objective, rank: int) -> dict[str, Bool[Tensor, " p"]]:
    """Return segment -> which of its p patches the query of patch `index` of the permutation attends to; all of the context."""
    lengths = segment_lengths(objective, 1, CONTEXT, PREDICTED)
    table = attention_mask(objective, 1, CONTEXT, PREDICTED)
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]).tolist(), strict=False))
    row = table[starts[objective.output_segment] + rank]
    return {segment: row[start : start + lengths[segment]] for segment, start in starts.items() if segment != "query"}


def plot_attended_patches(photo: Float[Tensor, "3 H W"], permutation: list[int]) -> Figure:
    """Draw a row per objective, a column per predicted patch: patches attended to, positions attended to (?), the rest white."""
    patches = patchify(photo[None].to(torch.uint8), GRID)[0].float()
    figure, axes = plt.subplots(3, len(SHOWN), figsize=(2 * len(SHOWN) + 0.4, 6.6), layout="constrained")
    side = patches.shape[-1]
    for row, objective in zip(axes, (MIM, PIM, MAPET), strict=True):
        for axis, rank in zip(row, SHOWN, strict=True):
            attended = attended_patches(objective, rank)
            content = [*permutation[:CONTEXT], *_chosen(permutation, attended.get("target"))]
            positions = _chosen(permutation, attended.get("mask"))
            shown = torch.full_like(patches, 255)
            shown[positions] = HIDDEN_GRAY * 255
            shown[content] = patches[content]
            axis.imshow(unpatchify(shown, GRID).permute(1, 2, 0).numpy() / 255)
            for patch in positions:
                _write(axis, patch, side, "?", "dimgray")
            current = permutation[CONTEXT + rank]
            if current not in positions:
                _write(axis, current, side, "?", "tab:red")
            y, x = divmod(current, GRID[1])
            box = plt.Rectangle((x * side, y * side), side - 1, side - 1, fill=False, edgecolor="tab:red", linewidth=3)
            axis.add_patch(box)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel({"mim": "MIM", "pim": "PIM", "mapet": "MaPeT"}[objective.name], fontsize=13)
    for axis, rank in zip(axes[0], SHOWN, strict=True):
        axis.set_title(f"masked patch {rank + 1} of {PREDICTED}")
    return figure


def _chosen(permutation: list[int], attended: Bool[Tensor, " p"] | None) -> list[int]:
    return [] if attended is None else [permutation[CONTEXT + rank] for rank in attended.nonzero().flatten().tolist()]


def _write(axis: plt.Axes, patch: int, side: int, text: str, color: str) -> None:
    y, x = divmod(patch, GRID[1])
    axis.text((x + 0.5) * side, (y + 0.5) * side, text, ha="center", va="center", fontsize=14, color=color)


def plot_tokens_of_photographs(photos: list[np.ndarray], folder: Path) -> Figure:
    """Draw two photographs and their visual tokens, of a `pixels` tokenizer fitted to both."""
    (folder / "photos").mkdir()
    for index, photo in enumerate(photos):
        Image.fromarray(photo).resize((320, 224)).crop((48, 0, 272, 224)).save(folder / "photos" / f"{index}.png")
    mapet.fit_tokenizer(
        images=folder / "photos", out=folder / "tokenizer", image_size=224, patch_size=8, vocab_size=24, device="cpu"
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    squares = [np.array(Image.open(path)) for path in sorted((folder / "photos").glob("*.png"))]
    images = torch.from_numpy(np.stack(squares)).movedim(-1, 1)
    with torch.inference_mode():
        tokens = tokenizer(images).flatten(1)
    figure = plot_token_maps(images, tokens, tokenizer.grid, tokenizer.vocab_size)
    figure.suptitle("")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    out = parser.parse_args().out
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    photos = list(load_sample_images().images)
    flower = np.asarray(Image.fromarray(photos[1]).crop((100, 0, 527, 427)).resize((160, 160)))
    permutation = np.random.default_rng(4).permutation(GRID[0] * GRID[1]).tolist()
    figures = {
        "concepts-attention": plot_attended_patches(torch.from_numpy(flower.copy()).movedim(-1, 0).float(), permutation)
    }
    for objective in (MIM, PIM, MAPET):
        table = attention_mask(objective, 1, CONTEXT, PREDICTED)
        lengths = segment_lengths(objective, 1, CONTEXT, PREDICTED)
        figures[f"attention-mask-{objective.name}"] = plot_attention_mask(table, lengths, objective.name)
    with tempfile.TemporaryDirectory() as folder:
        figures["concepts-tokens"] = plot_tokens_of_photographs(photos, Path(folder))
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=80)
        plt.close(figure)


if __name__ == "__main__":
    main()
