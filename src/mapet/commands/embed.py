"""Stage: features of a folder of images, by any backbone."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet.commands.command import command
from mapet.config.embed import EmbedConfig
from mapet.errors import Interrupted, MapetError, how_to_install

if TYPE_CHECKING:
    from mapet.data.image_list import ImageList
    from mapet.evaluation.embeddings import Embeddings

log = logging.getLogger("mapet")


@command(EmbedConfig)
def embed(config: EmbedConfig) -> Path:
    """Features of every image by a frozen backbone, with ids, as NumPy or Parquet files; an interrupted job goes on.

    Example:
      mapet embed --backbone runs/photos --images PHOTOS --out features
      mapet embed --backbone timm:vit_small_patch16_224.augreg_in21k --images PHOTOS --out features --format parquet --pool token
      mapet embed --backbone runs/photos --images PHOTOS --out features --resume
    """
    import importlib.util

    import torch
    from tqdm import tqdm

    from mapet.data.dataset import Quarantine, ViewDataset, collate, in_order, make_loader
    from mapet.data.sources import scan
    from mapet.data.views import ViewSpec
    from mapet.device import Compute
    from mapet.evaluation.features import must_be_finite_features, normalize, pool_tokens
    from mapet.models.backbone import load_backbone, on_device
    from mapet.signals import stop_signals
    from mapet.weights import hash_weights

    if config.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MapetError(f"--format parquet needs pyarrow: {how_to_install('export')}, or --format npy")
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
    options = config.model_args | ({"img_size": config.image_size} if config.image_size else {})
    vit = on_device(load_backbone(config.backbone, **options), compute).eval()
    if config.pool == "token" and not vit.has_class_token:
        raise MapetError("this ViT has no class token: use --pool avg")
    height, width = vit.patch_embed.img_size
    settings = {
        "backbone": hash_weights(vit.state_dict()),
        "pool": config.pool,
        "dtype": config.dtype,
        "image_size": [height, width],
        "precision": compute.precision,
    }
    shape = (vit.patch_embed.num_patches, vit.embed_dim) if config.pool == "none" else (vit.embed_dim,)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        with compute.autocast():
            tokens = vit.forward_features(normalize(compute.to(pixels), vit.in_chans))
        tokens = tokens.float()
        found = tokens[:, vit.num_prefix_tokens :] if config.pool == "none" else pool_tokens(vit, tokens, config.pool)
        must_be_finite_features(found, str(config.backbone))
        if config.dtype == "float16" and float(found.abs().max()) > torch.finfo(torch.float16).max:
            raise MapetError(f"{config.backbone} gives features beyond float16's range: --dtype float32 holds them")
        return found.cpu()

    dataset = ViewDataset(images, ViewSpec(image_size=(height, width)), vit.in_chans, image_size=(height, width))
    first = collate([dataset[0, index] for index in range(min(len(images), 8))])
    if first.image is not None:
        with torch.inference_mode():
            features(first.image)  # what can't be written is refused before anything is
    store = _store(config, images, settings, shape)
    quarantine = Quarantine(images, config.max_bad, dict(store.bad))
    batches = in_order(len(images), config.batch_size, store.done)
    rows, index = torch.empty(0, *shape), torch.empty(0, dtype=torch.int64)  # computed and not yet on disk
    read = store.done
    with (
        stop_signals("stopping after this batch") as stop,
        tqdm(total=len(images), initial=read, desc="embed", unit="img", disable=None) as bar,
        torch.inference_mode(),
    ):
        for batch, numbers in zip(make_loader(dataset, batches, config.num_workers), batches, strict=True):
            quarantine.add(batch.bad)
            if batch.image is not None:
                rows, index = torch.cat([rows, features(batch.image)]), torch.cat([index, batch.image_index])
            read += len(numbers)
            bar.update(len(numbers))
            while store.done < read and (stop.asked or store.part_end(store.done) <= read):
                start, end = store.done, min(store.part_end(store.done), read)
                here = index < end
                bad = {i: reason for i, reason in quarantine.reasons.items() if start <= i < end}
                store.write(images, rows[here].numpy().astype(config.dtype), index[here].numpy(), bad, end)
                rows, index = rows[~here], index[~here]
            if stop.asked and store.done < len(images):
                raise Interrupted(
                    f"stopped by {stop.asked}: features of {store.done:,} of {len(images):,} images are saved"
                )
    log.info(
        "features of %s images in %s (%d unreadable left out), %s numbers each",
        f"{len(images) - len(store.bad):,}",
        config.out,
        len(store.bad),
        " x ".join(map(str, shape)),
    )
    return config.out


def _store(config: EmbedConfig, images: "ImageList", settings: dict[str, Any], shape: tuple[int, ...]) -> "Embeddings":
    """A new one, or the interrupted one."""
    from mapet.evaluation.embeddings import IDS, MANIFEST, ROWS, Embeddings
    from mapet.files import new_folder

    if config.resume and (config.out / MANIFEST).exists():
        return Embeddings.open(config.out, images, config.format, settings)
    if config.resume:  # stopped before its first manifest: nothing to keep
        for name in (ROWS, IDS):
            (config.out / name).unlink(missing_ok=True)
    new_folder(config.out, resume_hint=", or go on with --resume")
    return Embeddings.create(config.out, images, config.format, shape, config.dtype, settings)
