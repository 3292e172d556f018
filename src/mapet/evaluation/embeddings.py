"""Rows of numbers for many images on disk, features or logits, written shard by shard, so that an interrupted job can be resumed.

npy: `features.npy` (n, ...), in which rows of unreadable images are NaN, and `ids.json` with the ids. parquet:
`features.parquet/part-*` with the columns `id` and `features`, without unreadable images. `manifest.json` says what made them,
how many images are done, and which are unreadable.
"""

import importlib.util
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from mapet import files
from mapet.config.evaluation import EmbedConfig
from mapet.data.dataset import UnreadableImages, ViewDataset, inference_batch_size, position_batches
from mapet.data.dataset_stats import warn_outside_range
from mapet.data.image_list import ImageList
from mapet.data.loader import load
from mapet.data.sources import list_as_trained
from mapet.data.views import ViewSpec
from mapet.device import ComputeContext
from mapet.errors import Interrupted, MapetError, install_hint, option
from mapet.evaluation.features import BackboneWrapper, check_finite_features
from mapet.models.backbone import load_backbone, prepare_for_device
from mapet.models.pooling import resolve_layers
from mapet.signals import stop_signals
from mapet.weights import hash_weights

log = logging.getLogger("mapet")

KIND, FORMAT = "folder of features", 1
ROWS, IDS, SHARDS = "features.npy", "ids.json", "features.parquet"
SHARD_BYTES, MAX_SHARD_IMAGES = 32 << 20, 8192
"""Size of a shard's features, which are written together, and how many images it has at most."""
NUM_TRIAL_IMAGES = 8
"""Images whose features are computed before anything is written."""


def embed(config: EmbedConfig) -> Path:
    """Compute the features of every image by a frozen backbone, and write them into the folder `config.out`; return that folder.

    Args:
        config: options of `mapet embed`.

    Returns:
        The folder `config.out`.

    Raises:
        Interrupted: a signal such as Ctrl-C came before the last image; the features so far are saved.
        MapetError: pyarrow is missing for parquet, the backbone or the images cannot be loaded, features are NaN, infinite or too large
            for `config.dtype`; or see `compute_rows`.
    """
    if config.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MapetError(f"{option('format')} parquet needs pyarrow: {install_hint('export')}")
    backbone = load_embedder(config)
    images = list_as_trained(config.images, config, backbone.read_options)
    warn_outside_range(images, backbone.channels)
    settings = {"layers": resolve_layers(backbone.model, config.layers), "pool": config.pool}
    manifest = compute_rows(
        config, images, backbone, lambda pixels: _compute_features(config, backbone, pixels), settings, "features"
    )
    num_unreadable = len(manifest["unreadable"])
    log.info(
        "features of %s images in %s (%d unreadable, excluded), %s values per image",
        f"{len(images) - num_unreadable:,}", config.out, num_unreadable, " x ".join(map(str, manifest["shape"])),
    )  # fmt: skip
    return config.out


def load_embedder(config: EmbedConfig) -> BackboneWrapper:
    """Load the backbone whose features `embed` computes, in eval mode, for its own input size or `config.image_size`.

    Raises:
        MapetError: it cannot be loaded, or the device is not available.
    """
    compute = ComputeContext.from_options(config.device, config.precision)
    model_options: dict[str, Any] = {"img_size": config.image_size} if config.image_size else {}
    vit = prepare_for_device(load_backbone(config.backbone, **model_options), compute).eval()
    return BackboneWrapper.from_vit(vit, compute, str(config.backbone))


Compute = Callable[[UInt8[Tensor, "B C H W"]], Float[np.ndarray, "B ..."]]
"""Function from uint8 pixels at a model's input size to a row of numbers for each image."""


