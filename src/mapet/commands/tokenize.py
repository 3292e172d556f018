"""Stage: every image's token ids, once, into a memory-mapped store."""

import logging
from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.tokenize import TokenizeConfig
from mapet.errors import Interrupted, MapetError, counted

if TYPE_CHECKING:
    from mapet.data.token_store import TokenStore

log = logging.getLogger("mapet")


@command(TokenizeConfig, distributed=True)
def tokenize(config: TokenizeConfig) -> "TokenStore":
    """Store the visual words of every image, bound to the codebook and the list of images.

    Example:
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens --views crop --num-views 8
    """
    import time

    import torch
    from tqdm import tqdm

    from mapet import distributed
    from mapet.data.dataset import Quarantine, ViewDataset, make_loader
    from mapet.data.sources import scan
    from mapet.data.token_store import MANIFEST, TokenStore
    from mapet.data.views import ViewSpec
    from mapet.device import Compute
    from mapet.files import new_folder
    from mapet.signals import stop_signals
    from mapet.tokenizers.codebook import load_tokenizer
    from mapet.tokenizers.extract import teacher_features

    compute = Compute.choose(config.device, "float32")
    images = scan(config.images)
    tokenizer = load_tokenizer(config.tokenizer, allow=config.teacher, checkpoint=config.teacher_checkpoint).to(
        compute.device
    )
    assert tokenizer.teacher is not None
    spec = ViewSpec(kind=config.views, image_size=tokenizer.student_size, min_scale=config.min_scale, seed=config.seed)
    num_views = config.num_views or {"center": 1, "flip": 2, "crop": 8}[config.views]
    if distributed.rank() == 0 and not (config.resume and (config.out / MANIFEST).exists()):
        new_folder(config.out, resume_hint=", or go on with --resume")
        TokenStore.create(config.out, images, tokenizer.hash, tokenizer.vocab_size, tokenizer.grid, spec, num_views)
    distributed.barrier()
    store = TokenStore.open(config.out, images, tokenizer.hash, writable=True)
    if (store.view_spec, store.num_views) != (spec, num_views):
        raise MapetError(
            f"{config.out} was begun with {store.num_views} views {store.view_spec.model_dump()}, now asked for {num_views} "
            f"{spec.model_dump()}: use the same options or a new --out"
        )
    distributed.barrier()  # all have looked before one writes

    dataset = ViewDataset(
        images, spec, tokenizer.description["teacher"]["channels"], teacher_size=tokenizer.teacher.image_size
    )
    quarantine = Quarantine(images, config.max_bad, dict(store.bad))
    per_batch = max(1, config.batch_size // num_views)
    parts = [part for part in store.parts if part.done < part.count][distributed.rank() :: distributed.world_size()]
    work = [
        (part, range(start, min(start + per_batch, part.first + part.count)))
        for part in parts
        for start in range(part.first + part.done, part.first + part.count, per_batch)
    ]
    batches = [[(view, row) for row in rows for view in range(num_views)] for _, rows in work]
    loader = make_loader(dataset, batches, config.num_workers)
    saved = time.monotonic()
    current = None
    several = f" (process 1 of {distributed.world_size()})" if distributed.world_size() > 1 else ""
    with (
        stop_signals("saving after this batch") as stop,
        tqdm(
            total=sum(len(rows) for _, rows in work),
            desc=f"tokenize{several}",
            unit="img",
            disable=None if work else True,
        ) as bar,
    ):
        try:
            for (part, rows), batch in zip(work, loader, strict=True):
                quarantine.add(batch.bad)
                tokens = torch.zeros(len(rows), num_views, tokenizer.grid[0] * tokenizer.grid[1], dtype=torch.int64)
                if len(batch.image_index):
                    features = teacher_features(tokenizer.teacher, batch, images, compute)
                    ids = tokenizer.name_features(features).flatten(1).cpu()
                    for index in batch.image_index.unique():  # a bad image has no rows in the batch
                        tokens[index - rows.start] = ids[batch.image_index == index]
                if not part.done:
                    store.begin(part)
                store.write(part, tokens.numpy(), dict(batch.bad))
                current = part
                bar.update(len(rows))
                if part.done == part.count or time.monotonic() - saved > 5:
                    store.save_progress(part)
                    saved = time.monotonic()
                if stop.asked:
                    raise Interrupted(f"stopped by {stop.asked}, saved")
        finally:
            if current:
                store.save_progress(current)
    distributed.barrier()
    store = TokenStore.open(config.out, images, tokenizer.hash)
    Quarantine(images, config.max_bad).add([*store.bad.items()], quiet=True)  # those that all processes met
    log.info(
        "tokens of %s x %s in %s (%d unreadable left out)",
        counted(len(images) - len(store.bad), "image"),
        counted(num_views, "view"),
        config.out,
        len(store.bad),
    )
    return store
