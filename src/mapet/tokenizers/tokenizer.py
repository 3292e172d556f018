"""The tokenizer: a frozen teacher computes a feature per patch, a quantizer maps it to a token id. On disk: safetensors and JSON."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mapet import distributed, files
from mapet.config.shared import (
    AS_STORED,
    HUB_PREFIXES,
    ReadOptions,
    format_teachers,
    is_custom_teacher,
    non_default_options,
)
from mapet.config.tokenizers import LABEL_FREE_TEACHERS, TEACHER_PRESETS, TeacherOptions
from mapet.data.dataset import Batch
from mapet.data.image_list import ImageList
from mapet.device import ComputeContext
from mapet.errors import MapetError, describe_key_error, did_you_mean, format_size, option
from mapet.tokenizers.quantizers import FitResult, Quantizer
from mapet.tokenizers.teachers import custom, dalle
from mapet.tokenizers.teachers.hog import HOG
from mapet.tokenizers.teachers.run_features import RunFeatures
from mapet.tokenizers.teachers.timm_model import TimmFeatures
from mapet.tokenizers.teachers.whitened import Whitened
from mapet.tokenizers.vqkd import load_vqkd
from mapet.weights import hash_weights

log = logging.getLogger("mapet")
CODEBOOK = "codebook.safetensors"
DESCRIPTION = "visual_tokenizer.json"
TEACHER_FOLDER = "teacher{}"
"""Folder, in that of the tokenizer, of what is kept of the teacher of an index."""
FORMAT = 1
MIN_VARIANCE, MAX_ASPECT_FACTOR = 1e-12, 2
"""Smallest variance that features are divided by; and by how much the aspect ratio of a feature map may differ from that of the view."""
SETTINGS = {
    "teacher": "teacher", "student_size": "image_size", "patch_size": "patch_size", "channels": "channels", "checkpoint": "teacher_checkpoint",
    "teacher_size": "teacher_image_size", "layer": "teacher_layer", "output": "teacher_output", "hog": "hog",
    "whitened": "whitened",
}  # fmt: skip
"""Key of `Teacher.settings` -> the option that sets it."""
TEACHER_SETTINGS = ("checkpoint", "teacher_size", "layer", "output", "hog", "whitened")
"""Those that not every teacher uses."""
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "dalle": dalle.build, "hog": HOG, "pixels": lambda patch_size: nn.PixelUnshuffle(patch_size), "vqkd": load_vqkd, "whitened": Whitened,
}  # fmt: skip
"""Name of a teacher -> the function that makes its encoder.

The parameters of such a function, by name, are some of the keys of `SETTINGS`, `grid`, the student's (rows, columns), and `saved`, the folder
that the encoder's `save` wrote, or None for a new tokenizer; an option that no chosen teacher has a parameter for is refused. The encoder
maps (B, C, h, w) floats in [0, 1] to features (B, F, rows, columns), and may have these attributes:

    image_size   (h, w) of its input, pixels; without it, the student's
    metadata     JSON values to record with the tokenizer; see `Teacher.metadata`
    codebook     (K, F) tensor, if a token is the nearest code by cosine
    num_logits   F, if the features are logits and a token is the largest of them
