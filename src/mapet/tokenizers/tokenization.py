"""Write the visual tokens of all images into a token store, shard by shard, so that an interrupted job resumes."""

import logging
import math

import torch
from tqdm import tqdm

from mapet import distributed
from mapet.config.tokenizers import TokenizeConfig
from mapet.data.dataset import UnreadableImages, ViewDataset, inference_batch_size
from mapet.data.dataset_stats import warn_outside_range
from mapet.data.image_list import ImageList
from mapet.data.loader import load
from mapet.data.sources import list_as_trained
from mapet.data.token_store import TokenShard, TokenStore
from mapet.data.views import ViewSpec
from mapet.device import ComputeContext
from mapet.errors import Interrupted, pluralize
from mapet.files import MANIFEST, check_same_options, create_output_dir
from mapet.signals import stop_signals
from mapet.tokenizers.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("mapet")
NUM_VIEWS = {"center": 1, "center-flip": 2, "random-crop": 8}
"""Option `views` -> default number of stored views."""


def tokenize(config: TokenizeConfig) -> TokenStore:
    """Write the token ids of every image into `config.out`, a new token store or one that was interrupted, and return it.

    All ranks of a process group call it. A store has shards, files of consecutive images; each rank writes some of the unfinished ones. A
    shard records how many of its rows are written, also on a signal or an error: with `config.resume` the next call resumes after them.

    Args:
        config: options of `mapet tokenize`.

    Returns:
        The complete store, opened for reading. Unreadable images have a row of zeros and are listed in `store.unreadable`.

    Raises:
        Interrupted: one of `signals.STOP_SIGNALS` (Ctrl-C, kill, ...) stopped it after a batch; what was written is saved.
        MapetError: `config.out` is not empty and not to be resumed; the store is of other images, another tokenizer or other views; the
            tokenizer cannot be loaded (see `load_tokenizer`); too many images are unreadable; a feature is NaN or infinite.
    """
    compute = ComputeContext.from_options(config.device, "float32")  # the teacher has the precision it was fitted with
    tokenizer = load_tokenizer(config.tokenizer).to(compute.device)
    images = list_as_trained(config.images, config, tokenizer.read_options)
    teacher = tokenizer.teacher
    assert teacher is not None  # `load_tokenizer` makes it by default
    if distributed.rank() == 0:
        warn_outside_range(images, teacher.settings["channels"])
    store = _open_store(config, images, tokenizer)
    dataset = ViewDataset(images, store.view_spec, teacher.settings["channels"], teacher_size=teacher.image_size)
    unreadable = UnreadableImages(images, config.max_unreadable, dict(store.unreadable))  # an earlier call's count, too
    work = _unfinished_batches(store, max(1, inference_batch_size(teacher.image_size) // store.num_views))
    # All views of an image are in one batch.
    batches = [[(view, row) for row in rows for view in range(store.num_views)] for _, rows in work]
    rank, world_size = distributed.rank(), distributed.world_size()
    title = f"tokenize (rank {rank} of {world_size})" if world_size > 1 else "tokenize"
    disable = None if work else True  # None: the bar is shown on a terminal
    with (
        stop_signals("saving after this batch") as stop,
        tqdm(total=sum(len(rows) for _, rows in work), desc=title, unit="img", disable=disable) as bar,
    ):
        shard = work[0][0] if work else None
        try:
            for (shard, rows), batch in zip(work, load(dataset.batch, batches), strict=True):
                unreadable.add(batch.unreadable)
                tokens = torch.zeros(len(rows), store.num_views, math.prod(store.grid), dtype=torch.int64)
                if len(batch):  # without the unreadable images, whose ids stay 0
                    ids = tokenizer.quantize(teacher.batch_features(batch, images, compute)).flatten(1).cpu()
                    for index in batch.image_index.unique():
                        tokens[index - rows.start] = ids[batch.image_index == index]
                shard.write(tokens.numpy(), dict(batch.unreadable))
                bar.update(len(rows))
                if stop.signal_name:
                    raise Interrupted(f"stopped by {stop.signal_name}, saved")
        finally:  # also after an error
            if shard is not None and 0 < shard.num_done < shard.count:
                shard.save_progress()
    distributed.barrier()
    store = TokenStore.open(config.out, images, tokenizer.hash)
    UnreadableImages(images, config.max_unreadable).add([*store.unreadable.items()], quiet=True)  # those of all ranks
    log.info(
        "tokens of %s x %s in %s (%d unreadable, excluded)",
        pluralize(len(images) - len(store.unreadable), "image"), pluralize(store.num_views, "view"), config.out, len(store.unreadable),
    )  # fmt: skip
    return store


def _open_store(config: TokenizeConfig, images: ImageList, tokenizer: Tokenizer) -> TokenStore:
    """Open the token store `config.out` for writing; rank 0 creates it first, unless `config.resume` and it exists.

    Args:
        config: `out`, `resume`, `seed`, `views` and `num_views` (None: the default of `views`) are used.
        images: the store has a row for each, and records their hash.
        tokenizer: gives the hash, V, grid and view size that the store records.

    Returns:
        The store, open for writing.

    Raises:
        MapetError: the folder is not empty and not to be resumed, or the store is of other images, another tokenizer or other views.
    """
    size, num_views = tokenizer.student_size, config.num_views or NUM_VIEWS[config.views]
    spec = ViewSpec.from_config(config, size, config.seed)
    if distributed.rank() == 0 and not (config.resume and (config.out / MANIFEST).exists()):
        create_output_dir(config.out)
        TokenStore.create(config.out, images, tokenizer.hash, tokenizer.vocab_size, tokenizer.grid, spec, num_views)
    distributed.barrier()  # the store exists
    store = TokenStore.open(config.out, images, tokenizer.hash, writable=True)
    if (store.view_spec, store.num_views) != (spec, num_views):
        expected, actual = (
            {"num_views": views, **view_spec.model_dump(mode="json")}
            for views, view_spec in ((store.num_views, store.view_spec), (num_views, spec))
        )
        check_same_options(config.out, expected, actual)
    distributed.barrier()  # every rank has checked before one writes
    return store


def _unfinished_batches(store: TokenStore, batch_size: int) -> list[tuple[TokenShard, range]]:
    """Return the batches that this rank has to write, as (shard, rows of the store); every world_size-th unfinished shard is its own.

    Batches are in order of rows, begin after the rows that a shard has already, and never span two shards.

    Args:
        batch_size: rows of a batch; the last one of a shard may have fewer.
    """
    shards = [shard for shard in store.shards if not shard.is_done][distributed.rank() :: distributed.world_size()]
    return [
        (shard, range(start, min(start + batch_size, shard.first + shard.count)))
        for shard in shards
        for start in range(shard.first + shard.num_done, shard.first + shard.count, batch_size)
    ]
