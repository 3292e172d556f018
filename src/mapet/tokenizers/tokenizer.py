"""The tokenizer: a frozen teacher gives a feature for each patch, and a quantizer names it. On disk: safetensors and JSON."""

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mapet import distributed
from mapet.config.shared import HUB_PREFIXES, is_custom_teacher
from mapet.data.dataset import Batch
from mapet.data.image_list import ImageList
from mapet.device import ComputeContext
from mapet.errors import MapetError, did_you_mean, format_size, option
from mapet.files import (
    atomic_write,
    canonical_hash,
    check_format,
    read_checksummed_json,
    write_checksummed_json,
    write_tensors,
)
from mapet.tokenizers import teachers
from mapet.tokenizers.quantizers import Quantizer
from mapet.weights import hash_weights

log = logging.getLogger("mapet")
CODEBOOK = "codebook.safetensors"
DESCRIPTION = "visual_tokenizer.json"
FORMAT = 1
OPTIONS = {
    "checkpoint": "teacher_checkpoint", "teacher_size": "teacher_image_size", "layer": "teacher_layer", "final_norm": "teacher_final_norm",
}  # fmt: skip
"""Settings that only some teachers use, and the names of their options."""


class Teacher(nn.Module):
    """A frozen encoder that gives features on the student's grid.

    Attributes:
        name: 'pixels', a timm model, 'package.module:function', ...
        image_size: (h, w) of the views it takes, pixels.
        grid: (rows, columns) of the student's patches; other grids are interpolated to it.
        native_grid: (rows, columns) that the encoder gave, once it has run.
        settings: what made it, for the tokenizer's JSON; `make_teacher(**settings)` makes it again. Its precision is one of
            them: in another one about 1 % of the patches get other tokens, so tokens are always computed in this one.
        weights_hash: sha256 of its parameters, '' if it has none.
        builtin_quantizer: names its features, if it has a codebook.
        metadata: what else the tokenizer's JSON should say: mean and std of its input in [0, 1], prefix tokens that are dropped
            and, of a VQ-KD tokenizer, the teacher and images it was learned from. Nothing is known of custom code.
    """

    def __init__(self, encoder: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings, self.name = settings, settings["teacher"]
        rows, columns = (side // settings["patch_size"] for side in settings["student_size"])
        self.grid = rows, columns
        height, width = settings["teacher_size"] or getattr(encoder, "image_size", None) or settings["student_size"]
        self.image_size = int(height), int(width)
        self.native_grid: tuple[int, int] | None = None
        self.weights_hash = hash_weights(encoder.state_dict())
        self.metadata: dict[str, Any] = {} if is_custom_teacher(self.name) else getattr(encoder, "metadata", {})
        self.builtin_quantizer: Quantizer | None = None
        if num_logits := getattr(encoder, "num_logits", 0):
            self.builtin_quantizer = Quantizer({"kind": "argmax", "vocab_size": int(num_logits)}, {})
        elif isinstance(codes := getattr(encoder, "codebook", None), Tensor):
            codes = codes.detach().float()
            self.builtin_quantizer = Quantizer({"kind": "nearest", "metric": "cosine"}, {"centroids": codes})
        # Convolutions are faster with channels last; other layers do not care.
        self.encoder = encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Compute features as float32 numbers, whatever the precision of the products, also within another autocast.

        Raises:
            MapetError: the encoder returned something that is not a map of features, or a map that can't be of these patches.
        """
        bfloat16 = self.settings["precision"] == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            features = self.encoder((images.float() / 255).contiguous(memory_format=torch.channels_last))
        if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[0] != images.shape[0]:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise MapetError(
                f"teacher '{self.name}' must return a tensor (batch, features, rows, columns), got {shape} for {len(images)} images"
            )
        self.native_grid = rows, columns = features.shape[2], features.shape[3]
        height, width = self.image_size
        # One feature for a whole image, or swapped rows and columns, would be interpolated silently.
        single = min(rows, columns) < 2 <= min(self.grid)
        if single or not 0.5 < (rows / columns) / (height / width) < 2:
            raise MapetError(
                f"teacher '{self.name}' gave a grid of {rows} x {columns} for views of {height} x {width} px, to be named on "
                f"{format_size(self.grid)} patches: it must be a map (batch, features, rows, columns) of the view"
            )
        features = features.float()
        if self.native_grid != self.grid:
            features = F.interpolate(features, size=self.grid, mode="bilinear", antialias=True)
        return features

    def batch_features(
        self, batch: Batch, images: ImageList, compute: ComputeContext
    ) -> Float[Tensor, "B F rows columns"]:
        """Compute the features of a batch's teacher views.

        Raises:
            MapetError: a feature is NaN or infinite; the image is named.
        """
        assert batch.teacher_images is not None
        features: Tensor = self(compute.to(batch.teacher_images))
        if not features.isfinite().all():
            bad = batch.image_index[~features.isfinite().flatten(1).all(dim=1).cpu()]
            raise MapetError(
                f"teacher '{self.name}' gave NaN or infinite features for {len(bad)} of {len(batch)} images, first "
                f"{images.id(int(bad[0]))!r}: check its weights and the range of its input ([0, 1])"
            )
        return features


def make_teacher(
    teacher: str,
    student_size: tuple[int, int],
    patch_size: int,
    channels: int = 3,
    checkpoint: str | None = None,
    teacher_size: tuple[int, int] | None = None,
    layer: int = -1,
    precision: str = "float32",
    final_norm: bool = False,
) -> Teacher:
    """Create a teacher by name.

    Args:
        teacher: a module of `mapet.tokenizers.teachers` ('pixels'; 'vqkd' and 'dalle', which have a built-in codebook); any timm
            model, e.g. 'resnet50x64_clip.openai'; or 'package.module:function', a function of (checkpoint) that returns an
            encoder: a callable that maps (B, C, h, w) floats in [0, 1] to (B, F, rows, columns).
        student_size: (H, W) of the student's input; with `patch_size` it fixes the grid.
        checkpoint: a local weights file; without one timm downloads its own.
        teacher_size: (h, w) of the views it takes; None: timm's own for that model, else the student's.
        layer: which of timm's intermediate feature maps; -1 is the last.
        precision: of its matrix products, 'float32' or 'bfloat16'.
        final_norm: apply timm's last normalization to the features (k-CLIP: not). Prefix tokens are always dropped.

    Raises:
        MapetError: unknown name, an option that this teacher does not use, missing or unsafe checkpoint, weights that
            can't be had.
    """
    settings: dict[str, Any] = {
        "teacher": teacher, "student_size": list(student_size), "patch_size": patch_size, "channels": channels, "checkpoint": checkpoint,
        "teacher_size": list(teacher_size) if teacher_size else None, "layer": layer, "precision": precision, "final_norm": final_norm,
    }  # fmt: skip
    build = _find_builder(teacher)
    used = inspect.signature(build).parameters
    defaults = inspect.signature(make_teacher).parameters
    for name, flag in OPTIONS.items():
        if name not in used and settings[name] != defaults[name].default:
            raise MapetError(f"teacher '{teacher}' does not use {option(flag)}: leave it out")
    grid = student_size[0] // patch_size, student_size[1] // patch_size
    given = settings | {"grid": grid, "teacher_size": teacher_size and tuple(teacher_size)}
    return Teacher(build(**{name: given[name] for name in used}), settings)


def _find_builder(teacher: str) -> Callable[..., nn.Module]:
    """Return `build` of the module that knows this name."""
    modules = sorted({module.name for module in pkgutil.iter_modules(teachers.__path__)} - {"custom", "timm_model"})
    known = timm.list_models()
    if is_custom_teacher(teacher):
        name = "custom"
    elif teacher.startswith(HUB_PREFIXES) or teacher.split(".")[0] in known:
        name = "timm_model"
    elif (name := teacher) not in modules:
        raise MapetError(
            f"unknown teacher '{teacher}'{did_you_mean(teacher, [*modules, *known]) or '.'} "
            f"Use {', '.join(map(repr, modules))}, a timm model or package.module:function"
        )
    return importlib.import_module(f"{teachers.__name__}.{name}").build


@dataclass(frozen=True)
class CodebookStats:
    """Use of a codebook by the patches it was fitted to.

    Attributes:
        num_used_codes: codes that at least one patch has.
        num_dead_codes: codes that none has.
        perplexity: exp of the entropy of code usage; K when all are equally frequent, 1 when one takes all.
        top_code_fraction: fraction of patches that have the most frequent code: the majority baseline of predicting tokens.
        quantization_error: mean squared distance to the centroid, divided by that to one global mean (0: exact, 1:
            useless); None where there are no centroids.
        num_patches: how many patches it was measured on.
    """

    num_used_codes: int
    num_dead_codes: int
    perplexity: float
    top_code_fraction: float
    quantization_error: float | None
    num_patches: int

    @classmethod
    def from_counts(cls, counts: Int[Tensor, " K"], quantization_error: float | None = None) -> "CodebookStats":
        """Compute them from the number of patches that have each code."""
        fractions, used = counts.double() / counts.sum(), int((counts > 0).sum())
        perplexity = float(torch.special.entr(fractions).sum().exp())
        return cls(used, len(counts) - used, perplexity, float(fractions.max()), quantization_error, int(counts.sum()))

    def __str__(self) -> str:
        error = self.quantization_error
        return (
            f"{self.num_used_codes} of {self.num_used_codes + self.num_dead_codes} codes used ({self.num_dead_codes} dead), "
            f"perplexity {self.perplexity:.1f}, most frequent code {self.top_code_fraction:.1%} of patches, "
            f"{'' if error is None else f'quantization error {error:.3f} of the global mean, '}over {self.num_patches:,} patches"
        )


class Tokenizer(nn.Module):
    """uint8 views -> token ids: the teacher's feature of each patch, quantized (k-CLIP in the paper).

    Attributes:
        teacher: None when loaded for its description alone.
        description: everything `visual_tokenizer.json` holds.
        hash: identity of the codebook: quantizer, teacher and its weights.
        grid: (rows, columns) of patches.
        student_size: (H, W) of the student's input, pixels.
    """

    grid: tuple[int, int]
    student_size: tuple[int, int]

    def __init__(self, teacher: Teacher | None, quantizer: Quantizer, description: dict[str, Any]) -> None:
        super().__init__()
        self.teacher, self.quantizer, self.description = teacher, quantizer, description
        self.hash: str = description["hash"]
        self.vocab_size = quantizer.vocab_size
        self.grid = tuple(description["grid"])
        self.student_size = tuple(description["teacher"]["student_size"])

    @property
    def centroids(self) -> Float[Tensor, "K d"] | None:
        """Codes in the quantizer's space; None where it has no centroids."""
        return self.quantizer.centroids

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "B C h w"]) -> Int[Tensor, "B rows columns"]:
        """Compute the token ids of views rendered at `teacher.image_size`."""
        assert self.teacher is not None, "loaded without its teacher"
        return self.quantize(self.teacher(images))

    def quantize(self, features: Float[Tensor, "B F rows columns"]) -> Int[Tensor, "B rows columns"]:
        """Return the token id of each feature."""
        flat = features.permute(0, 2, 3, 1)
        return self.quantizer(flat.flatten(0, 2)).view(flat.shape[:3])


