"""Stage: pictures of the tokenizer and of what the model learned."""

import logging
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from mapet.recipe import stage
from mapet.stages.options import Device

log = logging.getLogger("mapet")


class InspectConfig(Device):
    """Options of `inspect`."""

    run: Path
    """Run folder of `pretrain` or `run`."""
    out: Path
    """New folder for the pictures."""
    images: Path | None = None
    """Folder of images, or text file of paths; automatic: those the run was trained on."""
    num_images: PositiveInt = 6
    """Images shown."""
    seed: NonNegativeInt = 0
    """Seed of the choice of images and of the order of prediction."""
    teacher: str | None = None
    """Only for a tokenizer that runs your own package.module:function: repeat its name to allow that."""


@stage
def inspect(config: InspectConfig) -> list[Path]:
    """Draw token maps, patches that share a word, the visibility table, predictions and attention, as PNG.

    Example:
      mapet inspect --run runs/photos --out pictures
    """
    import matplotlib
    import numpy as np
    import torch

    from mapet.compute import Compute
    from mapet.data.dataset import ViewDataset, collate
    from mapet.data.image_list import scan
    from mapet.data.views import ViewSpec
    from mapet.errors import MapetError
    from mapet.evaluation.features import normalize
    from mapet.files import atomic, new_folder
    from mapet.report import pictures
    from mapet.stages.pretrain import PretrainConfig
    from mapet.training.build import load_run

    matplotlib.use("Agg")
    compute = Compute.choose(config.device, "float32")
    _, tokenizer, model = run = load_run(config.run, PretrainConfig, with_teacher=True, allow=config.teacher)
    assert tokenizer.teacher is not None
    tokenizer.to(compute.device)
    model.to(compute.device)
    vit = model.vit
    images = scan(config.images or run.config.images)
    rng = np.random.default_rng(config.seed)
    height, width = vit.patch_embed.img_size
    dataset = ViewDataset(
        images, ViewSpec(image_size=(height, width)), vit.in_chans, (height, width), tokenizer.teacher.image_size,
        grid=tokenizer.grid, order=run.config.order, seed=config.seed,
    )  # fmt: skip
    new_folder(config.out, create=False)

    # Enough patches to show what a word means: about 60 of each.
    wanted = min(len(images), max(config.num_images, -(-60 * tokenizer.vocab_size // model.num_patches)), 2000)
    batch = collate([dataset[0, int(i)] for i in rng.permutation(len(images))[:wanted]])
    if batch.image is None or batch.teacher_image is None or batch.permutation is None:
        raise MapetError(f"none of the images tried in {images.root} could be read; `mapet check` says why")
    with torch.inference_mode():
        tokens = torch.cat([tokenizer(compute.to(part)).flatten(1).cpu() for part in batch.teacher_image.split(64)])
        shown = slice(0, config.num_images)
        normal = normalize(compute.to(batch.image[shown]), vit.in_chans)
        logits = model.predict(normal, compute.to(batch.permutation[shown])).cpu()
        attention = pictures.attention_of_cls(vit, normal).cpu() if vit.has_class_token else None
    grid, vocab_size = tokenizer.grid, tokenizer.vocab_size
    patches = pictures.patchify(batch.image, grid).flatten(0, 1)
    prototypes = pictures.mean_patches(patches, tokens.flatten(), vocab_size)
    sample = batch.image[shown], tokens[shown]
    figures = {
        "token_maps": pictures.token_maps(*sample, grid, vocab_size),
        "words": pictures.code_montage(patches, tokens.flatten(), vocab_size),
        "visibility": pictures.visibility_table(model.layout().table, model.layout().lengths, model.objective.name),
    }
    if model.target == "tokens":
        figures["predictions"] = pictures.predictions(*sample, batch.permutation[shown], logits, prototypes, grid)
    if attention is not None:
        figures["cls_attention"] = pictures.cls_attention(batch.image[shown], attention, grid)
    with atomic(config.out) as temporary:
        temporary.mkdir()
        for name, figure in figures.items():
            figure.savefig(temporary / f"{name}.png", dpi=120)
            matplotlib.pyplot.close(figure)
    paths = [config.out / f"{name}.png" for name in figures]
    log.info("pictures in %s: %s", config.out, ", ".join(path.name for path in paths))
    return paths
