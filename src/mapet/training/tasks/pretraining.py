"""Pre-training: a ViT learns to predict the targets of masked patches."""

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
from mapet.data.dataset_stats import few_images_warning
from mapet.data.sources import list_as_trained
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec, normalize
from mapet.device import ComputeContext, free_memory
from mapet.errors import format_size, option
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.imbalance import METRIC_NAMES
from mapet.evaluation.probes import online_probe, sample_for_probe
from mapet.models.backbone import (
    create_vit,
    format_num_params,
    init_from,
    prepare_for_device,
    save_backbone,
    set_read_options,
)
from mapet.models.context_autoencoder import ContextAutoencoder
from mapet.models.objectives import CAE, get_objective, num_context_from_ratio
from mapet.models.pooling import pool_tokens, resolve_layers
from mapet.models.pretraining import ViTForPreTraining, normalized_patches
from mapet.run_state import CONFIG_FILE, check_is_pretraining, pretrain_folder, resolve_run_path
from mapet.tokenizers.tokenizer import Tokenizer, load_tokenizer
from mapet.training.checkpoint import load_checkpoint
from mapet.training.step import auto_micro_batch
from mapet.training.task import StepOutput, Task

log = logging.getLogger("mapet")
MAX_AUTO_BATCH_SIZE, MAX_AUTO_CPU_BATCH_SIZE, MIN_AUTO_BATCH_SIZE = 2048, 256, 16
"""Limits of the automatic batch size: the paper's, where a CPU gets no faster, and the least for small data sets."""
FUSED_VALUES, EAGER_VALUES = (20, 0), (34, 3)
"""Values that a block keeps for the backward pass, (of width D per row, per attention score), with a GPU's fused attention and with eager."""
PROBES_PER_RUN = 5
"""Probes during a run where `probe_every` is auto."""
MAX_EPOCH_LINES = 100
"""About as many lines of the log, if a run has more epochs."""
MIN_STEPS_PER_EPOCH = 20
"""Steps per epoch that an automatic batch size above the minimum leaves."""
MAX_MEMORY_FRACTION = 0.6
"""Fraction of a GPU's free memory that activations of an automatic batch take."""


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> ViTForPreTraining:
    """Build the ViT and its prediction head for a tokenizer, with the weights that `seed` or `init_from` give.

    Raises:
        MapetError: unknown model or objective, sizes that don't fit, weights that can't be loaded, or layers or a pooling of the probes
            that the ViT doesn't have.
    """
    teacher, feature_size = tokenizer.description["teacher"], tokenizer.description["feature_size"]
    sizes = tokenizer.student_size, teacher["patch_size"], teacher["channels"]
    return build_model_for(config, *sizes, tokenizer.vocab_size, feature_size)


def check_model_config(config: PretrainConfig, fitting: FitTokenizerConfig) -> None:
    """Raise the MapetErrors of `build_model` before the tokenizer exists that `fit-tokenizer` will fit with config `fitting`."""
    build_model_for(config, fitting.image_size, fitting.patch_size, fitting.channels, fitting.vocab_size or 2, 1)


def build_model_for(
    config: PretrainConfig, image_size: tuple[int, int], patch_size: int, channels: int, vocab_size: int, feature_size: int
) -> ViTForPreTraining:  # fmt: skip
    """Build the ViT and its prediction head, with the weights that `seed` or `init_from` of the config give.

    Args:
        config: its options of the model (`model`, `model_args`, `drop_path`, `layer_scale_init`), of the objective (`objective`, `target`,
            `mask_ratio`, `num_predict`, `separate_query_token`), and `seed` and `init_from`, which give the ViT's weights; the head's are random.
        image_size: (H, W) pixels.
        patch_size: pixels.
        channels: of the images.
        vocab_size: number of tokens, outputs of the head for the target 'tokens'.
        feature_size: channels of the teacher's features, outputs of the head for the target 'features'.

    Returns:
        The model, on the CPU.

    Raises:
        MapetError: see `build_model`.
    """
    torch.manual_seed(config.seed)
    args = {"init_values": config.layer_scale_init} if config.layer_scale_init else {}
    vit = create_vit(config.model, image_size, patch_size, channels, args | config.model_args, config.drop_path)
    # What the probes would refuse after an epoch.
    resolve_layers(vit, config.layers)
    pool_tokens(torch.zeros(1, 1, 1, 1), vit.cls_token, config.pool)
    objective = get_objective(config.objective)
    num_outputs = {"tokens": vocab_size, "pixels": channels * patch_size**2, "features": feature_size}[config.target]
    # For a range of mask ratios the model's own number of context patches is the smallest, that of the largest ratio.
    fewest_context = num_context_from_ratio(config.mask_ratio[1], vit.patch_embed.num_patches)
    options: dict[str, Any] = {
        "num_context": fewest_context, "num_predict": config.num_predict, "target": config.target,
        "separate_query_token": config.separate_query_token,
    }  # fmt: skip
    if objective is CAE:
        model: ViTForPreTraining = ContextAutoencoder(vit, num_outputs, **options)
    else:
        model = ViTForPreTraining(vit, num_outputs, objective, **options)
    if config.init_from:
        init_from(vit, config.init_from)
    return model


