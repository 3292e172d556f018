"""Features of whole images: the feature maps of some layers of a network, pooled and concatenated; the same for every command."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor, nn

from mapet.config.shared import DEFAULT_POOL, Pool
from mapet.errors import MapetError, option

CELLS: dict[str, int] = {"mean": 1, "2x2": 2, "3x3": 3}
"""Name of a pooling -> k: the feature map is divided into k x k cells, and averaged over each."""


def pool_tokens(
    grid: Float[Tensor, "B D h w"], prefix: Float[Tensor, "B P D"] | None, pool: Pool
) -> Float[Tensor, "B F"]:
    """Pool a feature map to one float32 vector per image.

    Args:
        grid: feature map, h x w patches.
        prefix: class and register tokens, the class token first; None if the model has no class token.
        pool: 'mean' of the map; 'cls', the class token; '2x2' or '3x3': means of 2 x 2 or 3 x 3 cells of the map, by
            `F.adaptive_avg_pool2d`, whose cells overlap where they don't divide it. A map of fewer rows or columns has as many cells.

    Returns:
        (B, F) on the device of `grid`. F is D for 'mean' and 'cls', else D times the number of cells: the values of all cells of the first
        channel, row by row, then of the next channel.

    Raises:
        MapetError: `pool` is 'cls', and there is no class token.
    """
    if pool == "cls":
        if prefix is None:
            problem = f"{option('pool', pool)} takes the class token, but these layers of the model have none"
            raise MapetError(f"{problem}: use {option('pool', 'mean')}", field="pool", value=pool)
        return prefix[:, 0].float()
    rows, columns = (min(CELLS[pool], side) for side in grid.shape[2:])
    return F.adaptive_avg_pool2d(grid.float(), (rows, columns)).flatten(1)


def resolve_layers(model: nn.Module, layers: Sequence[int]) -> list[int]:
    """Return the indices of a model's layers, from 0, ascending and without repetitions.

    Args:
        model: its layers are the entries of timm's `feature_info`: a ViT's blocks, another network's stages.
        layers: indices as timm counts them, from 0; negative ones count from the last, -1.

    Raises:
        MapetError: the model has no `forward_intermediates`, or no such layer.
    """
    if not hasattr(model, "forward_intermediates"):
        kind = type(model).__name__
        raise MapetError(
            f"timm gives no features of the layers of this {kind} (it has no forward_intermediates): use another model"
        )
    count = len(model.feature_info)  # type: ignore[arg-type]
    for layer in layers:
        if not -count <= layer < count:
            problem = f"{option('layers', layer)}: this {type(model).__name__} has {count} layers"
            raise MapetError(f"{problem}, give 0 to {count - 1}, or -{count} to -1", field="layers", value=layer)
    return sorted({layer % count for layer in layers})


def forward_intermediates(
    model: nn.Module, images: Float[Tensor, "B C H W"], layers: Sequence[int]
) -> list[tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]]:
    """Compute the feature maps of some layers with timm's `forward_intermediates`.

    The feature maps have passed the model's last norm, except in Hiera, whose last norm comes after pooling.

    Args:
        model: of timm, or any module that has timm's `forward_intermediates` and `feature_info`.
        images: normalized pixels.
        layers: indices of layers, negative ones from the last; see `resolve_layers`.

    Returns:
        For each layer, once and ascending: (feature map, the P class and register tokens, class token first). The tokens are None where
        there is no class token: the model has none, or adds it after its layers (XCiT, CaiT).

    Raises:
        MapetError: the model has no `forward_intermediates`, or no such layer.
    """
    options = {"indices": resolve_layers(model, layers), "norm": not isinstance(model, (Hiera, HieraDet))}
    extract: Callable[..., Any] = model.forward_intermediates  # type: ignore[assignment]
    has_class_token = getattr(model, "num_prefix_tokens", 0) > 0 and getattr(model, "has_class_token", True)
    if has_class_token and "return_prefix_tokens" in inspect.signature(extract).parameters:
        options["return_prefix_tokens"] = True
    outputs = extract(images, intermediates_only=True, **options)
    return [output if isinstance(output, tuple) else (output, None) for output in outputs]


def pooled_features(
    model: nn.Module, images: Float[Tensor, "B C H W"], pool: Pool = DEFAULT_POOL, layers: Sequence[int] = (-1,)
) -> Float[Tensor, "B F"]:
    """Compute one float32 feature vector per image, as `evaluate`, `embed` and model cards do with the same options.

    Args:
        model: a ViT of `load`, or another timm model; call its `.eval()` first, or drop path makes features random.
        images: pixels, normalized by the model's own mean and standard deviation (by the transform of `load`), on the model's device.
        pool: pooling of each layer's feature map, see `pool_tokens`.
        layers: indices of layers from 0, as timm counts them; negative ones count from the last, -1. The features of several are
            concatenated in ascending order.

    Returns:
        (B, F), with a gradient unless you use `torch.inference_mode`. For a ViT of width D, F is D for 'mean' and 'cls', 4 D for
        '2x2' and 9 D for '3x3' (less if its grid has fewer cells), times the number of layers.

    Raises:
        MapetError: the model has no such layer, no class token for `pool` 'cls', or timm gives no features of its layers.
    """
    return torch.cat([pool_tokens(*maps, pool) for maps in forward_intermediates(model, images, layers)], 1)
