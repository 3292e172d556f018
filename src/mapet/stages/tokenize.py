"""Stage: every image's token ids, once, into a memory-mapped store."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mapet.errors import MapetError
from mapet.recipe import Config, Source, shared_stage
from mapet.stages.options import BadImages, Loading

if TYPE_CHECKING:
    from mapet.data.token_store import TokenStore

log = logging.getLogger("mapet")


class Views(Config):
    """Which views of an image are tokenized and shown to the student."""

    views: Literal["center", "flip", "crop"] = "center"
    """center: largest centred box (the released recipe); flip: that and its mirror image; crop: random boxes, mirrored
    half the time."""
    min_scale: float = Field(0.2, gt=0, le=1)
    """Smallest random box, as a share of the centred one's area (for crop)."""


class TokenizeConfig(Views, Loading, BadImages):
    """Options of `tokenize`."""

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    tokenizer: Path
    """Folder made by `fit-tokenizer`."""
    out: Path
    """New folder for the token store."""
    num_views: PositiveInt | None = None
    """Views stored of each image; automatic: 1 for center, 2 for flip, 8 for crop."""
    seed: NonNegativeInt = 0
    """Seed of the views."""
    teacher: str | None = None
    """Only for a tokenizer that runs your own package.module:function: repeat its name to allow that."""
    teacher_checkpoint: str | None = None
    """The teacher's weights file, if it is no longer where it was when the tokenizer was fitted."""
    resume: bool = False
    """Go on with an unfinished store."""


@shared_stage
def tokenize(config: TokenizeConfig) -> "TokenStore":
    """Store the visual words of every image, bound to the codebook and the list of images.

    Example:
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens --views crop --num-views 8
    """
    import time

    import torch
    from tqdm import tqdm

    from mapet.compute import Compute
    from mapet.data.dataset import Quarantine, ViewDataset, make_loader
    from mapet.data.image_list import scan
    from mapet.data.token_store import MANIFEST, ROWS, TokenStore
    from mapet.data.views import ViewSpec
    from mapet.files import new_folder
    from mapet.tokenizer.codebook import load_tokenizer
    from mapet.tokenizer.extract import teacher_features

    compute = Compute.choose(config.device, "float32")
    images = scan(config.images)
    tokenizer = load_tokenizer(config.tokenizer, allow=config.teacher, checkpoint=config.teacher_checkpoint).to(
        compute.device
    )
    assert tokenizer.teacher is not None
    spec = ViewSpec(kind=config.views, image_size=tokenizer.student_size, min_scale=config.min_scale, seed=config.seed)
    num_views = config.num_views or {"center": 1, "flip": 2, "crop": 8}[config.views]
    if config.resume and (config.out / MANIFEST).exists():
        store = TokenStore.open(config.out, images, tokenizer.hash, writable=True)
        if (store.view_spec, store.num_views) != (spec, num_views):
            raise MapetError(
                f"{config.out} was begun with {store.num_views} views {store.view_spec.model_dump()}, now asked for {num_views} "
                f"{spec.model_dump()}: use the same options or a new --out"
            )
    else:
        if config.resume:  # stopped before its first manifest: nothing to keep
            (config.out / ROWS).unlink(missing_ok=True)
        new_folder(config.out, resume_hint=", or go on with --resume")
        store = TokenStore.create(
            config.out, images, tokenizer.hash, tokenizer.vocab_size, tokenizer.grid, spec, num_views
        )

    dataset = ViewDataset(
        images, spec, tokenizer.description["teacher"]["channels"], teacher_size=tokenizer.teacher.image_size
    )
    quarantine = Quarantine(images, config.max_bad, dict(store.bad))
    per_batch = max(1, config.batch_size // num_views)
    starts = range(store.done, len(images), per_batch)
    batches = [
        [(view, i) for i in range(s, min(s + per_batch, len(images))) for view in range(num_views)] for s in starts
    ]
    loader = make_loader(dataset, batches, config.num_workers)
    saved = time.monotonic()
    with tqdm(total=len(images), initial=store.done, desc="tokenize", unit="img", disable=None) as bar:
        try:
            for start, batch in zip(starts, loader, strict=True):
                quarantine.add(batch.bad)
                count = min(per_batch, len(images) - start)
                rows = torch.zeros(count, num_views, tokenizer.grid[0] * tokenizer.grid[1], dtype=torch.int64)
                if len(batch.image_index):
                    ids = (
                        tokenizer.name_features(teacher_features(tokenizer.teacher, batch, images, compute))
                        .flatten(1)
                        .cpu()
                    )
                    for index in batch.image_index.unique():  # a bad image has no rows in the batch
                        rows[index - start] = ids[batch.image_index == index]
                store.write(start, rows.numpy(), dict(batch.bad))
                bar.update(count)
                if time.monotonic() - saved > 5:
                    store.save_progress()
                    saved = time.monotonic()
        finally:
            store.save_progress()
    log.info(
        "tokens of %d images x %d views in %s (%d bad images left out)",
        len(images),
        num_views,
        config.out,
        len(store.bad),
    )
    return store
