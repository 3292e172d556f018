"""Tokenizing: every image's token ids, once, into a store."""

import logging

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm

from mapet import distributed
from mapet.config.tokenizers import TokenizeConfig
from mapet.data.dataset import Batch, Quarantine, ViewDataset, inference_batch_size, make_loader
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.token_store import TokenShard, TokenStore
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.errors import Interrupted, MapetError, counted, option
from mapet.files import MANIFEST, new_folder
from mapet.signals import stop_signals
from mapet.tokenizers.codebook import Tokenizer, load_tokenizer
from mapet.tokenizers.extract import teacher_features

log = logging.getLogger("mapet")
NUM_VIEWS = {"center": 1, "center-flip": 2, "random-crop": 8}
"""Default number of stored views."""


def tokenize(config: TokenizeConfig) -> TokenStore:
    """Write the token ids of every image into `config.out`, a new store or one that was interrupted.

    All ranks of a process group call it; each writes every n-th shard that is unfinished.

    Raises:
        Interrupted: a signal came; what is done is saved.
        MapetError: the store is of other images, another tokenizer or other views; too many images are unreadable.
    """
    compute = Compute.choose(config.device, "float32")  # the teacher has the precision it was fitted with
    images = scan(config.images)
    tokenizer = load_tokenizer(config.tokenizer, trusted_teacher=config.trust_teacher).to(compute.device)
    store = _open_store(config, images, tokenizer)
    assert tokenizer.teacher is not None
    channels = tokenizer.description["teacher"]["channels"]
    dataset = ViewDataset(images, store.view_spec, channels, teacher_size=tokenizer.teacher.image_size)
    unreadable = Quarantine(images, config.max_unreadable, dict(store.unreadable))
    work = _batches_to_do(store, max(1, inference_batch_size(tokenizer.teacher.image_size) // store.num_views))
    batches = [[(view, row) for row in rows for view in range(store.num_views)] for _, rows in work]
    several = f" (process 1 of {distributed.world_size()})" if distributed.world_size() > 1 else ""
    total, silent = sum(len(rows) for _, rows in work), None if work else True
    with (
        stop_signals("saving after this batch") as stop,
        tqdm(total=total, desc=f"tokenize{several}", unit="img", disable=silent) as bar,
        store.autosave(),
    ):
        loader = make_loader(dataset, batches)
        for (shard, rows), batch in zip(work, loader, strict=True):
            unreadable.add(batch.bad)
            store.write(shard, _token_ids(tokenizer, batch, rows, store, images, compute), dict(batch.bad))
            bar.update(len(rows))
            if stop.signal_name:
                raise Interrupted(f"stopped by {stop.signal_name}, saved")
    distributed.barrier()
    store = TokenStore.open(config.out, images, tokenizer.hash)
    Quarantine(images, config.max_unreadable).add([*store.unreadable.items()], quiet=True)  # those of all ranks
    log.info(
        "tokens of %s x %s in %s (%d unreadable left out)",
        counted(len(images) - len(store.unreadable), "image"), counted(store.num_views, "view"), config.out, len(store.unreadable),
    )  # fmt: skip
    return store


def _open_store(config: TokenizeConfig, images: ImageList, tokenizer: Tokenizer) -> TokenStore:
    """Open the store to write to; rank 0 creates it, unless an unfinished one is resumed."""
    spec = ViewSpec(
        kind=config.views, image_size=tokenizer.student_size, min_scale=config.min_crop_scale, seed=config.seed
    )
    num_views = config.num_views or NUM_VIEWS[config.views]
    if distributed.rank() == 0 and not (config.resume and (config.out / MANIFEST).exists()):
        new_folder(config.out, resume_hint=f", or go on with {option('resume', True)}")
        TokenStore.create(config.out, images, tokenizer.hash, tokenizer.vocab_size, tokenizer.grid, spec, num_views)
    distributed.barrier()
    store = TokenStore.open(config.out, images, tokenizer.hash, writable=True)
    if (store.view_spec, store.num_views) != (spec, num_views):
        raise MapetError(
            f"{config.out} was begun with {store.num_views} views {store.view_spec.model_dump()}, now asked for {num_views} "
            f"{spec.model_dump()}: use the same options or a new {option('out')}"
        )
    distributed.barrier()  # all have looked before one writes
    return store


def _batches_to_do(store: TokenStore, batch_size: int) -> list[tuple[TokenShard, range]]:
    """Return (shard, rows of the store) of each batch that this rank has to write."""
    shards = [shard for shard in store.shards if not shard.is_done][distributed.rank() :: distributed.world_size()]
    return [
        (shard, range(start, min(start + batch_size, shard.first + shard.count)))
        for shard in shards
        for start in range(shard.first + shard.num_done, shard.first + shard.count, batch_size)
    ]


def _token_ids(
    tokenizer: Tokenizer, batch: Batch, rows: range, store: TokenStore, images: ImageList, compute: Compute
) -> Int[np.ndarray, "n V N"]:
    """Compute the ids of all views of the store's `rows`; those of unreadable images, which the batch lacks, are 0."""
    assert tokenizer.teacher is not None
    tokens = torch.zeros(len(rows), store.num_views, store.grid[0] * store.grid[1], dtype=torch.int64)
    if len(batch):
        ids = tokenizer.quantize(teacher_features(tokenizer.teacher, batch, images, compute)).flatten(1).cpu()
        for index in batch.image_index.unique():
            tokens[index - rows.start] = ids[batch.image_index == index]
    return tokens.numpy()