"""


class Teacher(nn.Module):
    """One or more frozen encoders that compute a feature for each patch of the student's grid.

    Features of several are side by side, those of each divided by their standard deviation (the square root of the sum of the variances
    of its channels), so that each counts alike in distances.

    Attributes:
        name: 'pixels', a timm model, 'package.module:function', ...; of several joined by ' + '.
        image_size: (h, w) of the views it takes, pixels.
        grid: (rows, columns) of the student's patches; a feature map of another size is interpolated to it.
        native_grid: (rows, columns) of the encoder's feature map; None before it has run. Of several, that of the first that is interpolated.
        settings: JSON values that `make_teacher` makes it of: those of `SETTINGS`, and the precision of its matrix products. They are
            written to the tokenizer's JSON and, but for the checkpoint's path, enter its hash. Of several encoders 'scales' are the factors
            of their features. In another precision about 1 % of the patches get other tokens, so tokens are always computed in this one.
        weights_hash: sha256 of the encoders' parameters; '' if they have none.
        builtin_quantizer: maps its features to tokens if the encoder has a codebook or logits; else None.
        metadata: further facts for the tokenizer's JSON: mean and std of the input in [0, 1], number of prefix tokens dropped and, of a
            VQ-KD tokenizer, the teacher and images it was learned from. Empty for custom code.
        label_free: whether its features are known to depend on no labels and no pre-trained network: it is one of `LABEL_FREE_TEACHERS`, or a
            VQ-KD tokenizer or run that learned from such a teacher. Of several, whether all are.
    """

    def __init__(self, encoders: Sequence[nn.Module], settings: dict[str, Any]) -> None:
        """Freeze the encoders, hash their weights and, if there is one that has a codebook or logits, make its quantizer.

        Args:
            encoders: map (B, C, h, w) floats in [0, 1] to (B, F, rows, columns). Their attributes image_size (h, w), metadata, num_logits
                and codebook, a (K, F) tensor, are optional; see `BUILDERS`.
            settings: teacher (its name), student_size (H, W), patch_size, teacher_size (h, w) or None, precision, ...: see `SETTINGS`.

        Raises:
            MapetError: the encoders take images of different sizes.
        """
        super().__init__()
        names = settings["teacher"]
        names = [names] if isinstance(names, str) else names
        self.settings, self.name = settings, format_teachers(names)
        rows, columns = (side // settings["patch_size"] for side in settings["student_size"])
        self.grid = rows, columns
        student_size = tuple(settings["student_size"])
        sizes = [tuple(getattr(encoder, "image_size", None) or student_size) for encoder in encoders]
        if settings.get("teacher_size"):
            sizes = [tuple(settings["teacher_size"])]
        if len({*sizes}) > 1:
            by_teacher = ", ".join(f"{name} {format_size(size)}" for name, size in zip(names, sizes, strict=True))
            raise MapetError(
                f"teachers must take images of one size, found {by_teacher} px: give {option('teacher_image_size')}"
            )
        self.image_size: tuple[int, int] = sizes[0]
        self.native_grid: tuple[int, int] | None = None
        all_metadata = {
            name: {} if is_custom_teacher(name) else getattr(encoder, "metadata", {})
            for name, encoder in zip(names, encoders, strict=True)
        }
        self.metadata: dict[str, Any] = all_metadata if len(names) > 1 else all_metadata[names[0]]
        self.label_free = all(
            name in LABEL_FREE_TEACHERS or (metadata.get("learned_from") or {}).get("label_free", False)
            for name, metadata in all_metadata.items()
        )
        self.builtin_quantizer: Quantizer | None = None
        if len(encoders) == 1:
            self.builtin_quantizer = _builtin_quantizer(encoders[0])
        # Convolutions are faster with channels last; other layers are not affected.
        self.encoders = nn.ModuleList(encoders).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.weights_hash = self._hash_weights()

    def _hash_weights(self) -> str:
        """Return the sha256 of the encoders' weights."""
        return hash_weights((self.encoders if len(self.encoders) > 1 else self.encoders[0]).state_dict())

    @property
    def is_fitted_to_images(self) -> bool:
        """Return whether `fit` must be called before a new tokenizer is fitted."""
        return len(self.encoders) > 1 or any(isinstance(encoder, Whitened) for encoder in self.encoders)

    @torch.no_grad()
    def fit(self, read: Callable[[], Iterable[UInt8[Tensor, "B C h w"]]], num_images: int) -> None:
        """Fit those encoders that learn from images and, of several, the factors that give their features equal variance.

        All ranks of a process group call it with the same images; afterwards all have rank 0's result.

        Args:
            read: returns batches of views of `image_size`, the same ones at each call, on the device of the encoders.
            num_images: number of these views.
        """
        for encoder in self.encoders:
            if isinstance(encoder, Whitened):
                encoder.fit((images.float() / 255 for images in read()), num_images)
                for buffer in encoder.buffers():
                    buffer.copy_(distributed.broadcast(buffer))
        if len(self.encoders) > 1:
            scales = torch.stack([self._total_variance(index, read()) for index in range(len(self.encoders))]).rsqrt()
            self.settings["scales"] = distributed.broadcast(scales).tolist()
        self.weights_hash = self._hash_weights()

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Return the float32 features of images, on the student's grid.

        The matrix products have the precision of `settings`, also within another autocast. Sets `native_grid`.

        Raises:
            MapetError: the encoder returned something that is not a feature map of these images, with at least two rows and columns
                and about the aspect ratio of the images.
        """
        features = [self._features(index, images) for index in range(len(self.encoders))]
        if len(features) == 1:
            return features[0]
        scales = self.settings["scales"]
        return torch.cat([scale * part for scale, part in zip(scales, features, strict=True)], 1)

    def _features(self, index: int, images: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Compute the float32 features of one encoder, on the student's grid; sets `native_grid`.

        Args:
            index: of the encoder.
            images: at `image_size`.

        Returns:
            Features (B, F, rows, columns).

        Raises:
            MapetError: the encoder returned something that is not a feature map of these images, see `forward`.
        """
        bfloat16 = self.settings["precision"] == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            features = self.encoders[index]((images.float() / 255).contiguous(memory_format=torch.channels_last))
        shape = tuple(features.shape) if isinstance(features, Tensor) else (type(features).__name__,)
        if len(shape) != 4 or shape[0] != len(images):
            problem = f"teacher '{self.name}' must return a tensor (batch, features, rows, columns), got {shape} for {len(images)} images"
            raise MapetError(f"{problem}: change the function that returns it")
        rows, columns = shape[2:]
        height, width = self.image_size
        # A single feature for the whole image, or swapped rows and columns, would be interpolated without any error.
        is_single = min(rows, columns) < 2 <= min(self.grid)
        if is_single or not 1 / MAX_ASPECT_FACTOR < (rows / columns) / (height / width) < MAX_ASPECT_FACTOR:
            raise MapetError(
                f"teacher '{self.name}' returned a grid of {rows} x {columns} for views of {height} x {width} px and {format_size(self.grid)} "
                "patches: change it to return a feature map (batch, features, rows, columns) of the whole view"
            )
        if self.native_grid in (None, self.grid):
            self.native_grid = rows, columns
        features = features.float()
        if (rows, columns) != self.grid:
            features = F.interpolate(features, size=self.grid, mode="bilinear", antialias=True)
        return features

    def _total_variance(self, index: int, batches: Iterable[UInt8[Tensor, "B C h w"]]) -> Float[Tensor, ""]:
        """Return the sum, in float64, of the variances of the channels of an encoder's features over all patches; at least `MIN_VARIANCE`."""
        sums: Tensor | float = 0.0
        squares: Tensor | float = 0.0
        count = 0
        for images in batches:
            rows = self._features(index, images).movedim(1, -1).flatten(0, 2).double().cpu()
            sums, squares, count = sums + rows.sum(0), squares + rows.square().sum(0), count + len(rows)
        return torch.as_tensor(squares / count - (sums / count) ** 2).sum().clamp_min(MIN_VARIANCE)

    def save(self, folder: Path) -> None:
        """Write what the tokenizer must keep of the encoders into `folder`, one subfolder each (`TEACHER_FOLDER`)."""
        for index, encoder in enumerate(self.encoders):
            if isinstance(encoder, Whitened | RunFeatures):
                encoder.save(folder / TEACHER_FOLDER.format(index))

    def batch_features(
        self, batch: Batch, images: ImageList, compute: ComputeContext
    ) -> Float[Tensor, "B F rows columns"]:
        """Return the features of `batch.teacher_images`.

        Args:
            batch: with `teacher_images`, uint8, at `image_size`; B images, without the unreadable ones.
            images: the list that the batch is from, to name an image in an error.
            compute: moves the pixels to the teacher's device.

        Raises:
            MapetError: a feature is NaN or infinite.
        """
        assert batch.teacher_images is not None
        features: Tensor = self(compute.to(batch.teacher_images))
        if not features.isfinite().all():
            failed = batch.image_index[~features.isfinite().flatten(1).all(dim=1).cpu()]
            raise MapetError(
                f"teacher '{self.name}' gave NaN or infinite features for {len(failed)} of {len(batch)} images, first "
                f"{images.id(int(failed[0]))!r}: check its weights and the range of its input ([0, 1])"
            )
        return features