def save_tokenizer(
    folder: Path, teacher: Teacher, quantizer: Quantizer, usage: Tensor, error: float | None, fit_config: dict[str, Any]
) -> Tokenizer:
    """Write the quantizer's tensors, the usage of codes and the description, all or nothing, as a new folder; rank 0 does.

    Args:
        usage: (K,) patches that have each code.
        error: see `CodebookStats.quantization_error`.
        fit_config: what the description is to say of the fit.
    """
    stats = CodebookStats.from_counts(usage, error)
    log.info("codebook: %s", stats)
    # The hash is over what decides tokens.
    identity = {
        "teacher": {key: value for key, value in teacher.settings.items() if key != "checkpoint"},
        "weights_hash": teacher.weights_hash,
        "quantizer": quantizer.settings,
        "quantizer_hash": hash_weights(quantizer.state_dict()),
    }
    interpolated = teacher.native_grid not in (None, teacher.grid)
    description = identity | {
        "format_version": FORMAT, "hash": canonical_hash(identity), "teacher": teacher.settings,
        "teacher_image_size": list(teacher.image_size), "teacher_grid": list(teacher.native_grid or teacher.grid),
        "interpolation": "bilinear, antialiased" if interpolated else None, "teacher_metadata": teacher.metadata,
        "grid": list(teacher.grid), "vocab_size": quantizer.vocab_size, "feature_size": quantizer.num_features,
        "fit_config": fit_config, "codebook_stats": asdict(stats),
    }  # fmt: skip
    if distributed.rank() == 0:
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            write_tensors(temporary / CODEBOOK, quantizer.state_dict() | {"usage": usage})
            write_checksummed_json(temporary / DESCRIPTION, description)
    return Tokenizer(teacher, quantizer, description)


