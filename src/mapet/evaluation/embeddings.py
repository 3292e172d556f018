"""Features of many images on disk, written in parts, so that an interrupted job can be resumed."""

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from mapet.config.embed import EmbedConfig
from mapet.data.dataset import Quarantine, ViewDataset, make_loader
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.errors import Interrupted, MapetError, how_to_install
from mapet.evaluation.features import must_be_finite_features, normalize, pool_tokens
from mapet.files import atomic, check_format, new_folder, read_array, read_json, reserve, write_json
from mapet.models.backbone import load_backbone, prepare_for_device
from mapet.signals import stop_signals
from mapet.weights import hash_weights

log = logging.getLogger("mapet")

MANIFEST, ROWS, IDS, PARTS = "embed.json", "features.npy", "ids.json", "features.parquet"
VERSION = 1
FileFormat = Literal["npy", "parquet"]
PART_BYTES = 32 << 20


def embed(config: EmbedConfig) -> Path:
    """Write the features of every image into `config.out`, a new folder or one that was interrupted; return the folder.

    Raises:
        Interrupted: a signal came; whole batches are saved.
        MapetError: the folder is of other images or options; features are not finite, or too large for `config.dtype`.
    """
    if config.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MapetError(f"--format parquet needs pyarrow: {how_to_install('export')}, or --format npy")
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
    options = config.model_args | ({"img_size": config.image_size} if config.image_size else {})
    vit = prepare_for_device(load_backbone(config.backbone, **options), compute).eval()
    if config.pool == "token" and not vit.has_class_token:
        raise MapetError("this ViT has no class token: use --pool avg")
    size: tuple[int, int] = vit.patch_embed.img_size
    dataset = ViewDataset(images, ViewSpec(image_size=size), vit.in_chans, image_size=size)
    first = dataset.batch([(0, index) for index in range(min(len(images), 8))])
    if first.images is not None:
        _compute_features(config, vit, compute, first.images)  # what cannot be written is refused before anything is
    store = _open_store(config, images, vit, compute)
    unreadable = Quarantine(images, config.max_unreadable, dict(store.bad))
    batches = store.batches_to_do(config.batch_size)
    rows, index = [], []  # of the batches that are not yet on disk
    with (
        stop_signals("stopping after this batch") as stop,
        tqdm(total=len(images), initial=store.done, desc="embed", unit="img", disable=None) as bar,
    ):
        for batch, positions in zip(make_loader(dataset, batches, config.num_workers), batches, strict=True):
            unreadable.add(batch.bad)
            if batch.images is not None:
                rows.append(_compute_features(config, vit, compute, batch.images))
                index.append(batch.image_index.numpy())
            bar.update(len(positions))
            start, end = store.done, positions[-1][1] + 1
            if stop.signal_name or end == store.part_end(start):
                bad = {i: reason for i, reason in unreadable.reasons.items() if start <= i < end}
                store.write(images, rows, index, bad, end)
                rows, index = [], []
            if stop.signal_name and store.done < len(images):
                raise Interrupted(
                    f"stopped by {stop.signal_name}: features of {store.done:,} of {len(images):,} images are saved"
                )
    log.info(
        "features of %s images in %s (%d unreadable left out), %s numbers each",
        f"{len(images) - len(store.bad):,}", config.out, len(store.bad), " x ".join(map(str, store.manifest["shape"])),
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
    features = tokens[:, vit.num_prefix_tokens :] if config.pool == "none" else pool_tokens(vit, tokens, config.pool)
    must_be_finite_features(features, str(config.backbone))
    if config.dtype == "float16" and float(features.abs().max()) > torch.finfo(torch.float16).max:
        raise MapetError(f"{config.backbone} gives features beyond float16's range: --dtype float32 holds them")
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
    new_folder(config.out, resume_hint=", or go on with --resume")
    shape = (vit.patch_embed.num_patches, vit.embed_dim) if config.pool == "none" else (vit.embed_dim,)
    return Embeddings.create(config.out, images, config.format, shape, config.dtype, settings)


class Embeddings:
    """One row of features an image, in the order of the list.

    npy: `features.npy` (n, ...), rows of unreadable images are NaN; `ids.json` the ids. parquet: `features.parquet/part-*`
    with the columns `id` and `features`, without the unreadable. `embed.json` says what made them, what is done, and which could not be
    read.

    Attributes:
        manifest: version, format, settings, num_images, images_hash, shape and dtype of a row, part (images in one), done, bad.
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
            np.lib.format.open_memmap(folder / ROWS, mode="w+", dtype=np.dtype(dtype), shape=(len(images), *shape))
            try:
                with open(folder / ROWS, "r+b") as file:
                    reserve(file, os.fstat(file.fileno()).st_size, folder / ROWS)
            except MapetError:
                (folder / ROWS).unlink()
                raise
            write_json(folder / IDS, [images.id(index) for index in range(len(images))])
        manifest = {
            "version": VERSION, "format": format, "settings": settings, "num_images": len(images), "images_hash": images.hash, "shape": list(shape),
            "dtype": dtype, "part": max(1, PART_BYTES // row_bytes), "done": 0, "bad": {},
        }  # fmt: skip
        write_json(folder / MANIFEST, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path, images: ImageList, format: FileFormat, settings: dict[str, Any]) -> "Embeddings":
        """Those that an interrupted job left.

        Raises:
            MapetError: they are of other images, another backbone or other options.
        """
        manifest = _manifest(folder)
        now = {"images_hash": images.hash, "format": format, **settings}
        before = {"images_hash": manifest["images_hash"], "format": manifest["format"], **manifest["settings"]}
        changed = [
            f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}"
            for key in now | before
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise MapetError(
                f"{folder} was begun with other options ({'; '.join(changed)}): use the same, or a new --out"
            )
        return cls(folder, manifest)

    @property
    def done(self) -> int:
        """Images whose features, or whose badness, are on disk."""
        return int(self.manifest["done"])

    @property
    def bad(self) -> dict[int, str]:
        """Index -> reason of the images that could not be read."""
        return {int(index): reason for index, reason in self.manifest["bad"].items()}

    def batches_to_do(self, batch_size: int) -> list[list[tuple[int, int]]]:
        """Return the (view 0, image) pairs of all batches that are left; none reaches over the end of a part."""
        batches, start = [], self.done
        while start < self.manifest["num_images"]:
            end = min(start + batch_size, self.part_end(start))
            batches.append([(0, index) for index in range(start, end)])
            start = end
        return batches

    def part_end(self, start: int) -> int:
        """Where the part that begins at image `start` ends."""
        part = int(self.manifest["part"])
        return min((start // part + 1) * part, int(self.manifest["num_images"]))

    def write(
        self, images: ImageList, rows: list[np.ndarray], index: list[np.ndarray], bad: dict[int, str], end: int
    ) -> None:
        """Write the next images, up to `end`, of a part.

        Args:
            rows: (m, ...) features, batch by batch.
            index: (m,) which images those are.
            bad: image -> reason of the others.
        """
        if self.manifest["format"] == "npy":
            stored = read_array(self.folder / ROWS, "r+")
            stored[self.done : end] = np.nan
            for images_of_batch, features in zip(index, rows, strict=True):
                stored[images_of_batch] = features
            stored.flush()
        elif rows:
            self._write_parquet(images, np.concatenate(rows), np.concatenate(index))
        self.manifest["bad"] |= {str(number): reason for number, reason in bad.items()}
        self.manifest["done"] = end
        write_json(self.folder / MANIFEST, self.manifest)

    def _write_parquet(self, images: ImageList, rows: np.ndarray, index: np.ndarray) -> None:
        import pyarrow
        import pyarrow.parquet

        column = pyarrow.array(rows.reshape(-1))
        for length in reversed(self.manifest["shape"]):
            column = pyarrow.FixedSizeListArray.from_arrays(column, length)
        ids = pyarrow.array(
            [images.id_bytes(i).decode("utf-8", "backslashreplace") for i in index.tolist()], pyarrow.string()
        )
        table = pyarrow.table({"id": ids, "features": column})
        number, within = divmod(self.done, self.manifest["part"])
        name = f"part-{number:05d}{f'_{within:09d}' if within else ''}.parquet"  # in this order by name, too
        with atomic(self.folder / PARTS / name) as temporary:
            pyarrow.parquet.write_table(table, temporary)


def _short(value: Any) -> str:
    """Of a hash its first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(folder / MANIFEST, "folder of features")
    check_format(manifest.get("version", 1), VERSION, "folder of features", folder)
    return manifest


def read_embeddings(folder: Path) -> tuple[list[str], Float[np.ndarray, "n ..."]]:
    """(ids, features) of a finished folder of either format, without the unreadable images.

    Raises:
        MapetError: not such a folder, or an unfinished one.
    """
    manifest = _manifest(folder)
    if manifest["done"] < manifest["num_images"]:
        raise MapetError(
            f"{folder} is unfinished ({manifest['done']} of {manifest['num_images']} images): `mapet embed --resume`"
        )
    if manifest["format"] == "npy":
        good = [i for i in range(manifest["num_images"]) if str(i) not in manifest["bad"]]
        ids = json.loads((folder / IDS).read_text())
        return [ids[i] for i in good], read_array(folder / ROWS)[good]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / PARTS, columns=["id", "features"])
    column = table["features"].combine_chunks()
    for _ in manifest["shape"]:
        column = column.flatten()
    return table["id"].to_pylist(), column.to_numpy(zero_copy_only=False).reshape(-1, *manifest["shape"])
