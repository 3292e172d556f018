"""What is evaluated: a backbone of any kind as frozen features, or a fine-tuned model with a classifier of its own."""

import copy
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float, UInt8
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor, nn

from mapet.device import Compute
from mapet.errors import MapetError
from mapet.models.backbone import load_backbone, prepare_for_device
from mapet.models.pretrained import HUB_PREFIXES, timm_model
from mapet.run_state import RunState

Pool = Literal["avg", "token", "both"]
RANDOM = "random:"


@dataclass
class Encoder:
    """A frozen model: uint8 pixels -> feature maps of any of its layers.

    Attributes:
        name: what the user called it.
        image_size: (H, W) of its input.
        mean, std: of each channel, in [0, 1], as it was trained.
        classes: of its own classifier, in the order of its logits; none where it has none that we know the names of.
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
    def load(cls, source: str, compute: Compute, seed: int = 0, model_args: dict[str, Any] | None = None) -> "Encoder":
        """A run, a backbone folder, an export, a folder of `finetune`, a weights file, any model of timm's as `timm:NAME`, or `random:NAME`.

        `random:NAME` is timm's model of that name, or the model of that folder, with random weights, drawn by `seed`: what an
        architecture knows by itself. `model_args` is what weights files don't tell of their ViT; other sources tell it all.

        Raises:
            MapetError: nothing of the kind.
        """
        classes: tuple[str, ...] = ()
        args = model_args if model_args and Path(source.removeprefix(RANDOM)).is_file() else {}
        torch.manual_seed(seed)
        if source.startswith(RANDOM):
            name = source.removeprefix(RANDOM)
            ours = Path(name).exists()
            model: nn.Module = (
                load_backbone(name, pretrained=False, **args) if ours else timm_model(name, pretrained=False)
            )
        else:
            folder = Path(source)
            if (folder / "model").is_dir():
                classes = tuple(RunState.read(folder).results["classes"])
                folder = folder / "model"
            model = timm_model(source, True) if source.startswith(HUB_PREFIXES) else load_backbone(folder, **args)
        data = timm.data.resolve_model_data_config(model)
        channels, *size = data["input_size"]
        model.eval().requires_grad_(False)
        own = tuple(data["mean"]), tuple(data["std"])
        mean, std = (values if len(values) == channels else values[:1] * channels for values in own)
        return cls(source, prepare_for_device(model, compute), compute, tuple(size), channels, mean, std, classes)

    @property
    def num_layers(self) -> int:
        """How many layers there are to choose from: a ViT's blocks, the stages of other networks."""
        return len(self.model.feature_info)  # type: ignore[arg-type]

    def spread_layers(self, most: int = 4) -> list[int]:
        """Numbers of `most` layers spread over the depth, from 1; the last is always among them."""
        return sorted({round(self.num_layers * (i + 1) / most) or 1 for i in range(most)})

    def normalize(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """To the device and the model's own range."""
        pixels = self.compute.to(images).to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.div_(255).sub_(mean).div_(std)

    def maps(
        self, images: Float[Tensor, "B C H W"], layers: list[int]
    ) -> list[tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]]:
        """Normalised pixels -> the map of each layer, after the model's last norm, and its class and register tokens.

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
    def pooled(self, images: UInt8[Tensor, "B C H W"], layers: list[int], pool: Pool) -> list[Float[Tensor, "B D"]]:
        """One float32 vector an image and layer: the mean of the patches ('avg'), the class token, or the two beside each other."""
        return [_pool(grid.float(), prefix, pool, self) for grid, prefix in self.maps(self.normalize(images), layers)]

    @torch.inference_mode()
    def tokens(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """The last layer's map, float32."""
        return self.maps(self.normalize(images), [self.num_layers])[0][0].float()

    @torch.inference_mode()
    def logits(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Of the model's own classifier."""
        with self.compute.autocast():
            return self.model(self.normalize(images)).float()

    def copy_at(self, size: tuple[int, int]) -> "Encoder":
        """`at_size`, with weights of its own, that may be trained."""
        resized = self.at_size(size)
        return resized if resized is not self else replace(self, model=copy.deepcopy(self.model))

    def at_size(self, size: tuple[int, int]) -> "Encoder":
        """The same weights for another input size: positions are interpolated; networks without positions stay as they are.

        Raises:
            MapetError: the model can't take that size.
        """
        if size == self.image_size:
            return self
        model = copy.deepcopy(self.model)
        resize = getattr(model, "set_input_size", None)
        try:
            if resize is not None:
                resize(img_size=size)
            with torch.inference_mode(), self.compute.autocast():
                model(torch.zeros(1, self.channels, *size, device=self.compute.device))
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise MapetError(f"{self.name} can't take {size[0]} x {size[1]} px: {str(error).splitlines()[0]}") from None
        return replace(self, model=model, image_size=size)

    @property
    def patch(self) -> int:
        """Pixels that sizes must be multiples of."""
        size = getattr(getattr(self.model, "patch_embed", None), "patch_size", 32)
        return size if isinstance(size, int) else int(max(size))


def _pool(grid: Tensor, prefix: Tensor | None, pool: Pool, encoder: Encoder) -> Float[Tensor, "B D"]:
    mean = grid.mean(dim=(2, 3))
    if pool == "avg":
        return mean
    if prefix is None or not getattr(encoder.model, "has_class_token", True):
        raise MapetError(f"{encoder.name} has no class token in its layers: use --pool avg")
    first = prefix[:, 0].float()
    return first if pool == "token" else torch.cat([first, mean], 1)
