"""Pre-training: a ViT learns to predict the targets of hidden patches."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet import distributed
from mapet.config.base import build_config, read_config
from mapet.config.pretraining import PretrainConfig
from mapet.config.tokenizers import FitTokenizerConfig
from mapet.data.dataset import Batch, ViewDataset
from mapet.data.dataset_stats import FEW_IMAGES, few_images
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec, normalize
from mapet.device import ComputeContext, free_memory
from mapet.errors import format_size, option
from mapet.evaluation.datasets import LabeledSet, labeled
from mapet.evaluation.probes import online_probe, sample_for_probe
from mapet.models.backbone import create_vit, format_num_params, init_from, prepare_for_device, save_backbone
from mapet.models.objectives import CAE, get_objective, num_context_from_ratio
from mapet.models.pretraining import ContextAutoencoder, ViTForPreTraining, normalized_patches
from mapet.run_state import check_is_pretraining, pretrain_folder, resolve_run_path
from mapet.tokenizers.tokenizer import Tokenizer, load_tokenizer
from mapet.training.checkpoint import check_fingerprints, load_checkpoint
from mapet.training.task import StepOutput, Task

log = logging.getLogger("mapet")
CACHE = 6 << 20
"""Bytes of one activation that a CPU's caches hold beside what it is made from (measured: python -m benchmarks training_step)."""


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> ViTForPreTraining:
    """The ViT and its token head, with the weights that `seed` or `init_from` give.

    Raises:
        MapetError: unknown model or objective, sizes that don't fit, weights that can't be started from.
    """
    teacher, feature_size = tokenizer.description["teacher"], tokenizer.description["feature_size"]
    sizes = tokenizer.student_size, teacher["patch_size"], teacher["channels"]
    return _build_model(config, *sizes, tokenizer.vocab_size, feature_size)


def check_model_config(config: PretrainConfig, fitting: FitTokenizerConfig) -> None:
    """Raises MapetError as `build_model` does, for a tokenizer that `fit-tokenizer` is to make with the config `fitting`."""
    _build_model(config, fitting.image_size, fitting.patch_size, fitting.channels, fitting.vocab_size or 2, 1)


def _build_model(
    config: PretrainConfig, image_size: tuple[int, int], patch_size: int, channels: int, vocab_size: int, features: int
) -> ViTForPreTraining:
    torch.manual_seed(config.seed)
    args = {"init_values": config.layer_scale_init} if config.layer_scale_init else {}
    vit = create_vit(config.model, image_size, patch_size, channels, args | config.model_args, config.drop_path)
    num_patches, objective = vit.patch_embed.num_patches, get_objective(config.objective)
    values = {"tokens": vocab_size, "pixels": channels * patch_size**2, "features": features}[config.target]
    options: dict[str, Any] = {
        "num_context": num_context_from_ratio(config.mask_ratio[1], num_patches),  # of a sampled ratio, the fewest
        "num_predict": config.num_predict,
        "target": config.target,
        "separate_query_token": config.separate_query_token,
    }
    if objective is CAE:
        model: ViTForPreTraining = ContextAutoencoder(vit, values, **options)
    else:
        model = ViTForPreTraining(vit, values, objective, **options)
    if config.init_from:
        init_from(vit, config.init_from)
    return model


class LoadedRun(NamedTuple):
    """What a pre-training run folder holds; `model` has its newest weights."""

    config: PretrainConfig
    tokenizer: Tokenizer
    model: ViTForPreTraining


def load_run(folder: Path, with_teacher: bool = False, allow: str | None = None) -> LoadedRun:
    """Read a run folder of `pretrain`, or of `run`.

    Raises:
        MapetError: it isn't one, its tokenizer is gone or another one, or it has no usable checkpoint.
    """
    check_is_pretraining(folder)
    folder = pretrain_folder(folder)
    recipe = read_config(folder / "config.yaml")
    found = {option: resolve_run_path(folder, recipe, option) for option in ("images", "tokenizer")}
    config = build_config(PretrainConfig, recipe | found, folder / "config.yaml")
    tokenizer = load_tokenizer(config.tokenizer, with_teacher, allow)
    check_fingerprints(folder / "checkpoints", {"tokenizer_hash": tokenizer.hash})
    model = build_model(config, tokenizer)
    load_checkpoint(folder / "checkpoints", model)
    return LoadedRun(config, tokenizer, model.eval())


