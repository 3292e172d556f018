"""Training of a VQ-KD tokenizer (BEiT v2, arXiv 2208.06366)."""

import logging
import math
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapet.config.tokenizers import TrainTokenizerConfig
from mapet.data.dataset import (
    Batch,
    EpochBatchSampler,
    UnreadableImages,
    ViewDataset,
    position_batches,
    readable_batches,
)
from mapet.data.dataset_stats import find_value_range
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec
from mapet.device import ComputeContext
from mapet.errors import MapetError, option, shell_command
from mapet.files import atomic_write, write_json, write_tensors
from mapet.models.backbone import create_vit, format_num_params, prepare_for_device
from mapet.tokenizers.fitting import fit_teacher
from mapet.tokenizers.kmeans import default_vocab_size
from mapet.tokenizers.tokenizer import CodebookStats, Teacher, make_teacher
from mapet.tokenizers.vqkd import DESCRIPTION, FORMAT, VQKDForTraining, VQKDOutput
from mapet.training.task import StepOutput, Task

log = logging.getLogger("mapet")
PATCHES_PER_CODE = 16
"""Patches per code for the k-means that initializes the codebook."""
MAX_EVAL_IMAGES = 10_000
"""Most training images that the finished tokenizer is evaluated on."""


class VQKDTask(Task[TrainTokenizerConfig, VQKDForTraining, Path]):
    """Trains an encoder and a codebook, from whose codes a decoder regresses a teacher's features."""

    command = "train-tokenizer"
    base_lr, base_batch_size = 2e-4, 512
    betas = (0.9, 0.99)
    mean_names = ("reconstruction_loss", "commitment_loss")
    sum_names = ("reset_codes",)
    model: VQKDForTraining
    teacher: Teacher

    def build(self, config: TrainTokenizerConfig, compute: ComputeContext) -> None:
        """Open images and teacher, resolve `vocab_size`, and build the untrained model.

        Sets the attributes that `Task` lists; `teacher`, the frozen encoder whose features the decoder regresses, on the device; and
        `num_patches`, patches of one image. Every image is used for training.

        Args:
            config: options of `train-tokenizer`, some of them None. `vocab_size` (number of codes V) None: `default_vocab_size`.
            compute: device and precision.

        Raises:
            MapetError: there are fewer patches than codes, or images, teacher or model can't be had as the options say.
        """
        self.compute, images = compute, find_value_range(list_images(config.images, config), config.channels)
        self.teacher = make_teacher(config, compute.precision).to(compute.device)
        fit_teacher(
            config, self.teacher, images, UnreadableImages(images, config.max_unreadable, is_option=False), compute
        )
        spec = ViewSpec.from_config(config, config.image_size, config.seed)
        sizes = config.image_size, self.teacher.image_size
        self.dataset = ViewDataset(images, spec, config.channels, *sizes, seed=config.seed)
        self.indices, self.hashes = np.arange(len(images)), {"images_hash": images.hash}
        self.num_patches = math.prod(self.teacher.grid)
        total_patches = self.num_patches * len(images)
        self.num_counts = config.vocab_size or default_vocab_size(total_patches)
        if self.num_counts > total_patches:
            problem = f"V = {self.num_counts} codes for {total_patches:,} patches: lower {option('vocab_size')}"
            raise MapetError(problem, field="vocab_size", value=self.num_counts)
        self.config = config.model_copy(update={"vocab_size": self.num_counts})
        self.model = self.build_model()
        self.description = (
            f"VQ-KD, {config.model} with {format_num_params(self.model)}, {self.num_counts} codes, teacher {self.teacher.name}, "
            f"{len(images):,} images of {config.image_size[0]} px"
        )

    def build_model(self) -> VQKDForTraining:
        """Build the untrained model from its seed; the teacher runs once, to show how many feature channels it has."""
        config = self.config
        black = torch.zeros(1, config.channels, *self.teacher.image_size, dtype=torch.uint8)
        feature_size = self.teacher(self.compute.to(black)).shape[1]
        torch.manual_seed(config.seed)
        sizes = config.image_size, config.patch_size, config.channels
        encoder = create_vit(config.model, *sizes, config.model_args, config.drop_path)
        return prepare_for_device(VQKDForTraining(encoder, feature_size, config), self.compute)

    @torch.no_grad()
    def start(self) -> None:
        """Initialize the codebook by k-means on the untrained encoder's outputs for the run's first images, before the first step.

        So many batches are read that there are `PATCHES_PER_CODE` patches for each code, or all batches of the run if it has fewer. The
        trainer calls it on rank 0 alone, and not in runs that were resumed from a checkpoint.

        Raises:
            MapetError: too many images are unreadable, or those that are readable have fewer patches than there are codes.
        """
        config, model = self.config, self.model.eval()
        num_batches = -(-PATCHES_PER_CODE * self.num_counts // (self.num_patches * config.batch_size))
        batches = list(
            islice(EpochBatchSampler(self.indices, config.batch_size, config.epochs, config.seed), num_batches)
        )
        vectors = []
        for batch in readable_batches(self.dataset, batches, self.unreadable, "k-means init"):
            with self.compute.autocast():
                vectors.append(model.tokenizer(self._pixels(batch)).movedim(1, -1).flatten(0, 2))
        model.init_codebook_kmeans(torch.cat(vectors), config.seed)
        log.info("codebook initialized by k-means on %d batches", len(batches))

    def _pixels(self, batch: Batch) -> Float[Tensor, "B C H W"]:
        """Return a batch's images as the encoder's input: float32 in [0, 1], on the device."""
        assert batch.images is not None
        return self.compute.to(batch.images).to(torch.float32, memory_format=torch.contiguous_format) / 255

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Turn images into the encoder's input, and compute their targets, the teacher's features of the same views."""
        # A clone, because tensors made in inference mode cannot take part in a backward pass.
        targets = self.teacher.batch_features(batch, self.dataset.images, self.compute).clone()
        return replace(batch.to(self.compute.device), images=self._pixels(batch), targets=targets)

    def loss(self, batch: Batch, step: int) -> StepOutput:
        """Compute the sum of the losses of reconstruction (1 - cosine) and commitment; count codes, keep rows for their update."""
        output: VQKDOutput = self.model(batch.images, batch.targets)
        means = {"reconstruction_loss": output.reconstruction.detach(), "commitment_loss": output.commitment.detach()}
        counts = torch.bincount(output.codes.flatten(), minlength=self.num_counts)
        rows = {"features": output.features, "codes": output.codes}
        return StepOutput(output.loss, output.loss_per_image, means, counts, rows)

    def after_step(self, output: StepOutput, step: int) -> dict[str, Tensor]:
        """Move the codes towards the encoder's outputs by an exponential moving average, and reset dead codes.

        Args:
            output: its `rows` are of the whole batch: 'features' (B, N, d), the encoder's outputs, and 'codes' (B, N), their codes' indices.
            step: not used.

        Returns:
            The number of codes that were reset, by the name of its metric.
        """
        features, codes = output.rows["features"].flatten(0, 1), output.rows["codes"].flatten()
        return {"reset_codes": self.model.ema_update_codebook(features, codes)}

    def summarize(self, counts: Int[Tensor, " K"], total_counts: Int[Tensor, " K"]) -> dict[str, float]:
        """Return code statistics since the last log line.

        code_usage: fraction of the codes that occurred. perplexity: exp of the entropy of the codes' frequencies, at most K.
        """
        stats = CodebookStats.from_counts(counts)
        return {"code_usage": stats.num_used_codes / len(counts), "perplexity": stats.perplexity}

    @staticmethod
    def format_metrics(metrics: dict[str, float]) -> str:
        """Format loss, reconstruction loss (1 - cosine), the fraction of codes used (0 to 1) and their perplexity, by these names."""
        text = "loss {loss:.3f}, reconstruction loss {reconstruction_loss:.3f}, codes used {code_usage:.0%}, perplexity {perplexity:.0f}"
        return text.format(**metrics)

    @torch.no_grad()
    def _evaluate_codebook(self, model: VQKDForTraining) -> tuple[float, CodebookStats]:
        """Evaluate the tokenizer on the center crops of at most `MAX_EVAL_IMAGES` training images, drawn from the run's seed; on rank 0.

        Unreadable images are excluded.

        Args:
            model: the trained encoder, codebook and decoder; it is put into evaluation mode.

        Returns:
            (1 - cosine of the decoder's output and the teacher's features, mean over patches; statistics of the codes, whose
            quantization error is the mean squared distance of the encoder's outputs to their codes, divided by the outputs' variance)

        Raises:
            MapetError: more images are unreadable than the option `max_unreadable` allows.
        """
        config, model = self.config, model.eval()
        centered = replace(self.dataset, spec=ViewSpec(image_size=config.image_size))
        order = np.random.default_rng(config.seed).permutation(len(centered))[:MAX_EVAL_IMAGES]
        batches = position_batches(order, config.batch_size)
        counts = torch.zeros(self.num_counts, dtype=torch.int64)
        distance, sq_error, mean = 0.0, 0.0, torch.zeros(config.codebook_dim, dtype=torch.float64)
        for batch in readable_batches(centered, batches, self.unreadable, "evaluate"):
            batch = self.prepare(batch, 0)
            with self.compute.autocast():
                output: VQKDOutput = model(batch.images, batch.targets)
            counts += torch.bincount(output.codes.flatten().cpu(), minlength=len(counts))
            distance += float(output.reconstruction) * output.codes.numel()
            sq_error += float(output.commitment) * config.codebook_dim * output.codes.numel()
            mean += output.features.flatten(0, 1).sum(0).double().cpu()
        num_patches = int(counts.sum())
        variance = 1 - float((mean / num_patches).square().sum())  # unit vectors: their mean square is 1
        relative_error = sq_error / num_patches / variance if variance > 0 else 0.0
        return distance / num_patches, CodebookStats.from_counts(counts, relative_error)

    def infer(self, module: VQKDForTraining, batch: Batch) -> list[Tensor]:
        """Return the encoder's outputs, which codes are looked up for."""
        return [module.tokenizer(self._pixels(batch))]

    def finish(self, module: VQKDForTraining) -> Path:
        """Evaluate the trained tokenizer, and save its weights and a JSON description in OUT/vqkd, unless that exists already.

        Args:
            module: the trained tokenizer, with its decoder.

        Returns:
            The weights file OUT/vqkd/vqkd.safetensors, which other commands take as `teacher_checkpoint`.
        """
        reconstruction, stats = self._evaluate_codebook(module)
        log.info(
            "VQ-KD tokenizer: reconstruction loss %.3f (1 - cosine, on training images); %s", reconstruction, stats
        )
        config, teacher, images, folder = self.config, self.teacher, self.dataset.images, self.config.out / "vqkd"
        training = config.model_dump(mode="json", exclude={"images", "out", "resume", "device"})
        metadata = {
            "format_version": FORMAT,
            **{name: training[name] for name in ("image_size", "patch_size", "vocab_size")},
            "code_dim": config.codebook_dim,
            "teacher": teacher.settings,
            "teacher_weights_hash": teacher.weights_hash,
            "teacher_metadata": teacher.metadata,
            "label_free": teacher.label_free,
            "reconstruction_loss": reconstruction,
            "codebook_stats": asdict(stats),
            "training": training | {"images_hash": images.hash, "num_images": len(images)},
        }
        if not folder.exists():
            with atomic_write(folder) as temporary:  # both or neither
                temporary.mkdir()
                write_tensors(temporary / "vqkd.safetensors", module.beit2_state_dict())
                write_json(temporary / DESCRIPTION, metadata)
        file = folder / "vqkd.safetensors"
        next_command = shell_command("fit-tokenizer", "--teacher", "vqkd", "--teacher-checkpoint", file)
        log.info("the tokenizer is in %s. Next: %s --images ... --out ...", folder, next_command)
        return file
