"""Frozen features: of batches by any timm model, and of whole sets, computed once for all protocols and kept as float16."""

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from jaxtyping import Float, Int, UInt8
from timm.models import Hiera, VisionTransformer
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor, nn

from mapet.data.dataset import UnreadableImages, ViewDataset, position_batches, readable_batches
from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec, input_mean_std, normalize
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation.datasets import LabeledSet
from mapet.models.backbone import HUB_PREFIXES, load_backbone, prepare_for_device, timm_model
from mapet.run_state import RunState
from mapet.tokenizers.feature_store import FeatureStore

Pool = Literal["avg", "token", "both"]
RANDOM = "random:"
MAX_UNREADABLE = 0.5
"""Largest fraction of a set's images that may be unreadable."""
BLOCK_BYTES = 256 << 20
"""Float32 bytes of the rows that are read together."""


def check_finite_features(features: Tensor, whose: str = "the backbone") -> None:
    """Raise MapetError for numbers that nothing can be learned from, and that no classifier takes."""
    if not bool(features.isfinite().all()):
        raise MapetError(
            f"{whose} gives features that are not finite: try {option('precision')} float32. If that changes nothing its weights are "
            "broken, by a training that diverged perhaps: train again with a lower learning rate"
        )


@dataclass(frozen=True)
class CacheConfig:
    """Where features are kept, and how images are read.

    Attributes:
        memory: bytes that one set's features may take; more go to a file in `scratch_dir`.
        progress: shows a progress bar.
    """

    memory: int = 1 << 62
    scratch_dir: Path = Path()
    batch_size: int = 64
    progress: bool = True


# ---- the backbone


@dataclass
class BackboneWrapper:
    """The model that is evaluated, frozen: uint8 pixels -> feature maps of any of its layers.

    Attributes:
        name: what the user called it.
        image_size: (H, W) of its input.
        mean, std: of each channel, in [0, 1], as it was trained.
        classes: of its own classifier, in the order of its logits; none where it has none whose names are known.
    """

    name: str
    model: nn.Module
    compute: ComputeContext
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def load(cls, source: str, compute: ComputeContext, seed: int = 0) -> "BackboneWrapper":
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
        stats = tuple(data["mean"]), tuple(data["std"])
        mean, std = (values if len(values) == channels else values[:1] * channels for values in stats)
        return cls(source, prepare_for_device(model, compute), compute, tuple(size), channels, mean, std, classes)

    @classmethod
    def of_vit(cls, vit: VisionTransformer, compute: ComputeContext) -> "BackboneWrapper":
        """Wrap a ViT of mapet's, on its device already, as it is."""
        size: tuple[int, int] = vit.patch_embed.img_size
        return cls("the backbone", vit, compute, size, vit.in_chans, *input_mean_std(vit.in_chans))

    @property
    def num_layers(self) -> int:
        """Number of layers to choose from: a ViT's blocks, the stages of other networks."""
        return len(self.model.feature_info)  # type: ignore[arg-type]

    def evenly_spaced_layers(self, count: int = 4) -> list[int]:
        """Number `count` layers spread over the depth, from 1; the last is always among them."""
        return sorted({round(self.num_layers * (i + 1) / count) or 1 for i in range(count)})

    @property
    def patch_size(self) -> int:
        """Pixels that sizes must be multiples of."""
        size = getattr(getattr(self.model, "patch_embed", None), "patch_size", 32)
        return size if isinstance(size, int) else int(max(size))

    def batches(
        self, images: ImageList, config: CacheConfig, show: str | None = None, **dataset: Any
    ) -> Iterator[tuple[Int[Tensor, " b"], UInt8[Tensor, "b C H W"]]]:
        """Yield (indices, pixels) of the centered views of those that can be read, in a random order that is always the same.

        Args:
            show: name of the progress bar; None shows none.
            dataset: further arguments of `ViewDataset`, such as `augment`.
        """
        batches = position_batches(np.random.default_rng(0).permutation(len(images)), config.batch_size)
        options = {"spec": ViewSpec(image_size=self.image_size)} | dataset
        views = ViewDataset(images, channels=self.channels, image_size=self.image_size, **options)
        show = show if config.progress else None
        for batch in readable_batches(views, batches, UnreadableImages(images, MAX_UNREADABLE), show):
            assert batch.images is not None
            yield batch.image_index, batch.images

    def normalize(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Move pixels to the device and the model's own range."""
        return normalize(self.compute.to(images), self.channels, mean_std=(self.mean, self.std))

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: list[int]
    ) -> list[tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]]:
        """Compute the map of each layer, after the model's last norm, and its class and register tokens, of normalized pixels.

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
        """Compute one float32 vector an image and layer: the mean of its patches ('avg'), the class token ('token') or both.

        Raises:
            MapetError: there is no class token.
        """
        pooled = []
        for grid, prefix in self.forward_intermediates(self.normalize(images), layers):
            average = grid.float().flatten(2).transpose(1, 2).mean(dim=1)
            if pool == "avg":
                pooled.append(average)
            elif prefix is None or not getattr(self.model, "has_class_token", True):
                raise MapetError(f"the backbone has no class token in its layers: use {option('pool')} avg")
            else:
                pooled.append(torch.cat([prefix[:, 0].float(), *([average] if pool == "both" else [])], 1))
        return pooled

    @torch.inference_mode()
    def last_layer(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Compute the last layer's map, float32."""
        return self.forward_intermediates(self.normalize(images), [self.num_layers])[0][0].float()

    @cached_property
    def map_shape(self) -> tuple[int, int, int]:
        """(D, h, w) of the last layer's map."""
        black = torch.zeros(1, self.channels, *self.image_size, dtype=torch.uint8)
        depth, height, width = self.last_layer(black)[0].shape
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


