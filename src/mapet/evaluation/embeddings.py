"""Features of many images on disk, written in shards, so that an interrupted job can be resumed.

npy: `features.npy` (n, ...), rows of unreadable images are NaN; `ids.json` the ids. parquet: `features.parquet/part-*` with the columns `id` and
`features`, without the unreadable. `manifest.json` says what made them, how many are done, and which could not be read.
"""

import importlib.util
import json
import logging
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
from mapet.data.dataset import UnreadableImages, ViewDataset, create_loader, inference_batch_size, position_batches
from mapet.data.image_list import ImageList
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec
from mapet.device import ComputeContext
from mapet.errors import Interrupted, MapetError, install_hint, option
from mapet.evaluation.features import BackboneWrapper, check_finite_features
from mapet.models.backbone import load_backbone, prepare_for_device
from mapet.signals import stop_signals
from mapet.weights import hash_weights

log = logging.getLogger("mapet")

KIND, FORMAT = "folder of features", 1
ROWS, IDS, SHARDS = "features.npy", "ids.json", "features.parquet"
SHARD_BYTES = 32 << 20


def embed(config: EmbedConfig) -> Path:
    """Write the features of every image into `config.out`, a new folder or one that was interrupted; return the folder.

    Raises:
        Interrupted: a signal came; whole batches are saved.
        MapetError: the folder is of other images or options; features are not finite, or too large for `config.dtype`.
    """
    if config.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MapetError(f"{option('format')} parquet needs pyarrow: {install_hint('export')}")
    compute = ComputeContext.from_options(config.device, config.precision)
    images = list_images(config.images)
    options: dict[str, Any] = {"img_size": config.image_size} if config.image_size else {}
    vit = prepare_for_device(load_backbone(config.backbone, **options), compute).eval()
    backbone = BackboneWrapper.from_vit(vit, compute, str(config.backbone))
    dataset = ViewDataset(images, ViewSpec(image_size=backbone.image_size), vit.in_chans, backbone.image_size)
    first = dataset.batch([(0, index) for index in range(min(len(images), 8))])
    if first.images is not None:
        _compute_features(config, backbone, first.images)  # what cannot be written is refused before anything is
    manifest = _open_manifest(config, images, backbone)
    unreadable = UnreadableImages(
        images, config.max_unreadable, {int(i): why for i, why in manifest["unreadable"].items()}
    )
    size, num_done, batch_size = manifest["shard_size"], manifest["num_done"], inference_batch_size(backbone.image_size)
    edges = [num_done, *range((num_done // size + 1) * size, len(images), size), len(images)]
    batches = [batch for start, end in pairwise(edges) for batch in position_batches(range(start, end), batch_size)]
    rows, index = [], []  # of the batches that are not yet on disk
    with (
        stop_signals("stopping after this batch") as stop,
        tqdm(total=len(images), initial=num_done, desc="embed", unit="img", disable=None) as bar,
    ):
        for batch, positions in zip(create_loader(dataset, batches), batches, strict=True):
            unreadable.add(batch.unreadable)
            if batch.images is not None:
                rows.append(_compute_features(config, backbone, batch.images))
                index.append(batch.image_index.numpy())
            bar.update(len(positions))
            end = positions[-1][1] + 1
            if stop.signal_name or end in edges:
                manifest["unreadable"] = {str(i): reason for i, reason in unreadable.reasons.items()}
                _write(config.out, images, manifest, rows, index, end)
                rows, index = [], []
            if stop.signal_name and end < len(images):
                saved = f"features of {end:,} of {len(images):,} images are saved"
                raise Interrupted(f"stopped by {stop.signal_name}: {saved}")
    shape, left_out = " x ".join(map(str, manifest["shape"])), len(unreadable.reasons)
    about = f"{len(images) - left_out:,} images in {config.out} ({left_out} unreadable left out)"
    log.info("features of %s, %s numbers each", about, shape)
    return config.out


@torch.inference_mode()
def _compute_features(
    config: EmbedConfig, backbone: BackboneWrapper, pixels: UInt8[Tensor, "B C H W"]
) -> Float[np.ndarray, "B ..."]:
    """Compute the features of a batch in the type that is stored.

    Raises:
        MapetError: a feature is not finite, or beyond float16's range.
    """
    if config.pool == "none":
        features = backbone.last_layer(pixels).flatten(2).transpose(1, 2)
    else:
        features = backbone.pooled_features(pixels, [backbone.num_layers], config.pool)[0]
    check_finite_features(features, backbone.name)
    if config.dtype == "float16" and float(features.abs().max()) > torch.finfo(torch.float16).max:
        raise MapetError(f"{backbone.name} gives features beyond float16's range: {option('dtype')} float32 holds them")
    return features.cpu().numpy().astype(config.dtype)


def _open_manifest(config: EmbedConfig, images: ImageList, backbone: BackboneWrapper) -> dict[str, Any]:
    """Read the manifest of the interrupted folder, or create a folder with room for the features.

    Raises:
        MapetError: the folder is of other images, another backbone or other options.
    """
    out = config.out
    settings = {
        "backbone": hash_weights(backbone.model.state_dict()), "pool": config.pool, "dtype": config.dtype,
        "image_size": list(backbone.image_size), "precision": backbone.compute.precision,
    }  # fmt: skip
    if config.resume and (out / files.MANIFEST).exists():
        manifest = files.read_manifest(out, KIND, FORMAT)
        now = {"images_hash": images.hash, "file_format": config.format, **settings}
        files.check_same_options(out, {key: manifest.get(key) for key in now} | manifest["settings"], now)
        return manifest
    if config.resume:  # stopped before its first manifest: nothing to keep
        for name in (ROWS, IDS):
            (out / name).unlink(missing_ok=True)
    files.create_output_dir(out)
    depth, height, width = backbone.map_shape
    shape = [height * width, depth] if config.pool == "none" else [depth]
    if config.format == "npy":
        files.create_array(out / ROWS, config.dtype, (len(images), *shape))
        files.write_json(out / IDS, [images.id(index) for index in range(len(images))])
    row_bytes = int(np.prod(shape)) * np.dtype(config.dtype).itemsize
    manifest = {
        "file_format": config.format, "settings": settings, "num_images": len(images), "images_hash": images.hash, "shape": shape,
        "dtype": config.dtype, "shard_size": max(1, SHARD_BYTES // row_bytes), "num_done": 0, "unreadable": {},
    }  # fmt: skip
    files.write_manifest(out, KIND, FORMAT, manifest)
    return manifest


def _write(
    folder: Path, images: ImageList, manifest: dict[str, Any], rows: list[np.ndarray], index: list[np.ndarray], end: int
) -> None:
    """Write the next images, up to `end`, of a shard.

    Args:
        rows: (m, ...) features, batch by batch.
        index: (m,) which images those are; the others are unreadable.
    """
    start = manifest["num_done"]
    if manifest["file_format"] == "npy":
        stored = files.read_array(folder / ROWS, "r+")
        stored[start:end] = np.nan
        for images_of_batch, features in zip(index, rows, strict=True):
            stored[images_of_batch] = features
        stored.flush()
    elif rows:
        import pyarrow
        import pyarrow.parquet

        column = pyarrow.array(np.concatenate(rows).reshape(-1))
        for length in reversed(manifest["shape"]):
            column = pyarrow.FixedSizeListArray.from_arrays(column, length)
        ids = [images.ids[i].decode("utf-8", "backslashreplace") for i in np.concatenate(index).tolist()]
        table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "features": column})
        number, within = divmod(start, manifest["shard_size"])
        name = f"part-{number:05d}{f'_{within:09d}' if within else ''}.parquet"  # in this order by name, too
        with files.atomic_write(folder / SHARDS / name) as temporary:
            pyarrow.parquet.write_table(table, temporary)
    manifest["num_done"] = end
    files.write_manifest(folder, KIND, FORMAT, manifest)


def read_embeddings(folder: Path) -> tuple[list[str], Float[np.ndarray, "n ..."]]:
    """(ids, features) of a finished folder of either format, without the unreadable images.

    Raises:
        MapetError: not such a folder, or an unfinished one.
    """
    manifest = files.read_manifest(folder, KIND, FORMAT)
    if manifest["num_done"] < manifest["num_images"]:
        done = f"{manifest['num_done']} of {manifest['num_images']} images"
        raise MapetError(f"{folder} is unfinished ({done}): `mapet embed --resume`")
    if manifest["file_format"] == "npy":
        good = [i for i in range(manifest["num_images"]) if str(i) not in manifest["unreadable"]]
        ids = json.loads((folder / IDS).read_text())
        return [ids[i] for i in good], files.read_array(folder / ROWS)[good]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / SHARDS, columns=["id", "features"])
    column = table["features"].combine_chunks()
    for _ in manifest["shape"]:
        column = column.flatten()
    return table["id"].to_pylist(), column.to_numpy(zero_copy_only=False).reshape(-1, *manifest["shape"])