def load_tokenizer(folder: Path, with_teacher: bool = True, trusted_teacher: str | None = None) -> Tokenizer:
    """Read a tokenizer. A weights file of its teacher is taken from where it was, else from the tokenizer's folder.

    Args:
        with_teacher: also make the teacher, which `forward` needs.
        trusted_teacher: the 'package.module:function' that may be imported. A codebook from elsewhere could name any function,
            so a custom encoder runs only if its name is given again.

    Raises:
        MapetError: not a tokenizer, damaged, its teacher is not to be had or has other weights than it was fitted with.
    """
    description = read_checksummed_json(folder / DESCRIPTION, "tokenizer")
    try:
        check_format(description["format_version"], FORMAT, "tokenizer", folder)
        tensors = load_file(folder / CODEBOOK)
        del tensors["usage"]
        if hash_weights(tensors) != description["quantizer_hash"]:
            raise ValueError(f"the codebook is not the one that {DESCRIPTION} describes")
        tokenizer = Tokenizer(None, Quantizer(description["quantizer"], tensors), description)
        settings = dict(description["teacher"])
        name = settings["teacher"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MapetError(f"{folder}: damaged tokenizer ({error}); fit it again") from None
    if not with_teacher:
        return tokenizer
    if is_custom_teacher(name) and name != trusted_teacher:
        raise MapetError(
            f"the tokenizer {folder} runs your own code '{name}'; to allow it, say {option('teacher')} {name}"
        )
    if (checkpoint := settings["checkpoint"]) and not Path(checkpoint).exists():
        settings["checkpoint"] = str(folder / Path(checkpoint).name)
        if not Path(settings["checkpoint"]).exists():
            raise MapetError(
                f"the weights file of teacher '{name}' in {folder}, {checkpoint}, is not there: put it, or a link to it, into {folder}"
            )
    tokenizer.teacher = make_teacher(**settings)
    if tokenizer.teacher.weights_hash != description["weights_hash"]:
        raise MapetError(
            f"teacher '{name}' has other weights (sha256 {tokenizer.teacher.weights_hash[:12]}) than the codebook in {folder} was fitted "
            f"with ({description['weights_hash'][:12]}): its tokens would be wrong. Put the right weights file there or fit again"
        )
    return tokenizer
