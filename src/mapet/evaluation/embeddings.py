"""Features of many images on disk, written in shards, so that an interrupted job can be resumed."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from mapet.config.evaluation import EmbedConfig
from mapet.data.dataset import Quarantine, ViewDataset, inference_batch_size, make_loader
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.errors import Interrupted, MapetError, how_to_install, option
from mapet.evaluation.features import must_be_finite_features, normalize, pool_tokens
from mapet.files import (
    MANIFEST,
    atomic,
    check_same_options,
    create_array,
    new_folder,
    read_array,
    read_manifest,
    write_json,
    write_manifest,
)
from mapet.models.backbone import load_backbone, prepare_for_device
from mapet.signals import stop_signals
from mapet.weights import hash_weights

log = logging.getLogger("mapet")

KIND, FORMAT = "folder of features", 1
ROWS, IDS, SHARDS = "features.npy", "ids.json", "features.parquet"
FileFormat = Literal["npy", "parquet"]
SHARD_BYTES = 32 << 20


def embed(config: EmbedConfig) -> Path:
    """Write the features of every image into `config.out`, a new folder or one that was interrupted; return the folder.

    Raises:
        Interrupted: a signal came; whole batches are saved.
        MapetError: the folder is of other images or options; features are not finite, or too large for `config.dtype`.
    """
    if config.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MapetError(
            f"{option('format')} parquet needs pyarrow: {how_to_install('export')}, or {option('format')} npy"
        )
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
    options: dict[str, Any] = {"img_size": config.image_size} if config.image_size else {}
    vit = prepare_for_device(load_backbone(config.backbone, **options), compute).eval()
    if config.pool == "token" and not vit.has_class_token:
        raise MapetError(f"this ViT has no class token: use {option('pool')} avg")
    size: tuple[int, int] = vit.patch_embed.img_size
    dataset = ViewDataset(images, ViewSpec(image_size=size), vit.in_chans, image_size=size)
    first = dataset.batch([(0, index) for index in range(min(len(images), 8))])
    if first.images is not None:
        _compute_features(config, vit, compute, first.images)  # what cannot be written is refused before anything is
    store = _open_store(config, images, vit, compute)
    unreadable = Quarantine(images, config.max_unreadable, dict(store.unreadable))
    batches = store.batches_to_do(inference_batch_size(size))
    rows, index = [], []  # of the batches that are not yet on disk
    with (
        stop_signals("stopping after this batch") as stop,
        tqdm(total=len(images), initial=store.num_done, desc="embed", unit="img", disable=None) as bar,
    ):
        for batch, positions in zip(make_loader(dataset, batches), batches, strict=True):
            unreadable.add(batch.bad)
            if batch.images is not None:
                rows.append(_compute_features(config, vit, compute, batch.images))
                index.append(batch.image_index.numpy())
            bar.update(len(positions))
            start, end = store.num_done, positions[-1][1] + 1
            if stop.signal_name or end == store.shard_end(start):
                bad = {i: reason for i, reason in unreadable.reasons.items() if start <= i < end}
                store.write(images, rows, index, bad, end)
                rows, index = [], []
            if stop.signal_name and store.num_done < len(images):
                raise Interrupted(
                    f"stopped by {stop.signal_name}: features of {store.num_done:,} of {len(images):,} images are saved"
                )
    log.info(
        "features of %s images in %s (%d unreadable left out), %s numbers each",
        f"{len(images) - len(store.unreadable):,}", config.out, len(store.unreadable), " x ".join(map(str, store.manifest["shape"])),
    )  # fmt: skip
    return config.out


@torch.inference_mode()
def _compute_features(
    config: EmbedConfig, vit: VisionTransformer, compute: Compute, pixels: UInt8[Tensor, "B C H W"]
) -> Float[np.ndarray, "B ..."]:
    """Compute the features of a batch in the type that is stored.

    Raises:
        MapetError: a feature is not finite, or beyond float16's range.
    """
    with compute.autocast():
        tokens = vit.forward_features(normalize(compute.to(pixels), vit.in_chans))
    tokens = tokens.float()
    patches, class_token = tokens[:, vit.num_prefix_tokens :], tokens[:, 0] if vit.has_class_token else None
    features = patches if config.pool == "none" else pool_tokens(patches, class_token, config.pool)
    must_be_finite_features(features, str(config.backbone))
    if config.dtype == "float16" and float(features.abs().max()) > torch.finfo(torch.float16).max:
        raise MapetError(
            f"{config.backbone} gives features beyond float16's range: {option('dtype')} float32 holds them"
        )
    return features.cpu().numpy().astype(config.dtype)


def _open_store(config: EmbedConfig, images: ImageList, vit: VisionTransformer, compute: Compute) -> "Embeddings":
    """Create the folder of features, or open the interrupted one."""
    settings = {
        "backbone": hash_weights(vit.state_dict()),
        "pool": config.pool,
        "dtype": config.dtype,
        "image_size": list(vit.patch_embed.img_size),
        "precision": compute.precision,
    }
    if config.resume and (config.out / MANIFEST).exists():
        return Embeddings.open(config.out, images, config.format, settings)
    if config.resume:  # stopped before its first manifest: nothing to keep
        for name in (ROWS, IDS):
            (config.out / name).unlink(missing_ok=True)
    new_folder(config.out, resume_hint=f", or go on with {option('resume', True)}")
    shape = (vit.patch_embed.num_patches, vit.embed_dim) if config.pool == "none" else (vit.embed_dim,)
    return Embeddings.create(config.out, images, config.format, shape, config.dtype, settings)


class Embeddings:
    """One row of features an image, in the order of the list.

    npy: `features.npy` (n, ...), rows of unreadable images are NaN; `ids.json` the ids. parquet: `features.parquet/part-*`
    with the columns `id` and `features`, without the unreadable. `manifest.json` says what made them, how many are done, and which could not be
    read.

    Attributes:
        manifest: file_format, settings, num_images, images_hash, shape and dtype of a row, shard_size, num_done, unreadable.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def create(
        cls,
        folder: Path,
        images: ImageList,
        format: FileFormat,
        shape: tuple[int, ...],
        dtype: str,
        settings: dict[str, Any],
    ) -> "Embeddings":
        """Reserve the space and write an empty manifest. The folder must exist.

        Args:
            settings: what the features depend on; they must be the same on resuming.
        """
        row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if format == "npy":
            create_array(folder / ROWS, dtype, (len(images), *shape))
            write_json(folder / IDS, [images.id(index) for index in range(len(images))])
        manifest = {
            "file_format": format, "settings": settings, "num_images": len(images), "images_hash": images.hash, "shape": list(shape),
            "dtype": dtype, "shard_size": max(1, SHARD_BYTES // row_bytes), "num_done": 0, "unreadable": {},
        }  # fmt: skip
        write_manifest(folder, KIND, FORMAT, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path, images: ImageList, format: FileFormat, settings: dict[str, Any]) -> "Embeddings":
        """Those that an interrupted job left.

        Raises:
            MapetError: they are of other images, another backbone or other options.
        """
        manifest = read_manifest(folder, KIND, FORMAT)
        now = {"images_hash": images.hash, "file_format": format, **settings}
        check_same_options(folder, {key: manifest.get(key) for key in now} | manifest["settings"], now)
        return cls(folder, manifest)

    @property
    def num_done(self) -> int:
        """Images whose features, or reasons to have none, are on disk."""
        return int(self.manifest["num_done"])

    @property
    def unreadable(self) -> dict[int, str]:
        """Index -> reason of the images that could not be read."""
        return {int(index): reason for index, reason in self.manifest["unreadable"].items()}

    def batches_to_do(self, batch_size: int) -> list[list[tuple[int, int]]]:
        """Return the (view 0, image) pairs of all batches that are left; none reaches over the end of a shard."""
        batches, start = [], self.num_done
        while start < self.manifest["num_images"]:
            end = min(start + batch_size, self.shard_end(start))
            batches.append([(0, index) for index in range(start, end)])
            start = end
        return batches

    def shard_end(self, start: int) -> int:
        """Return where the shard of image `start` ends."""
        size = int(self.manifest["shard_size"])
        return min((start // size + 1) * size, int(self.manifest["num_images"]))

    def write(
        self, images: ImageList, rows: list[np.ndarray], index: list[np.ndarray], unreadable: dict[int, str], end: int
    ) -> None:
        """Write the next images, up to `end`, of a shard.

        Args:
            rows: (m, ...) features, batch by batch.
            index: (m,) which images those are.
            unreadable: image -> reason of the others.
        """
        if self.manifest["file_format"] == "npy":
            stored = read_array(self.folder / ROWS, "r+")
            stored[self.num_done : end] = np.nan
            for images_of_batch, features in zip(index, rows, strict=True):
                stored[images_of_batch] = features
            stored.flush()
        elif rows:
            self._write_parquet(images, np.concatenate(rows), np.concatenate(index))
        self.manifest["unreadable"] |= {str(number): reason for number, reason in unreadable.items()}
        self.manifest["num_done"] = end
        write_manifest(self.folder, KIND, FORMAT, self.manifest)

    def _write_parquet(self, images: ImageList, rows: np.ndarray, index: np.ndarray) -> None:
        import pyarrow
        import pyarrow.parquet

        column = pyarrow.array(rows.reshape(-1))
        for length in reversed(self.manifest["shape"]):
            column = pyarrow.FixedSizeListArray.from_arrays(column, length)
        ids = pyarrow.array(
            [images.ids[i].decode("utf-8", "backslashreplace") for i in index.tolist()], pyarrow.string()
        )
        table = pyarrow.table({"id": ids, "features": column})
        number, within = divmod(self.num_done, self.manifest["shard_size"])
        name = f"part-{number:05d}{f'_{within:09d}' if within else ''}.parquet"  # in this order by name, too
        with atomic(self.folder / SHARDS / name) as temporary:
            pyarrow.parquet.write_table(table, temporary)


def read_embeddings(folder: Path) -> tuple[list[str], Float[np.ndarray, "n ..."]]:
    """(ids, features) of a finished folder of either format, without the unreadable images.

    Raises:
        MapetError: not such a folder, or an unfinished one.
    """
    manifest = read_manifest(folder, KIND, FORMAT)
    if manifest["num_done"] < manifest["num_images"]:
        raise MapetError(
            f"{folder} is unfinished ({manifest['num_done']} of {manifest['num_images']} images): `mapet embed --resume`"
        )
    if manifest["file_format"] == "npy":
        good = [i for i in range(manifest["num_images"]) if str(i) not in manifest["unreadable"]]
        ids = json.loads((folder / IDS).read_text())
        return [ids[i] for i in good], read_array(folder / ROWS)[good]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / SHARDS, columns=["id", "features"])
    column = table["features"].combine_chunks()
    for _ in manifest["shape"]:
        column = column.flatten()
    return table["id"].to_pylist(), column.to_numpy(zero_copy_only=False).reshape(-1, *manifest["shape"])
