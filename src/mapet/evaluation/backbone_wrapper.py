"""The backbone that is evaluated: frozen features of any timm model, or a fine-tuned model with a classifier of its own."""

import copy
import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import timm
import torch
from jaxtyping import Float, UInt8
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.features import Pool, normalize, pool_tokens
from mapet.models.adapt import input_mean_std
from mapet.models.backbone import load_backbone, prepare_for_device
from mapet.models.pretrained import HUB_PREFIXES, timm_model
from mapet.run_state import RunState

RANDOM = "random:"


@dataclass
class BackboneWrapper:
    """A frozen model: uint8 pixels -> feature maps of any of its layers.

    Attributes:
        name: what the user called it.
        image_size: (H, W) of its input.
        mean, std: of each channel, in [0, 1], as it was trained.
        classes: of its own classifier, in the order of its logits; none where it has none whose names are known.
    """

    name: str
    model: nn.Module
    compute: Compute
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def load(cls, source: str, compute: Compute, seed: int = 0) -> "BackboneWrapper":
        """Load a run, a backbone folder, an export, a folder of `finetune`, a weights file, `timm:NAME` or `random:NAME`.

        `random:NAME` is timm's model of that name, or the model of that folder, with random weights, drawn by `seed`: what an
        architecture knows by itself.

        Raises:
            MapetError: nothing of the kind.
        """
        classes: tuple[str, ...] = ()
        name = source.removeprefix(RANDOM)
        torch.manual_seed(seed)
        model: nn.Module
        if source.startswith(HUB_PREFIXES):
            model = timm_model(source, True)
        elif source.startswith(RANDOM):
            model = load_backbone(name, pretrained=False) if Path(name).exists() else timm_model(name, False)
        else:
            folder = Path(source)
            if (folder / "model").is_dir():
                classes = tuple(RunState.read(folder).results["classes"])
                folder = folder / "model"
            model = load_backbone(folder)
        model.eval().requires_grad_(False)
        data = timm.data.resolve_model_data_config(model)
        channels, *size = data["input_size"]
        own = tuple(data["mean"]), tuple(data["std"])
        mean, std = (values if len(values) == channels else values[:1] * channels for values in own)
        return cls(source, prepare_for_device(model, compute), compute, tuple(size), channels, mean, std, classes)

    @classmethod
    def of_vit(cls, vit: VisionTransformer, compute: Compute) -> "BackboneWrapper":
        """Wrap a ViT of mapet's, on its device already, as it is."""
        height, width = vit.patch_embed.img_size
        return cls("the backbone", vit, compute, (height, width), vit.in_chans, *input_mean_std(vit.in_chans))

    @property
    def num_layers(self) -> int:
        """Number of layers to choose from: a ViT's blocks, the stages of other networks."""
        return len(self.model.feature_info)  # type: ignore[arg-type]

    def evenly_spaced_layers(self, count: int = 4) -> list[int]:
        """Number `count` layers spread over the depth, from 1; the last is always among them."""
        return sorted({round(self.num_layers * (i + 1) / count) or 1 for i in range(count)})

    def normalize(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Move pixels to the device and the model's own range."""
        return normalize(self.compute.to(images), self.channels, mean_std=(self.mean, self.std))

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: list[int]
    ) -> list[tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]]:
        """Compute the map of each layer, after the model's last norm, and its class and register tokens, of normalised pixels.

        Both where timm gives them: Hiera's norm stands after the pooling, XCiT and CaiT get their class token after the layers.
        """
        extract = getattr(self.model, "forward_intermediates", None)
        if extract is None:
            raise MapetError(f"{self.name}: timm gives no features of layers for a {type(self.model).__name__}")
        indices, norm = [layer - 1 for layer in layers], not isinstance(self.model, (Hiera, HieraDet))
        has_prefix = getattr(self.model, "num_prefix_tokens", 0) > 0
        takes_prefix = "return_prefix_tokens" in inspect.signature(extract).parameters
        prefix = {"return_prefix_tokens": True} if has_prefix and takes_prefix else {}
        with self.compute.autocast():
            found = extract(images, indices=indices, norm=norm, intermediates_only=True, **prefix)
        return [part if isinstance(part, tuple) else (part, None) for part in found]

    @torch.inference_mode()
    def pooled_features(
        self, images: UInt8[Tensor, "B C H W"], layers: list[int], pool: Pool
    ) -> list[Float[Tensor, "B F"]]:
        """Compute one float32 vector an image and layer: see `pool_tokens`."""
        has_class_token = getattr(self.model, "has_class_token", True)
        return [
            pool_tokens(
                grid.float().flatten(2).transpose(1, 2),
                prefix[:, 0].float() if prefix is not None and has_class_token else None,
                pool,
            )
            for grid, prefix in self.forward_intermediates(self.normalize(images), layers)
        ]

    @torch.inference_mode()
    def last_layer(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Compute the last layer's map, float32."""
        return self.forward_intermediates(self.normalize(images), [self.num_layers])[0][0].float()

    @cached_property
    def map_shape(self) -> tuple[int, int, int]:
        """(D, h, w) of the last layer's map."""
        depth, height, width = self.last_layer(torch.zeros(1, self.channels, *self.image_size, dtype=torch.uint8))[
            0
        ].shape
        return depth, height, width

    @torch.inference_mode()
    def logits(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Compute the logits of the model's own classifier."""
        with self.compute.autocast():
            return self.model(self.normalize(images)).float()

    def with_image_size(self, size: tuple[int, int], copy_weights: bool = False) -> "BackboneWrapper":
        """Make the same model for another input size: positions are interpolated; networks without positions stay as they are.

        Args:
            copy_weights: also where the size is the same, so that the copy may be trained.

        Raises:
            MapetError: the model can't take that size.
        """
        if size == self.image_size and not copy_weights:
            return self
        model = copy.deepcopy(self.model)
        resize = getattr(model, "set_input_size", None)
        try:
            if resize is not None and size != self.image_size:
                resize(img_size=size)
            with torch.inference_mode(), self.compute.autocast():
                model(torch.zeros(1, self.channels, *size, device=self.compute.device))
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise MapetError(f"{self.name} can't take {size[0]} x {size[1]} px: {str(error).splitlines()[0]}") from None
        return replace(self, model=model, image_size=size)

    @property
    def patch_size(self) -> int:
        """Pixels that sizes must be multiples of."""
        size = getattr(getattr(self.model, "patch_embed", None), "patch_size", 32)
        return size if isinstance(size, int) else int(max(size))