def compute_rows(
    config: EmbedConfig,
    images: ImageList,
    backbone: BackboneWrapper,
    compute: Compute,
    settings: dict[str, Any],
    what: str,
) -> dict[str, Any]:
    """Compute a row of numbers for every image, and write them into the folder `config.out`; return its manifest.

    In order: try a few images, before anything is written; create the folder, or with the option `resume` open an interrupted one,
    whose manifest has the number of images done; then compute batch by batch, and write whenever a shard (`SHARD_BYTES`, at most
    `MAX_SHARD_IMAGES`) is full, after the last image, or when a signal such as Ctrl-C stops the job. Unreadable images are recorded in
    the manifest.

    Args:
        config: where and how rows are written: `out`, `format`, `dtype`, `resume`, `max_unreadable`.
        images: the list of images.
        backbone: the model, for its input and the hash of its weights.
        compute: by the model.
        settings: what else a resumed job must have the same.
        what: name of the rows, for the progress bar and messages, e.g. 'features'.

    Returns:
        See `_open_manifest`.

    Raises:
        Interrupted: a signal such as Ctrl-C came before the last image; the rows so far are saved.
        MapetError: the folder exists (without `resume`) or has rows of other images or options (with it), the disk is too full, or more
            than the fraction `config.max_unreadable` of the images is unreadable.
    """
    dataset = ViewDataset(images, ViewSpec(image_size=backbone.image_size), backbone.channels, backbone.image_size)
    # A position is (view index, image index); there is one view per image, the center view.
    trial = dataset.batch([(0, index) for index in range(min(len(images), NUM_TRIAL_IMAGES))])
    if trial.images is not None:
        compute(trial.images)
    manifest = _open_manifest(config, images, backbone, compute, settings)
    reasons = {int(index): reason for index, reason in manifest["unreadable"].items()}
    unreadable = UnreadableImages(images, config.max_unreadable, reasons)
    shard_size, num_done = manifest["shard_size"], manifest["num_done"]
    # Indices one past the last image of each shard; no batch crosses them. The first shard may be partly done.
    ends = [*range((num_done // shard_size + 1) * shard_size, len(images), shard_size), len(images)]
    size = inference_batch_size(backbone.image_size)
    shards = pairwise([num_done, *ends])
    batches = [batch for start, end in shards for batch in position_batches(range(start, end), size)]
    rows, index = [], []  # features and image indices of the batches that are not on disk yet
    with (
        stop_signals("stopping after this batch") as stop,
        tqdm(total=len(images), initial=num_done, desc=what, unit="img", disable=None) as bar,
    ):
        for batch, positions in zip(load(dataset.batch, batches), batches, strict=True):
            unreadable.add(batch.unreadable)
            if batch.images is not None:
                rows.append(compute(batch.images))
                index.append(batch.image_index.numpy())
            bar.update(len(positions))
            end = positions[-1][1] + 1  # images before this index are done
            if stop.signal_name or end in ends:
                manifest["unreadable"] = {str(i): reason for i, reason in unreadable.reasons.items()}
                _write(config.out, images, manifest, rows, index, end)
                rows, index = [], []
            if stop.signal_name and end < len(images):
                saved = f"{what} of {end:,} of {len(images):,} images are saved"
                raise Interrupted(f"stopped by {stop.signal_name}: {saved}")
    return manifest


@torch.inference_mode()
def _compute_features(
    config: EmbedConfig, backbone: BackboneWrapper, pixels: UInt8[Tensor, "B C H W"]
) -> Float[np.ndarray, "B ..."]:
    """Compute the features of uint8 images by `config.layers` and `config.pool`, as a NumPy array of type `config.dtype`.

    Args:
        config: options of `mapet embed`.
        backbone: the frozen model; its `name` is used in errors.
        pixels: images at the backbone's input size.

    Returns:
        (B, F), see `pooled_features`; for the pooling 'none' (B, N, D): all patch tokens, those of several layers side by side.

    Raises:
        MapetError: a feature is NaN or infinite, or beyond the range of `config.dtype` float16; or the backbone has no such layer, or
            no class token for the pooling 'cls'.
    """
    if config.pool == "none":
        maps = backbone.forward_intermediates(backbone.normalize(pixels), config.layers)
        features = torch.cat([grid.float() for grid, _ in maps], 1).flatten(2).transpose(1, 2)
    else:
        features = torch.cat(backbone.pooled_features(pixels, config.layers, config.pool), 1)
    check_finite_features(features, backbone.name)
    if config.dtype == "float16" and (largest := float(features.abs().max())) > torch.finfo(torch.float16).max:
        problem = f"{backbone.name} gives features up to {largest:.3g}, beyond float16's range (65504)"
        raise MapetError(f"{problem}: give {option('dtype', 'float32')}", field="dtype", value=config.dtype)
    return features.cpu().numpy().astype(config.dtype)


def _open_manifest(
    config: EmbedConfig, images: ImageList, backbone: BackboneWrapper, compute: Compute, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest of the interrupted folder `config.out` if `config.resume`, else create the folder and its first manifest.

    For npy, a folder without features yet gets an array with room for all of them, and ids.json.

    Args:
        config: options of `embed`.
        images: the list; the manifest records its hash.
        backbone: its weights, input size and precision are recorded as settings.
        compute: called once, on a black image, for the shape of a row.
        settings: further settings.

    Returns:
        The manifest, a dict with the keys file_format ('npy' or 'parquet'), settings (what made the features; a resumed job must have the same),
        num_images, images_hash, shape (of one image's features), dtype, shard_size (images per shard), num_done (images whose features
        are written), unreadable (index of an image, as text -> reason).

    Raises:
        NewerFormatError: a newer version of mapet wrote the folder to resume.
        MapetError: the folder to resume is damaged, or is of other images, another backbone or other options; without `config.resume` the
            folder exists already and is not empty; the backbone has no such layer, no class token for the pooling 'cls', or features of a
            black image that are NaN, infinite or too large for `config.dtype`; or the disk is too full.
    """
    out = config.out
    settings = settings | {
        "backbone": hash_weights(backbone.model.state_dict()), "dtype": config.dtype,
        "image_size": list(backbone.image_size), "precision": backbone.compute.precision,
    }  # fmt: skip
    if config.resume and (out / files.MANIFEST).exists():
        manifest = files.read_manifest(out, KIND, FORMAT)
        current = {"images_hash": images.hash, "file_format": config.format, **settings}
        files.check_same_options(out, {key: manifest.get(key) for key in current} | manifest["settings"], current)
    else:
        files.create_output_dir(out, "" if config.resume else f", or resume with {option('resume', True)}")
        black = torch.zeros(1, backbone.channels, *backbone.image_size, dtype=torch.uint8)
        shape = list(compute(black).shape[1:])
        row_bytes = int(np.prod(shape)) * np.dtype(config.dtype).itemsize
        manifest = {
            "file_format": config.format, "settings": settings, "num_images": len(images), "images_hash": images.hash, "shape": shape,
            "dtype": config.dtype, "shard_size": max(1, min(MAX_SHARD_IMAGES, SHARD_BYTES // row_bytes)), "num_done": 0, "unreadable": {},
        }  # fmt: skip
        files.write_manifest(out, KIND, FORMAT, manifest)
    # The array follows the manifest: without a manifest of `embed`, a file of its name is not from embed and is never replaced.
    if config.format == "npy" and not manifest["num_done"]:
        try:
            files.create_array(out / ROWS, config.dtype, (len(images), *manifest["shape"]))
        except MapetError:
            (out / files.MANIFEST).unlink()  # so that the folder is empty again
            raise
        files.write_json(out / IDS, [images.id(index) for index in range(len(images))])
    return manifest


def _write(
    folder: Path, images: ImageList, manifest: dict[str, Any], rows: list[np.ndarray], index: list[np.ndarray], end: int
) -> None:
    """Write the features of the images from `manifest['num_done']` to `end` - 1, and then the manifest, in which `end` images are done.

    In an npy file, rows of unreadable images are NaN. Parquet gets a new file, part-SHARD.parquet, or part-SHARD_OFFSET.parquet if an
    interrupted job has written the first OFFSET images of the shard: names sort in the order of the images.

    Args:
        folder: the output folder.
        images: the list of all images, for their ids.
        manifest: see `_open_manifest`; its `num_done` is updated.
        rows: features of the readable images, one array per batch.
        index: for each batch, the indices of its images in the list.
        end: one past the last image that is done.
    """
    start = manifest["num_done"]
    if manifest["file_format"] == "npy":
        stored = files.read_array(folder / ROWS, "r+")
        stored[start:end] = np.nan
        for batch_index, features in zip(index, rows, strict=True):
            stored[batch_index] = features
        stored.flush()
    elif rows:
        import pyarrow
        import pyarrow.parquet

        column = pyarrow.array(np.concatenate(rows).reshape(-1))
        for length in reversed(manifest["shape"]):  # nested lists of fixed size, one level for each dimension
            column = pyarrow.FixedSizeListArray.from_arrays(column, length)
        ids = [images.printable_id(i) for i in np.concatenate(index).tolist()]
        table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "features": column})
        shard, offset = divmod(start, manifest["shard_size"])
        name = f"part-{shard:05d}_{offset:09d}.parquet" if offset else f"part-{shard:05d}.parquet"
        with files.atomic_write(folder / SHARDS / name) as temporary:
            pyarrow.parquet.write_table(table, temporary)
    manifest["num_done"] = end
    files.write_manifest(folder, KIND, FORMAT, manifest)


def read_embeddings(folder: Path) -> tuple[list[str], Float[np.ndarray, "n ..."]]:
    """Read a finished folder of `mapet embed`, of either format, without the unreadable images.

    Args:
        folder: of `mapet embed`.

    Returns:
        (ids of the n readable images, e.g. their paths below the data set's folder; their features in the same order, float16 or
        float32: (n, D), or (n, N, D) if all patch tokens were written).

    Raises:
        MapetError: the folder is not an output of `mapet embed`, or is unfinished.
    """
    manifest = files.read_manifest(folder, KIND, FORMAT)
    if manifest["num_done"] < manifest["num_images"]:
        done = f"{manifest['num_done']} of {manifest['num_images']} images"
        raise MapetError(f"{folder} is unfinished ({done}): finish it by the same command and {option('resume', True)}")
    if manifest["file_format"] == "npy":
        readable = [i for i in range(manifest["num_images"]) if str(i) not in manifest["unreadable"]]
        ids = json.loads((folder / IDS).read_text())
        return [ids[i] for i in readable], files.read_array(folder / ROWS)[readable]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / SHARDS, columns=["id", "features"])
    column = table["features"].combine_chunks()
    for _ in manifest["shape"]:  # nested lists, one level for each dimension
        column = column.flatten()
    return table["id"].to_pylist(), column.to_numpy(zero_copy_only=False).reshape(-1, *manifest["shape"])