class LoadedRun(NamedTuple):
    """Content of a pre-training run's folder; `model` has its newest weights and is in eval mode."""

    config: PretrainConfig
    tokenizer: Tokenizer
    model: ViTForPreTraining


def load_run(folder: Path, with_teacher: bool = False) -> LoadedRun:
    """Load a run from the folder of `pretrain`, or of the `run` or `demo` that it is part of.

    Args:
        folder: of the run; images and tokenizer may have moved with it.
        with_teacher: also load the tokenizer's teacher, which computes features of new images.

    Raises:
        MapetError: it isn't one, its tokenizer is missing or another one, or it has no usable checkpoint.
    """
    check_is_pretraining(folder)
    folder = pretrain_folder(folder)
    options = read_config(folder / CONFIG_FILE)
    present_paths = {name: resolve_run_path(folder, options, name) for name in ("images", "tokenizer")}
    config = build_config(PretrainConfig, options | present_paths, folder / CONFIG_FILE)
    tokenizer = load_tokenizer(config.tokenizer, with_teacher)
    model = build_model(config, tokenizer)
    load_checkpoint(folder / "checkpoints", model, hashes={"tokenizer_hash": tokenizer.hash})
    return LoadedRun(config, tokenizer, model.eval())


def activation_bytes_per_image(model: ViTForPreTraining, compute: ComputeContext) -> int:
    """Estimate the bytes of activations kept for the backward pass of one image, in all blocks.

    Rows are the tokens of the packed sequence (prefix, context, target, mask and query tokens that the objective uses).
    With eager attention about 34 values of width D per row and block (norms, qkv, attention output, MLP with GELU) and 3 per
    attention score; with a GPU's fused one none per score, and 17 to 18 values (measured on ViT-T, S and B:
    docs/performance.md), to which LayerScale adds two.
    """
    vit, rows = model.vit, sum(model.layout().segment_lengths.values())
    values_per_row, values_per_score = FUSED_VALUES if compute.device.type == "cuda" else EAGER_VALUES
    num_scores = vit.blocks[0].attn.num_heads * rows * rows
    per_block = values_per_row * rows * vit.embed_dim + values_per_score * num_scores
    return len(vit.blocks) * compute.dtype.itemsize * per_block