def _builtin_quantizer(encoder: nn.Module) -> Quantizer | None:
    """Return the quantizer of an encoder that has logits or a codebook (see `BUILDERS`); None for others."""
    if num_logits := getattr(encoder, "num_logits", 0):
        return Quantizer({"kind": "argmax", "vocab_size": int(num_logits)}, {})
    if isinstance(codebook := getattr(encoder, "codebook", None), Tensor):
        return Quantizer({"kind": "nearest", "metric": "cosine"}, {"centroids": codebook.detach().float()})
    return None


def make_teacher(config: TeacherOptions, precision: str = "float32", folder: Path | None = None) -> Teacher:
    """Create the teacher that options choose, on the CPU; one that `is_fitted_to_images` must be fitted next if `folder` is None.

    Args:
        config: `teacher` is 'pixels', the patch's own pixels, 'hog' or 'whitened', which need no weights; 'vqkd' or 'dalle', which have a
            built-in codebook; any timm model, e.g. 'resnet50x64_clip.openai'; the folder of a pre-training run; or
            'package.module:function', a function of (checkpoint) that returns an encoder: a callable that maps (B, C, h, w) floats in
            [0, 1] to (B, F, rows, columns). Or several of them.
        precision: of its matrix products, 'float32' or 'bfloat16'.
        folder: of the tokenizer that the teacher was saved in; None: a new one.

    Returns:
        The teacher.

    Raises:
        MapetError: unknown name, an option that no teacher uses, or weights that are missing, unsafe or of another model.
    """
    values = config.model_dump(mode="json")
    (height, width), patch_size = config.image_size, config.patch_size
    arguments = {key: getattr(config, name) for key, name in SETTINGS.items()}
    arguments["grid"] = height // patch_size, width // patch_size
    encoders, parameters_of_all = [], set[str]()
    for index, name in enumerate(config.teacher):
        saved = folder / TEACHER_FOLDER.format(index) if folder else None
        build = _find_builder(name, saved)
        parameters = inspect.signature(build).parameters
        parameters_of_all |= set(parameters)
        keywords = arguments | {"teacher": name, "saved": saved}
        encoders.append(partial(build, **{key: keywords[key] for key in parameters}))
    for key in TEACHER_SETTINGS:
        if key not in parameters_of_all and non_default_options(config, [SETTINGS[key]]):
            raise MapetError(
                f"teacher '{format_teachers(config.teacher)}' does not use {option(SETTINGS[key])}: omit it"
            )
    settings = {
        key: values[name]
        for key, name in SETTINGS.items()
        if key in parameters_of_all or not isinstance(values[name], dict)
    }
    if len(config.teacher) == 1:
        settings["teacher"] = config.teacher[0]
    return Teacher([build() for build in encoders], settings | {"precision": precision})


