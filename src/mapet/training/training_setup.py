"""From a resolved config to all that a step is made of: the same for training and for looking at a step again."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from mapet import distributed
from mapet.config.pretrain import PretrainConfig
from mapet.data.dataset import Batch, EpochSampler, ViewDataset
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.evaluation.features import normalize
from mapet.models.backbone import prepare_for_device
from mapet.models.losses import normalized_patches
from mapet.models.objectives import num_context_from_ratio
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.codebook import Tokenizer, load_tokenizer
from mapet.training.build import build_model
from mapet.training.sizing import automatic_batch_size


class TrainingSetup(NamedTuple):
    """What a config names, opened and built.

    Attributes:
        sampler: this process's share of all batches.
        dataset: the student's views, with tokens from the store or the teacher's views to make them of.
        bad: images that the store has no tokens of, with reasons.
    """

    config: PretrainConfig
    compute: Compute
    images: ImageList
    tokenizer: Tokenizer
    model: ViTForPreTraining
    sampler: EpochSampler
    dataset: ViewDataset
    bad: dict[int, str]

    @classmethod
    def from_config(cls, config: PretrainConfig) -> "TrainingSetup":
        """Automatic values that these depend on are resolved in `config`; a collective call."""
        compute = Compute.choose(config.device, config.precision)
        images = scan(config.images)
        tokenizer = load_tokenizer(
            config.tokenizer,
            with_teacher=config.tokens is None or config.target == "features",
            trusted_teacher=config.trust_teacher,
        ).to(compute.device)
        store = None if config.tokens is None else TokenStore.open(config.tokens, images, tokenizer.hash)
        bad = dict(store.unreadable) if store else {}
        model = prepare_for_device(build_model(config, tokenizer), compute)
        usable = np.setdiff1d(np.arange(len(images)), list(bad))
        batch_size = config.batch_size or distributed.broadcast(
            torch.tensor(automatic_batch_size(model, len(usable), compute, distributed.world_size()))
        )
        config = config.model_copy(
            update={
                "batch_size": int(batch_size),
            }
        )
        rank, number = distributed.rank(), distributed.world_size()
        sampler = EpochSampler(usable, int(batch_size), config.epochs, config.seed, 0, rank, number)
        return cls(
            config, compute, images, tokenizer, model, sampler, _views(config, images, tokenizer, store, model), bad
        )

    def prepare_batch(self, batch: Batch, step: int) -> Batch:
        """Put all that a step's gradient depends on but the weights into a batch that holds images, on the device."""
        model, batch = self.model, batch.to(self.compute.device)
        assert batch.images is not None
        images = normalize(batch.images, model.vit.in_chans, batch.jitter)
        targets = batch.targets
        if model.target == "pixels":
            targets = normalized_patches(images, model.vit.patch_embed.grid_size)
        elif model.target == "features":
            assert self.tokenizer.teacher is not None and batch.teacher_images is not None
            targets = self.tokenizer.teacher(batch.teacher_images).flatten(2).transpose(1, 2)
        elif targets is None:
            targets = self.tokenizer(batch.teacher_images).flatten(1)
        num_context = self.sample_num_context(step)
        indices = model.sample_target_indices(num_context, seed=[self.config.seed, step, 2])
        indices = None if indices is None else self.compute.to(indices)
        return replace(batch, images=images, targets=targets, num_context=num_context, target_indices=indices)

    def sample_num_context(self, step: int) -> int:
        """Return c of a step: fixed, or drawn from (seed, step) alone."""
        low, high = self.config.mask_ratio
        if low == high:
            return self.model.num_context
        ratio = np.random.default_rng([self.config.seed, step, 1]).uniform(low, high)
        return num_context_from_ratio(ratio, self.model.num_patches)


def _views(
    config: PretrainConfig, images: ImageList, tokenizer: Tokenizer, store: TokenStore | None, model: ViTForPreTraining
) -> ViewDataset:
    height, width = model.vit.patch_embed.img_size
    spec = (
        store.view_spec
        if store
        else ViewSpec(kind=config.views, image_size=(height, width), min_scale=config.min_crop_scale, seed=config.seed)
    )
    return ViewDataset(
        images,
        spec,
        channels=model.vit.in_chans,
        image_size=(height, width),
        teacher_size=None if tokenizer.teacher is None else tokenizer.teacher.image_size,
        store=store,
        grid=tuple(model.vit.patch_embed.grid_size),
        order=config.patch_order,
        jitter=config.color_jitter,
        num_branches=2 * len(model.vit.blocks) if config.drop_path else 0,
        seed=config.seed,
    )
