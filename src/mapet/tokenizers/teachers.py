"""Frozen encoders: uint8 images in, one feature vector for each of the student's patches out."""

import importlib
import inspect
import logging
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mapet.config.shared import DALLE, HUBS, PIXELS, VQKD, is_own_code
from mapet.errors import MapetError, did_you_mean
from mapet.tokenizers.dalle import REDUCTION, dalle_encoder
from mapet.tokenizers.quantizers import Quantizer
from mapet.tokenizers.vqkd import vqkd_encoder
from mapet.weights import hash_weights, read_weights

log = logging.getLogger("mapet")


class Teacher(nn.Module):
    """Turns views into features on the student's grid.

    Attributes:
        name: as the user gave it: 'pixels', a timm model, or 'package.module:function'.
        image_size: (h, w) it wants views rendered at, pixels.
        grid: (rows, columns) of the student's patches; other grids are interpolated to it.
        own_grid: (rows, columns) that the encoder gave, once it has run.
        settings: what made it, for the codebook's JSON; `make_teacher(**settings)` makes it again. Its precision is one of
            them: in another one about 1 % of the patches get other words, so tokens are always computed in the codebook's.
        weights_hash: sha256 of its parameters, '' if it has none.
        own_quantizer: how its features are named, if it brings its own words.
        about: what else the codebook's JSON should say: mean and std of its input in [0, 1], prefix tokens that are dropped and,
            of a VQ-KD tokenizer, the teacher and images it was learned from. Nothing is known of a person's own code.
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
        self.own_grid: tuple[int, int] | None = None
        self.weights_hash = hash_weights(encoder.state_dict())
        # Convolutions are faster with channels last; what is no convolution doesn't care.
        self.own_quantizer = _own_quantizer(encoder)
        self.about: dict[str, Any] = {} if is_own_code(name) else getattr(encoder, "about", {})
        self.encoder = encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Features as float32 numbers, whatever the precision of the products, also within somebody else's autocast.

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
        self.own_grid = self._checked(*features.shape[2:])
        if tuple(features.shape[2:]) != self.grid:
            features = F.interpolate(features, size=self.grid, mode="bilinear", antialias=True)
        return features

    def _checked(self, rows: int, columns: int) -> tuple[int, int]:
        """One feature for a whole image, and rows and columns that are mixed up, would be interpolated without a word."""
        height, width = self.image_size
        tells_no_patches = min(rows, columns) < 2 <= min(self.grid)
        if tells_no_patches or not 0.5 < (rows / columns) / (height / width) < 2:
            raise MapetError(
                f"teacher '{self.name}' gave a grid of {rows} x {columns} for views of {height} x {width} px, to be named on "
                f"{self.grid[0]} x {self.grid[1]} patches: it must be a map (batch, features, rows, columns) of the view"
            )
        return rows, columns


def _own_quantizer(encoder: nn.Module) -> Quantizer | None:
    """An encoder with a `codebook` (K, F) names its features by cosine (VQ-KD); with `gives_logits`, by the largest."""
    if words := getattr(encoder, "gives_logits", 0):
        return Quantizer({"kind": "argmax", "vocab_size": int(words)}, {})
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
    """A teacher by name.

    Args:
        teacher: 'pixels' (raw patches, no encoder); 'vqkd' and 'dalle', whose files bring their own words; any timm model, e.g.
            'resnet50x64_clip.openai'; or 'package.module:function', a function of (checkpoint) that returns an encoder: a callable that maps
            (B, C, h, w) floats in [0, 1] to (B, F, rows, columns).
        student_size: (H, W) of the student's input; with `patch_size` it fixes the grid.
        checkpoint: a local weights file; without one timm downloads its own.
        teacher_size: (h, w) of the views it sees; None: timm's own for that model, else the student's.
        layer: which of timm's intermediate feature maps; -1 is the last.
        precision: of its matrix products, 'float32' or 'bfloat16'.
        final_norm: apply timm's last normalization to the features (k-CLIP: not). Prefix tokens are always dropped.

    Raises:
        MapetError: unknown name or precision, missing or unsafe checkpoint, weights that can't be had.
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
    grid = student_size[0] // patch_size, student_size[1] // patch_size
    if teacher == PIXELS:
        encoder: nn.Module = _Pixels(patch_size)
        size = student_size
    elif is_own_code(teacher):
        encoder = _person_s_encoder(teacher, checkpoint)
        size = teacher_size or getattr(encoder, "image_size", None) or student_size
    elif teacher == VQKD:
        encoder = vqkd_encoder(checkpoint)
        size = encoder.image_size
    elif teacher == DALLE:
        encoder = dalle_encoder(checkpoint)
        size = teacher_size or (REDUCTION * grid[0], REDUCTION * grid[1])
    else:
        encoder = _TimmFeatures(teacher, checkpoint, channels, teacher_size, layer, final_norm)
        size = encoder.image_size
    return Teacher(encoder, teacher, (int(size[0]), int(size[1])), grid, settings)


