"""Frozen encoders: uint8 images in, one feature vector for each of the student's patches out."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mapet.config.shared import HUBS, is_own_code
from mapet.errors import MapetError, by, did_you_mean, option
from mapet.tokenizers import teachers
from mapet.tokenizers.quantizers import Quantizer
from mapet.weights import hash_weights

OPTIONS = {
    "checkpoint": "teacher_checkpoint",
    "teacher_size": "teacher_image_size",
    "layer": "teacher_layer",
    "final_norm": "teacher_final_norm",
}
"""Settings that only some teachers use."""


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

    def __init__(
        self,
        encoder: nn.Module,
        name: str,
        image_size: tuple[int, int],
        grid: tuple[int, int],
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.grid, self.settings = name, image_size, grid, settings
        self.native_grid: tuple[int, int] | None = None
        self.weights_hash = hash_weights(encoder.state_dict())
        self.builtin_quantizer = _builtin_quantizer(encoder)
        self.metadata: dict[str, Any] = {} if is_own_code(name) else getattr(encoder, "metadata", {})
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
        features = features.float()
        self.native_grid = features.shape[2], features.shape[3]
        self._check_grid(*self.native_grid)
        if self.native_grid != self.grid:
            features = F.interpolate(features, size=self.grid, mode="bilinear", antialias=True)
        return features

    def _check_grid(self, rows: int, columns: int) -> None:
        """Refuse one feature for a whole image, and swapped rows and columns: they would be interpolated silently."""
        height, width = self.image_size
        single = min(rows, columns) < 2 <= min(self.grid)
        if single or not 0.5 < (rows / columns) / (height / width) < 2:
            raise MapetError(
                f"teacher '{self.name}' gave a grid of {rows} x {columns} for views of {height} x {width} px, to be named on "
                f"{by(self.grid)} patches: it must be a map (batch, features, rows, columns) of the view"
            )


def _builtin_quantizer(encoder: nn.Module) -> Quantizer | None:
    if num_logits := getattr(encoder, "num_logits", 0):
        return Quantizer({"kind": "argmax", "vocab_size": int(num_logits)}, {})
    if isinstance(codebook := getattr(encoder, "codebook", None), Tensor):
        return Quantizer({"kind": "nearest", "metric": "cosine"}, {"centroids": codebook.detach().float()})
    return None


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
        MapetError: unknown name or precision, an option that this teacher does not use, missing or unsafe checkpoint,
            weights that can't be had.
    """
    settings = {
        "teacher": teacher,
        "student_size": list(student_size),
        "patch_size": patch_size,
        "channels": channels,
        "checkpoint": checkpoint,
        "teacher_size": list(teacher_size) if teacher_size else None,
        "layer": layer,
        "precision": precision,
        "final_norm": final_norm,
    }
    if precision not in ("float32", "bfloat16"):
        raise MapetError(f"unknown precision '{precision}' of teacher '{teacher}': 'float32' or 'bfloat16'")
    build = _find_builder(teacher)
    used = inspect.signature(build).parameters
    defaults = inspect.signature(make_teacher).parameters
    for name, flag in OPTIONS.items():
        if name not in used and settings[name] != defaults[name].default:
            raise MapetError(f"teacher '{teacher}' does not use {option(flag)}: leave it out")
    grid = student_size[0] // patch_size, student_size[1] // patch_size
    given = settings | {"grid": grid, "teacher_size": teacher_size and tuple(teacher_size)}
    encoder = build(**{name: given[name] for name in used})
    height, width = teacher_size or getattr(encoder, "image_size", None) or student_size
    return Teacher(encoder, teacher, (int(height), int(width)), grid, settings)


def _find_builder(teacher: str) -> Callable[..., nn.Module]:
    """Return `build` of the module that knows this name."""
    modules = {module.name for module in pkgutil.iter_modules(teachers.__path__)} - {"custom", "timm_model"}
    known = timm.list_models()
    if is_own_code(teacher):
        name = "custom"
    elif teacher in modules:
        name = teacher
    elif teacher.startswith(HUBS) or teacher.split(".")[0] in known:
        name = "timm_model"
    else:
        raise MapetError(
            f"unknown teacher '{teacher}'{did_you_mean(teacher, [*sorted(modules), *known]) or '.'} "
            f"Use {', '.join(map(repr, sorted(modules)))}, a timm model or package.module:function"
        )
    build: Callable[..., nn.Module] = importlib.import_module(f"{teachers.__name__}.{name}").build
    return build