# ---- features of whole sets


@dataclass
class FeatureCache:
    """Features of some layers of each image.

    Rows lie in a random order (the same for every backbone), so that those that are read in turn are a random sample.

    Attributes:
        store: (n, sum of widths).
        index: image of each row.
        labels: class of each row.
        columns: of each layer, by its number from 1.
    """

    store: FeatureStore
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    columns: dict[int, slice]

    @classmethod
    def extract(
        cls, backbone: BackboneWrapper, data: LabeledSet, config: CacheConfig, layers: list[int] | None = None,
        pool: Pool = "avg",
    ) -> "FeatureCache":  # fmt: skip
        """Run the backbone over the centered views.

        Args:
            layers: counted from 1; None takes the last.

        Raises:
            MapetError: features that aren't finite, no room, too many unreadable images.
        """
        layers = layers or [backbone.num_layers]
        training = backbone.model.training
        backbone.model.eval()
        store = FeatureStore(len(data), config.memory, config.scratch_dir)
        indices, ends = [], [0]
        for index, images in backbone.batches(data.images, config, "features"):
            parts = backbone.pooled_features(images, layers, pool)
            features = torch.cat(parts, 1).cpu()
            check_finite_features(features, backbone.name)
            store.append(features)
            indices.append(index)
            ends = [0, *np.cumsum([part.shape[1] for part in parts]).tolist()]
        backbone.model.train(training)
        index = torch.cat(indices)
        columns = {layer: slice(*ends[i : i + 2]) for i, layer in enumerate(layers)}
        return cls(store, index, torch.from_numpy(data.labels)[index], columns)

    def __len__(self) -> int:
        return len(self.store)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "m W"]]]:
        """Yield (first row, float32 rows of all layers) in order; each block overwrites the one before."""
        yield from self.store.blocks(max(1024, BLOCK_BYTES // (4 * self.store.num_features)))

    def batches(
        self, first: int, last: int, size: int, seed: int | None = None
    ) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b W"]]]:
        """Yield (rows, their features) of the rows from `first` up to `last`, with a seed in the random order that it draws.

        In random order no row comes alone, for a batch norm, unless there is but one.
        """
        generator = torch.Generator().manual_seed(seed or 0)
        for start, block in self.blocks():
            rows = torch.arange(len(block))[max(0, first - start) : max(0, last - start)]
            if seed is not None:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            for part in rows.split(size):
                if len(part) > 1 or len(rows) == 1 or (seed is None and len(part)):
                    yield start + part, block[part]

    def layer_blocks(self) -> Iterator[tuple[int, Float[Tensor, "m D"]]]:
        """Yield the `blocks` of the deepest layer."""
        for start, block in self.blocks():
            yield start, block[:, self.columns[max(self.columns)]]

    def layer_features(self, rows: Int[Tensor, " m"] | None = None) -> Float[Tensor, "m D"]:
        """Read the deepest layer's features into memory, of some rows or all."""
        if rows is not None:
            return self.store.take(rows)[:, self.columns[max(self.columns)]]
        return torch.cat([block.clone() for _, block in self.layer_blocks()])

    def close(self) -> None:
        """Give memory and scratch file back."""
        self.store.__exit__(None, None, None)


@dataclass
class PatchTokenCache:
    """Patch tokens of the last layer, kept as float16 where they fit the memory, else computed anew for each epoch.

    Images come in a random order, as in `FeatureCache`.
    """

    backbone: BackboneWrapper
    data: LabeledSet
    config: CacheConfig
    kept: list[tuple[Int[Tensor, " b"], FeatureStore]] = field(default_factory=list)

    def epoch(self) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b N D"]]]:
        """Yield (indices of images, their tokens), a batch at a time, once through."""
        depth, height, width = self.backbone.map_shape
        for index, store in self.kept:
            yield index, store.take(torch.arange(len(store))).unflatten(1, (height * width, depth))
        if self.kept:
            return
        fits = 2 * len(self.data) * math.prod(self.backbone.map_shape) <= self.config.memory
        for index, images in self.backbone.batches(self.data.images, self.config, "tokens"):
            tokens = self.backbone.last_layer(images).flatten(2).transpose(1, 2).cpu()
            if fits:
                self.kept.append((index, FeatureStore.of(tokens.flatten(1))))
            yield index, tokens