def bytes_per_image(model: ViTForPreTraining, compute: ComputeContext) -> int:
    """Activations kept for the backward pass of one image, a coarse count.

    With plain attention about 34 numbers of width D a row and block (norms, qkv, attention output, MLP with GELU) and 3 of
    each attention score; with a GPU's fused one no score, and 17 to 18 numbers (measured on ViT-T, S and B: docs/performance.md),
    to which LayerScale adds two.
    """
    vit, rows = model.vit, sum(model.layout().segment_lengths.values())
    numbers, scores = (20, 0) if compute.device.type == "cuda" else (34, 3)
    per_block = numbers * rows * vit.embed_dim + scores * vit.blocks[0].attn.num_heads * rows * rows
    return len(vit.blocks) * compute.dtype.itemsize * per_block


def auto_micro_batch(model: ViTForPreTraining, batch_size: int, compute: ComputeContext) -> int:
    """Images at a time within a step: all on a GPU; on a CPU so many that the widest activation stays in its cache."""
    if compute.device.type != "cpu":
        return batch_size
    rows = sum(model.layout().segment_lengths.values())
    widest = rows * model.vit.blocks[0].mlp.fc1.out_features * compute.dtype.itemsize
    return max(1, min(batch_size, CACHE // widest))


def auto_batch_size(model: ViTForPreTraining, num_images: int, compute: ComputeContext, processes: int = 1) -> int:
    """The largest power of two up to the paper's 2048 that takes at most 60 % of a GPU's free memory and leaves 20 steps an epoch.

    Args:
        processes: that share the batch, each with such a device.
    """
    most = max(1, min(2048, max(16, num_images // 20), num_images))
    if compute.device.type == "cpu":
        most = min(most, 256)  # more doesn't make it faster; what memory holds is up to the micro-batch
    else:
        fits = processes * (int(0.6 * free_memory(compute.device)) // bytes_per_image(model, compute))
        most = max(1, min(most, fits))
    return 1 << (most.bit_length() - 1)


class PretrainingTask(Task[PretrainConfig, Path]):
    """MaPeT or another objective, on the tokens of a store or of a teacher in the loop."""

    command = "pretrain"
    base_lr, base_batch_size = 1.5e-3, 2048
    warmup_fraction = 1 / 30
    logs_per_epoch = 5
    model: ViTForPreTraining
    tokenizer: Tokenizer
    probe_sets: tuple[LabeledSet, LabeledSet] | None = None

    def build(self, config: PretrainConfig, compute: ComputeContext) -> None:
        """Open images, tokenizer and tokens; automatic values that depend on them are resolved in `config`."""
        self.compute, images = compute, list_images(config.images)
        needs_teacher = config.tokens is None or config.target == "features"
        tokenizer = load_tokenizer(config.tokenizer, needs_teacher, config.trust_teacher).to(compute.device)
        store = None if config.tokens is None else TokenStore.open(config.tokens, images, tokenizer.hash)
        self.bad = dict(store.unreadable) if store else {}
        self.tokenizer, self.model = tokenizer, prepare_for_device(build_model(config, tokenizer), compute)
        self.indices = np.setdiff1d(np.arange(len(images)), list(self.bad))
        auto = auto_batch_size(self.model, len(self.indices), compute, distributed.world_size())
        batch_size = config.batch_size or int(distributed.broadcast(torch.tensor(auto)))
        self.config = config = config.model_copy(update={"batch_size": batch_size})
        vit, teacher = self.model.vit, tokenizer.teacher
        size: tuple[int, int] = tuple(vit.patch_embed.img_size)
        spec = store.view_spec if store else ViewSpec.from_config(config, size, config.seed)
        sizes = vit.in_chans, size, None if teacher is None else teacher.image_size
        drawn = tuple(vit.patch_embed.grid_size), config.patch_order, config.color_jitter
        branches = 2 * len(vit.blocks) if config.drop_path else 0
        self.dataset = ViewDataset(images, spec, *sizes, store, *drawn, num_branches=branches, seed=config.seed)
        self.hashes = {"tokenizer_hash": tokenizer.hash, "images_hash": images.hash}
        if config.target == "tokens":
            self.num_counts, self.mean_names = tokenizer.vocab_size, ("token_accuracy",)
        self.same_shapes = not config.varies_context
        if config.probe_every != 0 and (config.probe_images is not None or images.classes() is not None):
            probe_images = images if config.probe_images is None else list_images(config.probe_images)
            self.probe_sets = sample_for_probe(labeled(probe_images))
        hidden = (
            f"{'up to ' if config.varies_context else ''}{self.model.num_hidden} of {self.model.num_patches} patches"
        )
        target = f"from {self.model.head.out_features} words" if config.target == "tokens" else f"as {config.target}"
        self.description = (
            f"{config.model}, {format_num_params(vit)}, {config.objective} on {len(self.indices):,} images of {format_size(size)} px, "
            f"{hidden} predicted {target}"
        )
        self.facts = {"tokenizer": tokenizer.description}
        if store:
            self.facts["views"] = {"kind": spec.kind, "min_scale": spec.min_scale, "number": store.num_views}
        if len(self.indices) < FEW_IMAGES:
            log.warning("%s", few_images(len(self.indices)))
        if config.tokens is None and config.target == "tokens":
            without = option("tokens")
            log.info(
                "without %s the teacher runs in every step, on fresh views; `mapet tokenize` runs it once", without
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
        num_context, (low, high) = model.num_context, self.config.mask_ratio
        if low < high:  # drawn from (seed, step) alone
            ratio = np.random.default_rng([self.config.seed, step, 1]).uniform(low, high)
            num_context = num_context_from_ratio(ratio, model.num_patches)
        indices = model.sample_target_indices(num_context, seed=[self.config.seed, step, 2])
        indices = None if indices is None else self.compute.to(indices)
        return replace(batch, images=images, targets=targets, num_context=num_context, target_indices=indices)

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

        majority_token_accuracy: the token accuracy of always predicting the commonest token. unigram_entropy: the loss of predicting by
        frequency alone, nats.
        """
        if not total_counts.any():
            return {}
        frequency = total_counts.double() / total_counts.sum()
        entropy = float(-(frequency * frequency.clamp_min(1e-12).log()).sum())
        return {"majority_token_accuracy": float(frequency.max()), "unigram_entropy": entropy}

    @staticmethod
    def format_metrics(metrics: dict[str, float]) -> str:
        """Return loss and accuracy, each beside its baseline."""
        text = "loss {loss:.3f}"
        if "unigram_entropy" in metrics:
            text += " (by frequency {unigram_entropy:.3f}), accuracy {token_accuracy:.1%} (commonest {majority_token_accuracy:.1%})"
        return text.format(**metrics)

    def evaluate(self, module: VisionTransformer, epoch: int) -> dict[str, float]:
        """Probe the frozen backbone with labeled images, about five times a run."""
        every = self.config.probe_every or max(1, self.config.epochs // 5)
        if self.probe_sets is None or (epoch % every and epoch != self.config.epochs):
            return {}
        return online_probe(module, *self.probe_sets, self.compute)

    @staticmethod
    def format_scores(scores: dict[str, float]) -> str:
        """Return the scores of the online probe."""
        return f"linear probe {scores['probe/logistic']:.3f}, k-NN {scores['probe/knn']:.3f}"

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
