"""Features of whole images against their definition: means of cells of the feature map, written out pixel by pixel."""

from math import ceil, floor

import pytest
import timm
import torch
from torch import nn

import mapet
from mapet.models.pooling import pool_tokens, pooled_features, resolve_layers
from tests.refused import refused


def cell_means(grid, count):
    """Means of `count` x `count` cells of a map (D, h, w), a cell's bounds rounded outward; each channel's cells row by row."""
    depth, *sides = grid.shape
    bounds = [
        [(floor(i * side / n), ceil((i + 1) * side / n)) for i in range(n)]
        for side in sides
        for n in [min(count, side)]
    ]
    means = [grid[d, a:b, c:e].mean() for d in range(depth) for a, b in bounds[0] for c, e in bounds[1]]
    return torch.stack(means)


@pytest.mark.parametrize("size", [(6, 6), (4, 4), (5, 8), (2, 7), (1, 1)])
@pytest.mark.parametrize(("pool", "count"), [("mean", 1), ("2x2", 2), ("3x3", 3)])
def test_cells_of_a_map(size, pool, count):
    grid = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    result = pool_tokens(grid.bfloat16(), None, pool)
    assert result.dtype == torch.float32
    expected = torch.stack([cell_means(each, count) for each in grid.bfloat16().float()])
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


def test_class_token_is_the_first_prefix_token():
    prefix = torch.randn(2, 3, 5)
    assert torch.equal(pool_tokens(torch.zeros(2, 5, 4, 4), prefix, "cls"), prefix[:, 0])
    with refused("cls", field="pool", value="cls"):
        pool_tokens(torch.zeros(2, 5, 4, 4), None, "cls")


def vit_of(**more):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **more).eval()


@torch.inference_mode()
def tokens_of(vit, images):
    """Tokens after each block and the last norm."""
    x, tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), []
    for block in vit.blocks:
        x = block(x)
        tokens.append(vit.norm(x))
    return tokens


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize(("layers", "chosen"), [((-1,), [3]), ((0, 2), [0, 2]), ((-1, 1, -3, 3), [1, 3]), ((-4,), [0])])
def test_layers_are_concatenated_in_ascending_order(layers, chosen, registers):
    vit, images = vit_of(reg_tokens=registers), torch.randn(2, 3, 32, 32)
    tokens = tokens_of(vit, images)
    assert resolve_layers(vit, layers) == chosen
    result = {pool: mapet.pooled_features(vit, images, pool=pool, layers=layers) for pool in ("mean", "cls", "2x2")}
    patches = [tokens[layer][:, 1 + registers :] for layer in chosen]
    quarters = [x.view(2, 2, 2, 2, 2, 24).mean((2, 4)).movedim(-1, 1).flatten(1) for x in patches]
    torch.testing.assert_close(result["mean"], torch.cat([x.mean(1) for x in patches], 1))
    torch.testing.assert_close(result["cls"], torch.cat([tokens[layer][:, 0] for layer in chosen], 1))
    torch.testing.assert_close(result["2x2"], torch.cat(quarters, 1))


@pytest.mark.parametrize("layer", [4, -5])
def test_layers_that_there_are_not(layer):
    with refused(layer, "-4", field="layers", value=layer):
        pooled_features(vit_of(), torch.zeros(1, 3, 32, 32), layers=(-1, layer))


def test_networks_without_features_of_layers():
    with refused("Linear"):
        resolve_layers(nn.Linear(2, 2), (-1,))


def test_registers_alone_are_no_class_token():
    vit = vit_of(class_token=False, global_pool="avg", fc_norm=False, reg_tokens=2)
    with refused("cls", field="pool"):
        pooled_features(vit, torch.zeros(1, 3, 32, 32), "cls")


class Map(nn.Module):
    """A control: a feature map of its own, with timm's interface."""

    feature_info = ({"num_chs": 3},)

    def forward_intermediates(self, x, indices=None, norm=False, intermediates_only=False):
        return [x]


@pytest.mark.parametrize(("size", "widths"), [((1, 1), (3, 3, 3)), ((4, 4), (3, 12, 27))])
def test_modules_with_the_interface_of_timm(size, widths):
    pools = ("mean", "2x2", "3x3")
    assert tuple(pooled_features(Map(), torch.zeros(2, 3, *size), pool).shape[1] for pool in pools) == widths
