"""Frozen features: of batches by any timm model, and of whole sets, computed once for all protocols and kept as float16."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float, Int, UInt8
from timm.models import VisionTransformer
from torch import Tensor, nn

from mapet.config.shared import DEFAULT_POOL, Pool, ReadOptions
from mapet.data.dataset import UnreadableImages, ViewDataset, position_batches, readable_batches
from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec, input_mean_std, normalize
from mapet.device import ComputeContext
from mapet.errors import MapetError, first_line, format_size, option
from mapet.evaluation.datasets import LabeledSet
from mapet.models.backbone import HUB_PREFIXES, create_timm_model, get_read_options, load_backbone, prepare_for_device
from mapet.models.pooling import forward_intermediates, pool_tokens, resolve_layers
from mapet.tokenizers.feature_store import FeatureStore

RANDOM_PREFIX = "random:"
"""Before the name of a timm model or a folder: that architecture with random weights."""
MAX_UNREADABLE = 0.5
"""Largest fraction of a set's images that may be unreadable."""
BLOCK_BYTES, MIN_BLOCK_ROWS = 256 << 20, 1024
"""Float32 bytes of the rows that are read together, and how many rows they are at least."""
DEFAULT_PATCH_SIZE = 32
"""What image sizes must be multiples of, for networks without patches: the stride of most of them."""


def check_finite_features(features: Tensor, source: str = "the backbone") -> None:
    """Raise MapetError if a feature is NaN or infinite, which no classifier takes.

    Args:
        features: of any shape.
        source: name of the model that gave the features, for the message.
    """
    if not bool(features.isfinite().all()):
        raise MapetError(
            f"{source} gives NaN or infinite features: try {option('precision')} float32. If that does not help, the weights of the model "
            "are broken, perhaps by training that diverged: train again with a lower learning rate"
        )


@dataclass(frozen=True)
class CacheConfig:
    """Where features are kept, and how images are read.

    Attributes:
        memory: bytes that the features of one set of images may take; more go to a file in `scratch_dir`.
        scratch_dir: folder of that file, which is removed at the end.
        batch_size: images that go through the model together.
        progress: show a progress bar.
    """

    memory: int = 1 << 62
    scratch_dir: Path = Path()
    batch_size: int = 64
    progress: bool = True


# ---- the backbone