def _find_builder(teacher: str, saved: Path | None) -> Callable[..., nn.Module]:
    """Return the function or class that makes the encoder of the teacher of this name.

    Its parameters, a subset of the keys of `SETTINGS`, 'grid' and 'saved', tell which options the teacher uses (see `BUILDERS`).

    Raises:
        MapetError: the name is neither in `BUILDERS`, nor a timm model, nor a folder, nor 'package.module:function'.
    """
    timm_models = timm.list_models()
    if is_custom_teacher(teacher):
        return custom.build
    if teacher.startswith(HUB_PREFIXES) or teacher.split(".")[0] in timm_models:
        return TimmFeatures
    # The run itself may be gone once its backbone is saved with the tokenizer.
    if teacher not in BUILDERS and (Path(teacher).is_dir() or (saved is not None and saved.is_dir())):
        return RunFeatures
    if teacher not in BUILDERS:
        raise MapetError(
            f"unknown teacher '{teacher}'{did_you_mean(teacher, [*TEACHER_PRESETS, *BUILDERS, *timm_models]) or '.'} "
            f"Use {', '.join(map(repr, [*TEACHER_PRESETS, *BUILDERS]))}, a timm model, the folder of a run or package.module:function"
        )
    return BUILDERS[teacher]


@dataclass(frozen=True)
class CodebookStats:
    """How the patches that a codebook was fitted to use its codes.

    Attributes:
        num_used_codes: codes that at least one patch has.
        num_dead_codes: codes that no patch has.
        perplexity: exp of the entropy of code usage: K if all codes are equally frequent, 1 if one takes all patches.
        top_code_fraction: fraction of patches that have the most frequent code: the majority baseline of predicting tokens.
        quantization_error: mean squared distance to the nearest centroid, divided by that to the mean of all features (0: exact,
            1: no better than the mean); None without centroids.
        num_patches: number of patches.
    """

    num_used_codes: int
    num_dead_codes: int
    perplexity: float
    top_code_fraction: float
    quantization_error: float | None
    num_patches: int

    @classmethod
    def from_counts(cls, counts: Int[Tensor, " K"], quantization_error: float | None = None) -> "CodebookStats":
        """Compute the statistics of a codebook.

        Args:
            counts: number of patches that have each code, at least one in all.
            quantization_error: recorded as it is; see the class.
        """
        fractions, num_used = counts.double() / counts.sum(), int((counts > 0).sum())
        perplexity = float(torch.special.entr(fractions).sum().exp())
        num_dead, top_fraction = len(counts) - num_used, float(fractions.max())
        return cls(num_used, num_dead, perplexity, top_fraction, quantization_error, int(counts.sum()))

    def __str__(self) -> str:
        """Return the statistics as a line of a log."""
        error = self.quantization_error
        return (
            f"{self.num_used_codes} of {self.num_used_codes + self.num_dead_codes} codes used ({self.num_dead_codes} dead), "
            f"perplexity {self.perplexity:.1f}, most frequent code {self.top_code_fraction:.1%} of patches, "
            f"{'' if error is None else f'quantization error {error:.3f} of the global mean, '}over {self.num_patches:,} patches"
        )


