"""`mapet search`: nearest images, duplicates and outliers of a source, as CSV files and a page with thumbnails."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapet.config.evaluation import EmbedConfig, SearchConfig
from mapet.data.dataset import UnreadableImages, ViewDataset, inference_batch_size, position_batches, readable_batches
from mapet.data.image_list import ImageList
from mapet.data.sources import list_as_trained
from mapet.data.views import ViewSpec
from mapet.errors import option
from mapet.evaluation import similarity
from mapet.evaluation.embeddings import embed, load_embedder
from mapet.evaluation.features import BackboneWrapper
from mapet.evaluation.similarity import FeatureIndex, Neighbors, Pairs
from mapet.files import write_csv, write_text
from mapet.reports.page import image_uri
from mapet.reports.plots import to_image
from mapet.reports.render import render
from mapet.run_state import record

log = logging.getLogger("mapet")
NUM_COPIES = 200
"""Images whose JPEG copies tell how similar near duplicates are."""
NUM_ROWS, ROW_IMAGES, NUM_OUTLIERS = 24, 8, 48
"""What the page shows at most: rows (an image with its nearest, a group of duplicates), images of a row, outliers."""
COMPARISON_SIZE, MAX_DIFFERENCE = (16, 16), 4.0
"""Height and width, pixels, at which near duplicates are compared, and by how many of 255 levels (root mean square) they may differ."""
COMPARISON_BATCH_SIZE = 256
MAX_DUPLICATES = 0.5
"""Fraction of images with near duplicates above which a warning doubts them."""
THUMBNAIL_SIZE = (112, 112)
"""Height and width of the page's images, pixels."""
Row = list[tuple[ImageList, int, str]]
"""Images of a row of the page: list, index in it, caption."""


def search(config: SearchConfig) -> Path:
    """Find the nearest images of each query, or of each image with duplicates and outliers; return the folder `config.out`.

    Features are computed first, into a folder of `mapet embed` that later searches reuse. CSV files: neighbors.csv (id, rank, neighbor,
    similarity), and without `query` duplicates.csv and outliers.csv, see `_write_duplicates` and `_write_outliers`. search.html shows
    some of what they have.

    Args:
        config: options of `mapet search`.

    Returns:
        The folder `config.out`.

    Raises:
        Interrupted: a signal such as Ctrl-C came while features were computed; those so far are saved.
        MapetError: backbone or images cannot be loaded, the features are of other images or options, or too many images are unreadable.
    """
    shared = set(EmbedConfig.model_fields) & set(SearchConfig.model_fields)
    folder = config.features or config.out / "features"
    embedding = EmbedConfig(**config.model_dump(include=shared) | {"out": folder, "resume": True})
    embed(embedding)
    backbone = load_embedder(embedding)
    images = list_as_trained(config.images, config, backbone.read_options)
    compute_features = partial(_compute_features, config, backbone)
    index = FeatureIndex.open(folder, backbone.compute.device)
    sections: dict[str, list[Row]] = {}
    if config.query is None:
        queries, rows = images, index.readable
        neighbors = index.neighbors(config.num_neighbors)
        sections |= _write_duplicates(config, images, backbone.channels, index, neighbors, compute_features)
        sections["Outliers: far from their nearest images"] = _write_outliers(config, images, index, neighbors)
    else:
        queries = list_as_trained(config.query, config, backbone.read_options)
        features, rows = compute_features(queries, np.arange(len(queries)))
        neighbors = index.search(features, config.num_neighbors)
    sections["Nearest images, with their cosine similarity"] = _write_neighbors(
        config, queries, rows, images, neighbors
    )
    page = {title: [_embed_thumbnails(backbone.channels, row) for row in rows] for title, rows in sections.items()}
    facts = {
        "images": f"{config.images} ({len(index.readable):,} images)",
        "backbone": config.backbone,
        "features": config.features_description,
    }
    write_text(config.out / "search.html", render("search.html", facts=facts, sections=page, size=THUMBNAIL_SIZE))
    log.info("search.html and CSV files in %s; to search again: %s", config.out, option("features", str(folder)))
    return config.out