def auto_batch_size(model: ViTForPreTraining, num_images: int, compute: ComputeContext) -> int:
    """Return the automatic batch size of all ranks together: the largest power of two within its limits.

    It leaves `MIN_STEPS_PER_EPOCH` steps per epoch if that allows `MIN_AUTO_BATCH_SIZE`, and is at most `MAX_AUTO_BATCH_SIZE` (on a CPU
    `MAX_AUTO_CPU_BATCH_SIZE`) and the number of images. On GPUs, each rank's part must also fit the fraction `MAX_MEMORY_FRACTION` of
    the free memory of this rank's device.

    Args:
        model: on the device.
        num_images: images to train on.
        compute: device and dtype of matrix products.
    """
    limit = min(MAX_AUTO_BATCH_SIZE, max(MIN_AUTO_BATCH_SIZE, num_images // MIN_STEPS_PER_EPOCH), num_images)
    if compute.device.type == "cpu":
        limit = min(limit, MAX_AUTO_CPU_BATCH_SIZE)  # memory is up to the micro-batch
    else:
        available = int(MAX_MEMORY_FRACTION * free_memory(compute.device))
        limit = min(limit, distributed.world_size() * (available // activation_bytes_per_image(model, compute)))
    return 1 << (max(1, limit).bit_length() - 1)


class PretrainingTask(Task[PretrainConfig, VisionTransformer, Path]):
    """MaPeT or another objective, on the tokens of a store or of a teacher that computes them online."""

    command = "pretrain"
    base_lr, base_batch_size = 1.5e-3, 2048
    warmup_fraction = 1 / 30
    logs_per_epoch = 5
    model: ViTForPreTraining
    tokenizer: Tokenizer
    probe_sets: tuple[LabeledSet, LabeledSet] | None = None

    def build(self, config: PretrainConfig, compute: ComputeContext) -> None:
        """Open images, tokenizer, tokens and probe, build the model and resolve the batch size; a collective call.

        Sets the attributes that `Task` lists, and `tokenizer` and `probe_sets`: (training images, test images) of the probe that `evaluate`
        makes, or None with `probe_every` 0 or without labels. Images that were unreadable for `tokenize` are excluded from training. The
        teacher is loaded only if its features are needed: without stored tokens, or for the target 'features'.

        Args:
            config: options of `pretrain`, some of them None. Rank 0 decides an automatic `batch_size`.
            compute: device and precision.

        Raises:
            MapetError: images, tokenizer or tokens are missing, damaged or do not belong together, or an option does not fit them.
        """
        self.compute = compute
        needs_teacher = config.tokens is None or config.target == "features"
        tokenizer = load_tokenizer(config.tokenizer, needs_teacher).to(compute.device)
        images = list_as_trained(config.images, config, tokenizer.read_options)
        # A token store holds the token ids of one or more views of each image, which `mapet tokenize` has computed.
        store = None if config.tokens is None else TokenStore.open(config.tokens, images, tokenizer.hash)
        self.known_unreadable = dict(store.unreadable) if store else {}
        self.tokenizer, self.model = tokenizer, prepare_for_device(build_model(config, tokenizer), compute)
        self.indices = np.setdiff1d(np.arange(len(images)), list(self.known_unreadable))
        # Rank 0's number is used by all: each rank has computed it from the free memory of its own device.
        auto = auto_batch_size(self.model, len(self.indices), compute)
        batch_size = config.batch_size or int(distributed.broadcast(torch.tensor(auto)))
        self.config = config = config.model_copy(update={"batch_size": batch_size})
        vit, teacher = self.model.vit, tokenizer.teacher
        size: tuple[int, int] = tuple(vit.patch_embed.img_size)
        set_read_options(vit, images.read_options)
        # Stored tokens are of certain views, so that these are drawn again, whatever `config` says of views.
        spec = store.view_spec if store else ViewSpec.from_config(config, size, config.seed)
        self.dataset = ViewDataset(
            images, spec, vit.in_chans, size, None if teacher is None else teacher.image_size, store, tuple(vit.patch_embed.grid_size),
            config.patch_order, self.model.num_context, config.color_jitter,
            num_branches=2 * len(self.model.drop_path_blocks) if config.drop_path else 0, seed=config.seed,
        )  # fmt: skip
        self.hashes = {"tokenizer_hash": tokenizer.hash, "images_hash": images.hash}
        if config.target == "tokens":
            self.num_counts, self.mean_names = tokenizer.vocab_size, ("token_accuracy",)
        self.same_shapes = not config.varies_context
        self.epochs_per_line = max(1, round(config.epochs / MAX_EPOCH_LINES))
        if config.probe_every != 0 and (config.probe_images is not None or images.classes() is not None):
            probe_images = (
                images
                if config.probe_images is None
                else list_as_trained(config.probe_images, config, images.read_options)
            )
            self.probe_sets = sample_for_probe(LabeledSet.from_images(probe_images), config.group_by)
        self.facts = {"tokenizer": tokenizer.description}
        if store:
            self.facts["views"] = {"kind": spec.kind, "min_scale": spec.min_scale, "number": store.num_views}
        self._describe(size)

    def _describe(self, image_size: tuple[int, int]) -> None:
        """Set `description`, the run in one line; warn about few images, and log that the teacher runs in every step if it does.

        Args:
            image_size: (H, W) pixels of the ViT's input.
        """
        config, model, num_images = self.config, self.model, len(self.indices)
        most = "up to " if config.varies_context else ""
        num_outputs = model.head.out_features
        target = f"from {num_outputs} tokens" if config.target == "tokens" else f"as {config.target}"
        self.description = (
            f"{config.model}, {format_num_params(model.vit)}, {config.objective} on {num_images:,} images of {format_size(image_size)} px, "
            f"{most}{model.num_masked} of {model.num_patches} patches predicted {target}"
        )
        if warning := few_images_warning(num_images):
            log.warning("%s", warning)
        if config.tokens is None and config.target == "tokens":
            text = "without %s the teacher runs in every step, on fresh views; `mapet tokenize` runs it once"
            log.info(text, option("tokens"))

    @property
    def product_module(self) -> VisionTransformer:
        """Return the backbone."""
        return self.model.vit

    def build_model(self) -> VisionTransformer:
        """Build another backbone of the same shape."""
        return prepare_for_device(build_model(self.config, self.tokenizer).vit, self.compute)

    def auto_micro_batch(self, local_batch_size: int) -> int:
        """Return the automatic `micro_batch_size`, see the function of this name: on a CPU what its cache holds, on a GPU all."""
        return auto_micro_batch(self.model, local_batch_size, self.compute)

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Compute the inputs of the loss, on the device: images, targets, and a drawn number of context and target patches.

        Args:
            batch: as `ViewDataset` makes it: uint8 images, and in `targets` the token ids that `mapet tokenize` stored. Without stored
                tokens it has `teacher_images` instead, from which they are computed here.
            step: counts from 0; what is drawn here depends on it and the run's seed alone.

        Returns:
            The batch with normalized images; targets of all N patches in row-major order: token ids (B, N), or pixels or teacher
            features (B, N, F); `num_context`; and `target_indices`, which of the other patches are predicted (None: all).
        """
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
        num_context, seed = model.num_context, [self.config.seed, step]
        if self.config.varies_context:
            ratio = np.random.default_rng([*seed, 1]).uniform(*self.config.mask_ratio)
            num_context = num_context_from_ratio(ratio, model.num_patches)
        indices = model.sample_target_indices(num_context, seed=[*seed, 2])
        indices = None if indices is None else self.compute.to(indices)
        return replace(batch, images=images, targets=targets, num_context=num_context, target_indices=indices)

    def loss(self, batch: Batch, step: int) -> StepOutput:
        """Compute the model's loss; for the target 'tokens' also the accuracy, and how often each token occurs among the predicted targets."""
        output = self.model(batch)
        if output.num_correct is None:
            return StepOutput(output.loss, output.loss_per_image)
        means = {"token_accuracy": output.num_correct / output.targets.numel()}
        counts = torch.bincount(output.targets.flatten(), minlength=self.num_counts)
        return StepOutput(output.loss, output.loss_per_image, means, counts)

    def summarize(self, counts: Int[Tensor, " V"], total_counts: Int[Tensor, " V"]) -> dict[str, float]:
        """Return the baselines of loss and accuracy over all target tokens since the start of the run; {} if there was none.

        `total_counts` has the number of occurrences of each token; `counts`, since the last log line, are not used.

        majority_token_accuracy: accuracy of always predicting the most frequent token. unigram_entropy: loss, in nats, of always
        predicting the frequencies of the tokens.
        """
        if not total_counts.any():
            return {}
        frequency = total_counts.double() / total_counts.sum()
        entropy = torch.special.entr(frequency).sum()
        return {"majority_token_accuracy": float(frequency.max()), "unigram_entropy": float(entropy)}

    @staticmethod
    def format_metrics(metrics: dict[str, float]) -> str:
        """Format the loss and, if the targets are tokens, their accuracy, each beside its baseline: 'loss 3.504 (unigram 3.475), ...'.

        Args:
            metrics: 'loss' (in nats if the targets are tokens); and 'token_accuracy' (0 to 1) and its baselines of `summarize`,
                'unigram_entropy' (nats) and 'majority_token_accuracy' (0 to 1), together, or none of these three.
        """
        text = "loss {loss:.3f}"
        if "unigram_entropy" in metrics:
            text += " (unigram {unigram_entropy:.3f}), accuracy {token_accuracy:.1%} (majority {majority_token_accuracy:.1%})"
        return text.format(**metrics)

    def evaluate(self, module: VisionTransformer, epoch: int, is_last: bool) -> dict[str, float]:
        """Probe the frozen backbone with labeled images, every `probe_every` epochs (None: five times a run) and after the last epoch.

        Args:
            module: the backbone.
            epoch: counted from 1.
            is_last: whether it is the run's last one.

        Returns:
            Accuracies, 0 to 1, by name, e.g. 'probe/knn'; {} in other epochs, or without labeled images.
        """
        every = self.config.probe_every or max(1, self.config.epochs // PROBES_PER_RUN)
        if self.probe_sets is None or (epoch % every and not is_last):
            return {}
        return online_probe(module, *self.probe_sets, self.compute, self.config.layers, self.config.pool)

    @staticmethod
    def format_scores(scores: dict[str, float]) -> str:
        """Format the accuracies of the online probe, on imbalanced images balanced accuracy and AUROC first."""
        titles, texts = {"logistic": "linear probe", "knn": "k-NN"}, []
        for row, value in scores.items():
            name, _, kind = row.removeprefix("probe/").partition("_")
            texts.append(f"{titles[name]} {METRIC_NAMES[kind] + ' ' if kind else ''}{value:.3f}")
        return ", ".join(texts)

    def infer(self, module: VisionTransformer, batch: Batch) -> list[Tensor]:
        """Return one tensor in a list: the backbone's features (B, tokens, D) of the images without color jitter."""
        assert batch.images is not None
        return [module.forward_features(normalize(batch.images, module.in_chans))]

    def finish(self, module: VisionTransformer) -> Path:
        """Save the backbone in OUT/backbone, unless it exists already; return this folder."""
        backbone = self.config.out / "backbone"
        if not backbone.exists():
            save_backbone(module.eval().cpu(), backbone)
        log.info("backbone saved in %s", backbone)
        return backbone