class Tokenizer(nn.Module):
    """Maps uint8 views to token ids: the teacher's feature of each patch, quantized (k-CLIP in the paper).

    Attributes:
        teacher: None if loaded without it.
        description: the content of `visual_tokenizer.json`.
        hash: identity of the tokenizer: a sha256 over quantizer, teacher and their weights.
        vocab_size: V, number of codes.
        grid: (rows, columns) of patches.
        student_size: (H, W) of the student's input, pixels.
        read_options: how the images that it was fitted to were read.
    """

    grid: tuple[int, int]
    student_size: tuple[int, int]

    def __init__(self, teacher: Teacher | None, quantizer: Quantizer, description: dict[str, Any]) -> None:
        """Combine a teacher (None: only its description is needed), its quantizer and the content of `visual_tokenizer.json`."""
        super().__init__()
        self.teacher, self.quantizer, self.description = teacher, quantizer, description
        self.hash: str = description["hash"]
        self.vocab_size = quantizer.vocab_size
        self.grid = tuple(description["grid"])
        self.student_size = tuple(description["teacher"]["student_size"])
        self.read_options = ReadOptions(**description.get("read_options", {}))

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "B C h w"]) -> Int[Tensor, "B rows columns"]:
        """Return the token ids of views rendered at `teacher.image_size`."""
        assert self.teacher is not None, "loaded without its teacher"
        return self.quantize(self.teacher(images))

    def quantize(self, features: Float[Tensor, "B F rows columns"]) -> Int[Tensor, "B rows columns"]:
        """Return the token id, 0 to V - 1, of each patch's feature, on the features' device.

        Args:
            features: of the teacher, on its grid; the quantizer must be on the same device.

        Raises:
            MapetError: F is not the width that the quantizer was fitted to.
        """
        channels_last = features.permute(0, 2, 3, 1)
        return self.quantizer(channels_last.flatten(0, 2)).view(channels_last.shape[:3])