class _Pixels(nn.Module):
    """The patch's own pixels, flattened: label-free and needs nothing."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F rows columns"]:
        return F.pixel_unshuffle(images, self.patch_size)


class _TimmFeatures(nn.Module):
    """One of timm's intermediate feature maps, not normalised (k-CLIP: the last stage before the attention pool)."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        checkpoint: str | None,
        channels: int,
        size: tuple[int, int] | None,
        layer: int,
        final_norm: bool,
    ) -> None:
        super().__init__()
        overlay = {"state_dict": read_weights(checkpoint), "custom_load": False} if checkpoint else None
        known = timm.list_models()
        if not name.startswith(HUBS) and name.split(".")[0] not in known:
            raise MapetError(
                f"unknown teacher '{name}'{did_you_mean(name, [PIXELS, VQKD, DALLE, *known]) or '.'} "
                "Use 'pixels', 'vqkd', 'dalle', a timm model or package.module:function"
            )
        if not checkpoint and not name.startswith("local-dir:"):
            log.info("weights of teacher %s: from this machine's cache, else from the Hub", name)
        try:
            config = timm.models.get_pretrained_cfg(name) if not name.startswith(HUBS) else None
            own = tuple(config.input_size[1:]) if config else None
            resized = {"img_size": size} if size and size != own and takes_image_size(name) else {}
            # With the classifier it comes with: without one timm loads loosely, and a wrong file would pass unnoticed.
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels, **resized
            )
        except MapetError:
            raise
        except Exception as error:  # hub, network, file and shape errors of many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            way_out = (
                f"is {checkpoint} a checkpoint of it?" if checkpoint else "give a local file: --teacher-checkpoint FILE"
            )
            reason = reason[:300].rstrip(".")
            raise MapetError(f"cannot load the weights of teacher '{name}': {reason}; {way_out}") from None
        if not hasattr(model, "forward_intermediates"):
            raise MapetError(f"teacher '{name}' gives no intermediate features in timm; choose another model")
        if size and name.startswith(HUBS) and hasattr(model, "set_input_size"):  # its own size is known only now
            model.set_input_size(img_size=size)
        count = len(model.feature_info)
        if not -count <= layer < count:
            raise MapetError(f"layer {layer} of teacher '{name}': it has {count}, so {-count} to {count - 1}")
        data = timm.data.resolve_model_data_config(model)
        self.name, self.model, self.layer, self.final_norm = name, model, layer % count, final_norm
        self.image_size: tuple[int, int] = size or tuple(data["input_size"][1:])
        for what in ("mean", "std"):
            values = data[what] if len(data[what]) == channels else [sum(data[what]) / len(data[what])] * channels
            self.register_buffer(what, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.about = {what: getattr(self, what).flatten().tolist() for what in ("mean", "std")}
        self.about["prefix_tokens_dropped"] = getattr(model, "num_prefix_tokens", 0)

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        normal = (images - self.mean) / self.std
        try:
            return self.model.forward_intermediates(
                normal, indices=[self.layer], norm=self.final_norm, intermediates_only=True, output_fmt="NCHW"
            )[0]
        except AssertionError as error:  # timm's check of sizes
            raise MapetError(
                f"teacher '{self.name}' takes no views of {images.shape[2]} x {images.shape[3]} px: {error}; choose another "
                "--teacher-image-size, or leave it out"
            ) from None


def takes_image_size(name: str) -> bool:
    return name.startswith(("vit_", "deit", "eva", "beit", "swin", "naflexvit", "flexivit", "samvit", "xcit"))


def _person_s_encoder(name: str, checkpoint: str | None) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise MapetError(
            f"teacher '{name}': cannot import {module_name} ({error}); is it installed or on PYTHONPATH?"
        ) from None
    except AttributeError:
        known = vars(importlib.import_module(module_name))
        raise MapetError(
            f"teacher '{name}': {module_name} has no '{function_name}'{did_you_mean(function_name, known)}"
        ) from None
    try:
        inspect.signature(function).bind(checkpoint)
    except TypeError:
        raise MapetError(
            f"teacher '{name}' must be a function of one argument, the checkpoint path or None, that returns an encoder"
        ) from None
    encoder = function(checkpoint)
    if not callable(encoder):
        raise MapetError(f"teacher '{name}' must return a callable encoder, got {type(encoder).__name__}")
    return encoder if isinstance(encoder, nn.Module) else _Callable(encoder)


class _Callable(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        if (size := getattr(function, "image_size", None)) is not None:
            self.image_size = size

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)