def _write_neighbors(
    config: SearchConfig, queries: ImageList, rows: Int[np.ndarray, " m"], images: ImageList, neighbors: Neighbors
) -> list[Row]:
    """Write neighbors.csv (id, rank from 1, neighbor, similarity), and return rows of the page: queries with their nearest images.

    Args:
        config: options of `mapet search`; `out` is used.
        queries: list of the images whose neighbors were searched for.
        rows: indices, in `queries`, of the m readable ones.
        images: list of the images that were searched.
        neighbors: of the m queries, in their order.

    Returns:
        `NUM_ROWS` rows at most, spread evenly over the queries.
    """
    results = [*zip(rows.tolist(), neighbors.similarity.tolist(), neighbors.image_index.tolist(), strict=True)]
    table = (
        (queries.printable_id(query), rank, images.printable_id(image), f"{value:.6f}")
        for query, values, nearest in results
        for rank, (value, image) in enumerate(zip(values, nearest, strict=True), 1)
    )
    write_csv(config.out / "neighbors.csv", ("id", "rank", "neighbor", "similarity"), table)
    page_rows = []
    for index in np.unique(np.linspace(0, len(results) - 1, NUM_ROWS).astype(int)):
        query, values, nearest = results[index]
        row = [(images, i, f"{value:.3f} {images.printable_id(i)}") for value, i in zip(values, nearest, strict=True)]
        page_rows.append([(queries, query, queries.printable_id(query)), *row])
    return page_rows


def _compute_features(
    config: SearchConfig, backbone: BackboneWrapper, images: ImageList, indices: Int[np.ndarray, " m"],
    augment: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "n F"], Int[np.ndarray, " n"]]:  # fmt: skip
    """Compute features as `embed` does, of some images of any list.

    Args:
        config: options of `mapet search`; `layers`, `pool` and `max_unreadable` are used.
        backbone: whose features are computed.
        images: any list.
        indices: of the images.
        augment: changes the uint8 pixels (C, H, W) of a view before its features are computed; None: they stay.

    Returns:
        Features of the n readable images, on the CPU, and their indices, in the order of `indices`.
    """
    dataset = ViewDataset(
        images, ViewSpec(image_size=backbone.image_size), backbone.channels, backbone.image_size, augment=augment
    )
    batches = position_batches(indices, inference_batch_size(backbone.image_size))
    features, readable = [], []
    for batch in readable_batches(dataset, batches, UnreadableImages(images, config.max_unreadable), None):
        assert batch.images is not None
        features.append(torch.cat(backbone.pooled_features(batch.images, config.layers, config.pool), 1).cpu())
        readable.append(batch.image_index.numpy())
    return torch.cat(features), np.concatenate(readable)


