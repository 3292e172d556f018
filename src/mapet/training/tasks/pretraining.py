"""Pre-training: a ViT learns to predict the targets of hidden patches."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet import distributed
from mapet.config.pretrain import PretrainConfig
from mapet.data.census import FEW_IMAGES, few_images
from mapet.data.dataset import Batch, ViewDataset
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.errors import by, option
from mapet.evaluation.features import normalize
from mapet.evaluation.online import OnlineProbe
from mapet.models.backbone import format_num_params, prepare_for_device, save_backbone
from mapet.models.losses import normalized_patches
from mapet.models.objectives import num_context_from_ratio
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.codebook import Tokenizer, load_tokenizer
from mapet.training.build import build_model
from mapet.training.sizing import auto_batch_size, auto_micro_batch
from mapet.training.task import StepOutput, Task

log = logging.getLogger("mapet")


class PretrainingTask(Task[PretrainConfig, Path]):
    """MaPeT or another objective, on the tokens of a store or of a teacher in the loop."""

    command = "pretrain"
    base_lr, base_batch_size = 1.5e-3, 2048
    warmup_fraction = 1 / 30
    logs_per_epoch = 5
    model: ViTForPreTraining
    tokenizer: Tokenizer
    probe: OnlineProbe | None

    def build(self, config: PretrainConfig, compute: Compute) -> None:
        """Open images, tokenizer and tokens; automatic values that depend on them are resolved in `config`."""
        self.compute, images = compute, scan(config.images)
        needs_teacher = config.tokens is None or config.target == "features"
        self.tokenizer = load_tokenizer(
            config.tokenizer, with_teacher=needs_teacher, trusted_teacher=config.trust_teacher
        )
        self.tokenizer = self.tokenizer.to(compute.device)
        store = None if config.tokens is None else TokenStore.open(config.tokens, images, self.tokenizer.hash)
        self.bad = dict(store.unreadable) if store else {}
        self.model = prepare_for_device(build_model(config, self.tokenizer), compute)
        self.indices = np.setdiff1d(np.arange(len(images)), list(self.bad))
        auto = auto_batch_size(self.model, len(self.indices), compute, distributed.world_size())
        batch_size = config.batch_size or int(distributed.broadcast(torch.tensor(auto)))
        self.config = config = config.model_copy(update={"batch_size": batch_size})
        self.dataset = self._views(images, store)
        self.hashes = {"tokenizer_hash": self.tokenizer.hash, "images_hash": images.hash}
        self.num_counts = self.tokenizer.vocab_size if config.target == "tokens" else 0
        self.mean_names = ("token_accuracy",) if config.target == "tokens" else ()
        self.same_shapes = not config.varies_context
        self.probe = OnlineProbe.for_run(config, images, compute)
        self.description, self.facts = self._describe(), {"tokenizer": self.tokenizer.description}
        if store:
            spec = store.view_spec
            self.facts["views"] = {"kind": spec.kind, "min_scale": spec.min_scale, "number": store.num_views}
        if len(self.indices) < FEW_IMAGES:
            log.warning("%s", few_images(len(self.indices)))
        if config.tokens is None and config.target == "tokens":
            log.info(
                f"without {option('tokens')} the teacher runs in every step, on fresh views; `mapet tokenize` runs it once"
            )

    def _views(self, images: ImageList, store: TokenStore | None) -> ViewDataset:
        config, vit, teacher = self.config, self.model.vit, self.tokenizer.teacher
        size: tuple[int, int] = tuple(vit.patch_embed.img_size)
        spec = ViewSpec(kind=config.views, image_size=size, min_scale=config.min_crop_scale, seed=config.seed)
        return ViewDataset(
            images,
            store.view_spec if store else spec,
            channels=vit.in_chans,
            image_size=size,
            teacher_size=None if teacher is None else teacher.image_size,
            store=store,
            grid=tuple(vit.patch_embed.grid_size),
            order=config.patch_order,
            jitter=config.color_jitter,
            num_branches=2 * len(vit.blocks) if config.drop_path else 0,
            seed=config.seed,
        )

    def _describe(self) -> str:
        config, model = self.config, self.model
        upper = "up to " if config.varies_context else ""
        target = f"from {model.head.out_features} words" if config.target == "tokens" else f"as {config.target}"
        return (
            f"{config.model}, {format_num_params(model.vit)}, {config.objective} on {len(self.indices):,} images of "
            f"{by(model.vit.patch_embed.img_size)} px, {upper}{model.num_hidden} of {model.num_patches} patches predicted {target}"
        )

    @property
    def product_module(self) -> VisionTransformer:
        """The backbone."""
        return self.model.vit

    def build_model(self) -> VisionTransformer:
        """Build the backbone anew."""
        return prepare_for_device(build_model(self.config, self.tokenizer).vit, self.compute)

    def auto_micro_batch(self, local_batch_size: int) -> int:
        """Return what a CPU's cache holds; a GPU takes all."""
        return auto_micro_batch(self.model, local_batch_size, self.compute)

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Put all that a step's gradient depends on but the weights into a batch, on the device."""
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

    def loss(self, batch: Batch, step: int) -> StepOutput:
        """Compute the model's loss and, of tokens, accuracy and how often each occurs."""
        output = self.model(batch)
        if output.num_correct is None:
            return StepOutput(output.loss, output.loss_per_image)
        means = {"token_accuracy": output.num_correct / output.targets.numel()}
        counts = torch.bincount(output.targets.flatten(), minlength=self.num_counts)
        return StepOutput(output.loss, output.loss_per_image, means, counts)

    def summarize(self, counts: Int[Tensor, " V"], total_counts: Int[Tensor, " V"]) -> dict[str, float]:
        """Return the baselines over all targets so far.

        commonest_token: the token accuracy of always predicting the commonest token. token_entropy: the loss of predicting by
        frequency alone, nats.
        """
        if not total_counts.any():
            return {}
        frequency = total_counts.double() / total_counts.sum()
        entropy = float(-(frequency * frequency.clamp_min(1e-12).log()).sum())
        return {"commonest_token": float(frequency.max()), "token_entropy": entropy}

    @staticmethod
    def format_metrics(metrics: dict[str, float]) -> str:
        """Return loss and accuracy, each beside its baseline."""
        text = f"loss {metrics['loss']:.3f}"
        if "token_entropy" in metrics:
            text += (
                f" (by frequency {metrics['token_entropy']:.3f}), accuracy {metrics['token_accuracy']:.1%} "
                f"(commonest {metrics['commonest_token']:.1%})"
            )
        return text

    def evaluate(self, module: VisionTransformer, epoch: int) -> dict[str, float]:
        """Probe the frozen backbone with labeled images, about five times a run."""
        if self.probe is None or not self.probe.due(epoch, self.config.epochs):
            return {}
        return self.probe(module)

    @staticmethod
    def format_scores(scores: dict[str, float]) -> str:
        """Return the scores of the online probe."""
        return OnlineProbe.line(scores)

    def infer(self, module: VisionTransformer, batch: Batch) -> list[Tensor]:
        """Return the backbone's features."""
        assert batch.images is not None
        return [module.forward_features(normalize(batch.images, module.in_chans))]

    def finish(self, module: VisionTransformer) -> Path:
        """Save the backbone; returns its folder."""
        backbone = self.config.out / "backbone"
        if not backbone.exists():
            save_backbone(module.eval().cpu(), backbone)
        log.info("backbone saved in %s", backbone)
        return backbone