def save_tokenizer(
    folder: Path, teacher: Teacher, fit: FitResult, fit_config: dict[str, Any], read_options: ReadOptions = AS_STORED
) -> Tokenizer:
    """Write the codebook and `visual_tokenizer.json` into a new folder, all or nothing, and return the tokenizer. Only rank 0 writes.

    Args:
        folder: new or empty, which the caller has checked; it appears complete.
        teacher: has run, so that its `native_grid` is known. Weights of a network from elsewhere are not copied: their hash and the path are
            recorded. Those of a run, and what was fitted to the images, are.
        fit: the quantizer, and the number of patches of each code, which is saved beside it.
        fit_config: JSON values that record how the quantizer was fitted; outside the hash.
        read_options: how the images were read; in the hash, unless they were read as they are stored.

    Returns:
        The tokenizer, with `teacher`.
    """
    quantizer, stats = fit.quantizer, CodebookStats.from_counts(fit.usage, fit.relative_error)
    log.info("codebook: %s", stats)
    # The hash covers what determines the tokens.
    identity = {
        "teacher": {key: value for key, value in teacher.settings.items() if key != "checkpoint"}, "weights_hash": teacher.weights_hash,
        "quantizer": quantizer.settings, "quantizer_hash": hash_weights(quantizer.state_dict()),
    }  # fmt: skip
    if read_options != AS_STORED:
        identity["read_options"] = read_options.model_dump(mode="json")
    interpolated = teacher.native_grid not in (None, teacher.grid)
    description = identity | {
        "format_version": FORMAT, "hash": files.canonical_hash(identity), "teacher": teacher.settings,
        "teacher_image_size": list(teacher.image_size), "teacher_grid": list(teacher.native_grid or teacher.grid),
        "interpolation": "bilinear, antialiased" if interpolated else None, "teacher_metadata": teacher.metadata,
        "label_free": teacher.label_free, "grid": list(teacher.grid), "vocab_size": quantizer.vocab_size, "feature_size": quantizer.num_features,
        "fit_config": fit_config, "codebook_stats": asdict(stats),
    }  # fmt: skip
    if distributed.rank() == 0:
        with files.atomic_write(folder) as temporary:
            temporary.mkdir()
            files.write_tensors(temporary / CODEBOOK, quantizer.state_dict() | {"usage": fit.usage})
            files.write_checksummed_json(temporary / DESCRIPTION, description)
            teacher.save(temporary)
    return Tokenizer(teacher, quantizer, description)


def load_tokenizer(folder: Path, with_teacher: bool = True) -> Tokenizer:
    """Read a tokenizer that `save_tokenizer` wrote. A weights file of its teacher is taken from where it was, else from `folder`.

    Args:
        folder: with the two files of `save_tokenizer`; their hashes are checked.
        with_teacher: also make the teacher, which `forward` needs. False: `teacher` is None, and no weights are read.

    Returns:
        The tokenizer, on the CPU.

    Raises:
        MapetError: `folder` holds no tokenizer or a damaged one, or its teacher is not trusted, cannot be made, or has other weights than
            the quantizer was fitted with.
    """
    description = files.read_checksummed_json(folder / DESCRIPTION, "tokenizer")
    try:
        files.check_format(description["format_version"], FORMAT, "tokenizer", folder)
        tensors = load_file(folder / CODEBOOK)
        del tensors["usage"]
        if hash_weights(tensors) != description["quantizer_hash"]:
            raise ValueError(f"{CODEBOOK} has another hash than {DESCRIPTION} records")
        tokenizer = Tokenizer(None, Quantizer(description["quantizer"], tensors), description)
        settings, weights_hash = description["teacher"], description["weights_hash"]
        config = TeacherOptions(**{name: settings[key] for key, name in SETTINGS.items() if key in settings})
        precision = settings["precision"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MapetError(
            f"{folder}: damaged tokenizer ({describe_key_error(error)}): run `mapet fit-tokenizer` into a new folder"
        ) from None
    if not with_teacher:
        return tokenizer
    checkpoint = config.teacher_checkpoint
    if checkpoint and not Path(checkpoint).exists():
        local = folder / Path(checkpoint).name
        if not local.exists():
            raise MapetError(
                f"the tokenizer {folder} needs the weights file of its teacher '{format_teachers(config.teacher)}', and {checkpoint} does not "
                f"exist: put the file, or a link to it, into {folder}"
            )
        config = config.model_copy(update={"teacher_checkpoint": str(local)})
    teacher = tokenizer.teacher = make_teacher(config, precision, folder)
    teacher.settings |= {key: settings[key] for key in ("scales",) if key in settings}
    if teacher.weights_hash != weights_hash:
        raise MapetError(
            f"teacher '{teacher.name}' has other weights (sha256 {files.abbreviate_hash(teacher.weights_hash)}) than the codebook in {folder} "
            f"was fitted with ({files.abbreviate_hash(weights_hash)}): its tokens would be wrong. Put the right weights file there, or run "
            "`mapet fit-tokenizer` into a new folder"
        )
    return tokenizer