def _write_duplicates(
    config: SearchConfig, images: ImageList, channels: int, index: FeatureIndex, neighbors: Neighbors,
    compute_features: Callable[..., tuple[Tensor, np.ndarray]],
) -> dict[str, list[Row]]:  # fmt: skip
    """Write duplicates.csv, a row for each pair (group, id, duplicate, kind exact or near, similarity); return a section of the page.

    Near duplicates are at least as similar as `config.min_similarity`. Without it they are as similar as nearly all images are to their
    own JPEG copies (`copy_similarity`, of a sample of `NUM_COPIES`), and look alike at a size of 16 x 16 px (`_drop_different`): a
    backbone that was trained little has similar features of many different images.

    Args:
        config: options of `mapet search`; `out` and `min_similarity` are used.
        images: the list that was searched.
        channels: of the backbone's input.
        index: features of `images`.
        neighbors: nearest images of each readable image, in the order of `index`.
        compute_features: called as f(images, indices, augment), see `_compute_features`.

    Returns:
        The title, with the counts, -> `NUM_ROWS` groups at most, of `ROW_IMAGES` images each.
    """
    min_similarity = config.min_similarity
    if min_similarity is None:
        sample = index.readable[
            np.linspace(0, len(index.readable) - 1, min(NUM_COPIES, len(index.readable))).astype(int)
        ]
        copies, sample = compute_features(images, sample, similarity.jpeg_copy)
        min_similarity = similarity.copy_similarity(torch.from_numpy(index.features[sample]), copies)
    pairs = similarity.similar_pairs(index.readable, neighbors, min_similarity)
    if config.min_similarity is None:
        pairs = _drop_different(images, channels, pairs)
    duplicates = similarity.find_duplicates(images, pairs, min_similarity)
    names = images.printable_id
    rows = (
        (p.group, names(p.first), names(p.second), "exact" if p.is_exact else "near", f"{p.similarity:.6f}")
        for p in duplicates
    )
    write_csv(config.out / "duplicates.csv", ("group", "id", "duplicate", "kind", "similarity"), rows)
    groups: dict[int, dict[int, str]] = {}
    for pair in duplicates:
        for image in (pair.first, pair.second):
            groups.setdefault(pair.group, {}).setdefault(
                image, f"{'exact' if pair.is_exact else 'near'} {names(image)}"
            )
    num_exact, num_near = (
        len({image for pair in duplicates if pair.is_exact == exact for image in (pair.first, pair.second)})
        for exact in (True, False)
    )
    summary = f"{num_exact:,} images have exact duplicates, {num_near:,} near ones, in {len(groups):,} groups"
    log.info("%s; near: cosine similarity from %.6f", summary, min_similarity)
    if num_near > MAX_DUPLICATES * len(index.readable):
        hint = f"these features hardly tell images apart: give a higher {option('min_similarity')}, or another backbone"
        log.warning("%d of %d images have near duplicates: %s", num_near, len(index.readable), hint)
    record(
        config.out,
        results={"min_similarity": min_similarity, "exact_duplicates": num_exact, "near_duplicates": num_near},
    )
    page_groups = [list(group.items())[:ROW_IMAGES] for group in list(groups.values())[:NUM_ROWS]]
    return {f"Duplicates: {summary}": [[(images, image, text) for image, text in group] for group in page_groups]}


def _drop_different(images: ImageList, channels: int, pairs: Pairs) -> Pairs:
    """Return the pairs whose center crops, at the size `COMPARISON_SIZE`, differ by a root mean square of at most `MAX_DIFFERENCE` levels."""
    dataset = ViewDataset(images, ViewSpec(image_size=COMPARISON_SIZE), channels, COMPARISON_SIZE)
    batches = position_batches(np.unique([*pairs]), COMPARISON_BATCH_SIZE)
    views: dict[int, Tensor] = {}
    for batch in readable_batches(dataset, batches, UnreadableImages(images, 1.0, is_option=False), "comparing pixels"):
        assert batch.images is not None
        views |= zip(batch.image_index.tolist(), batch.images.float(), strict=True)
    return {
        (a, b): value for (a, b), value in pairs.items()
        if a in views and b in views and float((views[a] - views[b]).square().mean()) <= MAX_DIFFERENCE**2
    }  # fmt: skip


def _write_outliers(config: SearchConfig, images: ImageList, index: FeatureIndex, neighbors: Neighbors) -> list[Row]:
    """Write outliers.csv (id, distance: the mean one to its nearest images; the farthest first); return the first ones for the page."""
    distances = similarity.outlier_scores(neighbors)
    farthest = [(images, int(index.readable[i]), float(distances[i])) for i in np.argsort(-distances, kind="stable")]
    rows = ((images.printable_id(image), f"{distance:.6f}") for _, image, distance in farthest)
    write_csv(config.out / "outliers.csv", ("id", "distance"), rows)
    return [
        [
            (images, image, f"{distance:.3f} {images.printable_id(image)}")
            for _, image, distance in farthest[:NUM_OUTLIERS]
        ]
    ]


def _embed_thumbnails(channels: int, row: Row) -> list[tuple[str, str]]:
    """Return (data URI of the center crop, caption) of each image of a row; readable ones, as their features are known."""
    thumbnails = []
    for images, image, caption in row:
        batch = ViewDataset(images, ViewSpec(image_size=THUMBNAIL_SIZE), channels, THUMBNAIL_SIZE).batch([(0, image)])
        if batch.images is not None:
            thumbnails.append((image_uri(to_image(batch.images[0])), caption))
    return thumbnails