@dataclass
class BackboneWrapper:
    """A frozen model: uint8 pixels -> feature maps of any of its layers.

    Attributes:
        name: how the user called it.
        model: any timm model, on the device of `compute`.
        image_size: (height, width) of its input, pixels.
        channels: number of its input channels.
        mean, std: of each input channel, in [0, 1], as it was trained.
        classes: of its own classifier, in the order of its logits; empty without a classifier whose class names are known.
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
        """Load a backbone as the user names it, onto the device.

        Args:
            source: a run, a backbone's folder, an exported folder, a folder of `finetune`, a weights file, `timm:NAME`; or `random:NAME`,
                timm's model of that name, or the model in that folder, with random weights: a baseline for its architecture.
            compute: device that the model is moved to, and precision of its matrix products.
            seed: of random weights; torch's global generator is seeded with it.

        Returns:
            The wrapper of the model in eval mode, whose parameters require no gradient. Input size, channels, mean and std are timm's data
            config of the model; `classes` are the names that come with its classifier, empty without one.

        Raises:
            MapetError: there is no such backbone, or it cannot be loaded.
        """
        name = source.removeprefix(RANDOM_PREFIX)
        torch.manual_seed(seed)
        model: nn.Module
        if source.startswith(HUB_PREFIXES):
            model = create_timm_model(source, True)
        elif source.startswith(RANDOM_PREFIX):
            model = load_backbone(name, pretrained=False) if Path(name).exists() else create_timm_model(name, False)
        else:
            model = load_backbone(source)
        names = getattr(model, "pretrained_cfg", {}).get("label_names") or ()
        classes = tuple(names) if len(names) == getattr(model, "num_classes", 0) else ()
        model.eval().requires_grad_(False)
        data_config = timm.data.resolve_model_data_config(model)
        channels, *size = data_config["input_size"]
        stats = tuple(data_config["mean"]), tuple(data_config["std"])
        # timm may give RGB's mean and std for a model of other channels: they all get the first channel's.
        mean, std = (values if len(values) == channels else values[:1] * channels for values in stats)
        return cls(source, prepare_for_device(model, compute), compute, tuple(size), channels, mean, std, classes)

    @classmethod
    def from_vit(cls, vit: VisionTransformer, compute: ComputeContext, name: str = "the backbone") -> "BackboneWrapper":
        """Wrap one of mapet's own ViTs, which is neither copied nor changed; the wrapper has no `classes`.

        Args:
            vit: on the device of `compute`; pixels are normalized by `input_mean_std` of its channels, as in pre-training.
            compute: device and precision.
            name: of the model, for errors.
        """
        size: tuple[int, int] = vit.patch_embed.img_size
        return cls(name, vit, compute, size, vit.in_chans, *input_mean_std(vit.in_chans))

    @property
    def read_options(self) -> ReadOptions | None:
        """Return how the model's training images were read; None: unknown, or as they are stored."""
        return get_read_options(self.model)

    @property
    def patch_size(self) -> int:
        """Return the pixels that image sizes must be multiples of: the larger side of a patch; `DEFAULT_PATCH_SIZE` for models without patches."""
        size = getattr(getattr(self.model, "patch_embed", None), "patch_size", DEFAULT_PATCH_SIZE)
        return size if isinstance(size, int) else int(max(size))

    def batches(
        self, images: ImageList, config: CacheConfig, title: str | None = None, **dataset: Any
    ) -> Iterator[tuple[Int[Tensor, " b"], UInt8[Tensor, "b C H W"]]]:
        """Yield (indices in the list, pixels) of the center views of readable images, in a random order that is always the same.

        The center view is the center crop, resized to the model's input size. Unreadable images are skipped with a warning.

        Args:
            images: the list of images, each of which is visited once.
            config: its `batch_size` is the largest batch; without `config.progress` there is no progress bar.
            title: of the progress bar; None shows none.
            dataset: further arguments of `ViewDataset`, such as `augment`, or another `spec` of the views.

        Raises:
            MapetError: all images, or more than the fraction `MAX_UNREADABLE` (a half), cannot be read.
        """
        batches = position_batches(np.random.default_rng(0).permutation(len(images)), config.batch_size)
        arguments = {"spec": ViewSpec(image_size=self.image_size)} | dataset
        views = ViewDataset(images, channels=self.channels, image_size=self.image_size, **arguments)
        title = title if config.progress else None
        for batch in readable_batches(views, batches, UnreadableImages(images, MAX_UNREADABLE, is_option=False), title):
            assert batch.images is not None
            yield batch.image_index, batch.images

    def normalize(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Move pixels to the device, and normalize them by the model's mean and standard deviation."""
        return normalize(self.compute.to(images), self.channels, mean_std=(self.mean, self.std))

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int]
    ) -> list[tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]]:
        """Compute feature maps of normalized pixels in the precision of `compute`; see `pooling.forward_intermediates`."""
        with self.compute.autocast():
            return forward_intermediates(self.model, images, layers)

    @torch.inference_mode()
    def pooled_features(
        self, images: UInt8[Tensor, "B C H W"], layers: Sequence[int], pool: Pool
    ) -> list[Float[Tensor, "B F"]]:
        """Compute one float32 vector per image for each layer, which `pooling.pooled_features` concatenates.

        Args:
            images: uint8 pixels at the model's input size.
            layers: indices of layers, see `resolve_layers`.
            pool: pooling of each layer's feature map, see `pool_tokens`.

        Returns:
            For each layer, in the order of `resolve_layers`, (B, F) on the device.

        Raises:
            MapetError: the model has no such layer, no class token for `pool` 'cls', or timm gives no features of its layers.
        """
        return [pool_tokens(*maps, pool) for maps in self.forward_intermediates(self.normalize(images), layers)]

    @torch.inference_mode()
    def last_layer(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Compute the last layer's feature map from uint8 pixels, after the model's last norm, float32 on the device."""
        return self.forward_intermediates(self.normalize(images), [-1])[0][0].float()

    @cached_property
    def map_shape(self) -> tuple[int, int, int]:
        """Return (D, h, w), width, rows and columns of the last layer's feature map, by running the model once on a black image."""
        black = torch.zeros(1, self.channels, *self.image_size, dtype=torch.uint8)
        depth, height, width = self.last_layer(black)[0].shape
        return depth, height, width

    @torch.inference_mode()
    def logits(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Compute the logits of the model's own classifier from uint8 pixels, float32 on the device, in the order of `classes`."""
        with self.compute.autocast():
            return self.model(self.normalize(images)).float()

    def with_image_size(self, size: tuple[int, int], copy_weights: bool = False) -> "BackboneWrapper":
        """Return a wrapper of a copy of the model for another input size, or `self` if the size is the same.

        timm's `set_input_size` of the copy, where the model has it, interpolates position embeddings; other models stay as they are.
        The copy is run once on zeros, as whether it takes the size shows only then.

        Args:
            size: (height, width), pixels.
            copy_weights: return a copy even if the size is the same, so that it may be trained without changing `self`.

        Raises:
            MapetError: the model cannot take that size.
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
            problem = f"{self.name} cannot take images of {format_size(size)} px ({first_line(error)})"
            raise MapetError(f"{problem}: give other sizes by {option('eval_image_sizes')}") from None
        return replace(self, model=model, image_size=size)


# ---- features of whole sets


@dataclass
class FeatureCache:
    """Features of some layers of each readable image of a set: one row per image, layers side by side.

    Rows are in a random order (the same for every backbone), so that consecutive ones are a random sample.

    Attributes:
        store: (n, W), float16, in memory or in a scratch file; W is the sum of the layers' widths.
        index: index in the set of each row's image; n is smaller than the set if images are unreadable.
        labels: class index of each row's image.
        columns: index of a layer, from 0, as text -> its columns in a row; of several layers also '0+3', all of them -> all columns.
    """

    store: FeatureStore
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    columns: dict[str, slice]

    @classmethod
    def extract(
        cls, backbone: BackboneWrapper, data: LabeledSet, config: CacheConfig, layers: Sequence[int] = (-1,),
        pool: Pool = DEFAULT_POOL,
    ) -> "FeatureCache":  # fmt: skip
        """Compute the features of the center views of all readable images, with a progress bar if `config.progress`.

        The model is in eval mode meanwhile, and afterwards in the mode that it was in. Unreadable images get no row.

        Args:
            backbone: the model, on its device.
            data: images with labels, which `labels` of the result takes over.
            config: memory, scratch folder and batch size.
            layers: indices of layers, see `resolve_layers`.
            pool: pooling of each layer's feature map, see `pool_tokens`.

        Returns:
            The cache, with a row for each readable image.

        Raises:
            MapetError: a feature is NaN or infinite, memory and disk have no room for the features, more than the fraction
                `MAX_UNREADABLE` of the images is unreadable, or the model has no such layer, or no class token for `pool` 'cls'.
        """
        was_training = backbone.model.training
        backbone.model.eval()
        store = FeatureStore(len(data), config.memory, config.scratch_dir)
        indices, ends = [], [0]
        for index, images in backbone.batches(data.images, config, "features"):
            parts = backbone.pooled_features(images, layers, pool)
            features = torch.cat(parts, 1).cpu()
            check_finite_features(features, backbone.name)
            store.append(features)
            indices.append(index)
            ends = np.cumsum([0, *(part.shape[1] for part in parts)]).tolist()
        backbone.model.train(was_training)
        index = torch.cat(indices)
        names = [str(layer) for layer in resolve_layers(backbone.model, layers)]
        columns = {name: slice(*bounds) for name, bounds in zip(names, pairwise(ends), strict=True)}
        columns["+".join(names)] = slice(0, ends[-1])
        return cls(store, index, torch.from_numpy(data.labels)[index], columns)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.store)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "m W"]]]:
        """Yield all rows in order, in blocks, each as (index of its first row, its rows with the features of all layers, float32).

        A block has about `BLOCK_BYTES` (256 MiB), and at least `MIN_BLOCK_ROWS` rows. Each block overwrites the one before.
        """
        yield from self.store.blocks(max(MIN_BLOCK_ROWS, BLOCK_BYTES // (4 * self.store.num_features)))

    def batches(
        self, first: int, last: int, size: int, seed: int | None = None
    ) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b W"]]]:
        """Yield (row indices, float32 features of all layers) of each row from `first` to `last` - 1 once, in batches.

        Args:
            first: index of the first row.
            last: one past the index of the last row.
            size: rows of a batch, at most; no batch crosses the blocks of `blocks`.
            seed: of the order within each block; None keeps the rows in order. With a seed a batch of a single row, which batch norm cannot
                take, is omitted, unless its block has no other.
        """
        generator = torch.Generator().manual_seed(seed or 0)
        for start, block in self.blocks():
            rows = torch.arange(len(block))[max(0, first - start) : max(0, last - start)]
            if seed is not None:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            for part in rows.split(size):
                is_leftover = seed is not None and len(part) == 1 and len(rows) > 1
                if len(part) and not is_leftover:
                    yield start + part, block[part]

    def layer_features(self, rows: Int[Tensor, " m"] | None = None) -> Float[Tensor, "m W"]:
        """Return the features of all layers of the rows at these indices, in their order, as float32 in memory; None: of all rows."""
        if rows is not None:
            return self.store.take(rows)
        return torch.cat([block.clone() for _, block in self.blocks()])

    def close(self) -> None:
        """Free the memory, and remove the scratch file; features cannot be read any more."""
        self.store.__exit__(None, None, None)


@dataclass
class PatchTokenCache:
    """Patch tokens of the last layer of each image: kept as float16 if they fit `config.memory`, else recomputed in each epoch.

    Attributes:
        cached: (indices of images, their tokens, (b, N D)) of each batch, once a whole epoch has run; empty if they don't fit.
    """

    backbone: BackboneWrapper
    data: LabeledSet
    config: CacheConfig
    cached: list[tuple[Int[Tensor, " b"], FeatureStore]] = field(default_factory=list)

    def epoch(self) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b N D"]]]:
        """Yield (indices in `data`, float32 patch tokens on the CPU) of the readable images, once each, in batches.

        Patch tokens have passed the model's last norm. The random order is the same in every epoch. The first epoch computes the
        tokens and, if they fit `config.memory`, sets `cached` when it has run to its end; later epochs then read `cached`.

        Raises:
            MapetError: more than the fraction `MAX_UNREADABLE` of the images is unreadable.
        """
        depth, height, width = self.backbone.map_shape
        if self.cached:
            for index, store in self.cached:
                yield index, store.take(torch.arange(len(store))).unflatten(1, (height * width, depth))
            return
        fits = 2 * len(self.data) * depth * height * width <= self.config.memory  # float16 has two bytes
        computed = []
        for index, images in self.backbone.batches(self.data.images, self.config, "tokens"):
            tokens = self.backbone.last_layer(images).flatten(2).transpose(1, 2).cpu()
            if fits:
                computed.append((index, FeatureStore.from_tensor(tokens.flatten(1))))
            yield index, tokens
        self.cached = computed
