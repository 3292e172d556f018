"""CAE against its definition, written out from arXiv 2202.03026 and the release (models/modeling_cae.py, modeling_cae_helper.py)."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mapet.models.backbone import create_vit
from mapet.models.context_autoencoder import ContextAutoencoder
from tests.models.test_objectives_reference import GRID, HEADS, PATCH, N, draw_batch, make
from tests.refused import refused

WIDTH = 16


def sine_cosine_positions():
    """(N, D): sine and cosine of the row in the first half, of the column in the second; frequencies from 1 to almost 1 / 10,000."""
    frequencies = [10000 ** (-i / (WIDTH // 4)) for i in range(WIDTH // 4)]
    return torch.tensor([
        [function(at * f) for at in divmod(patch, GRID[1]) for function in (math.sin, math.cos) for f in frequencies] for patch in range(N)
    ], dtype=torch.float64)  # fmt: skip


def attention(module, q, k, v):
    wq, wk, wv = module.qkv.weight.chunk(3)
    bq, bk, bv = module.qkv.bias.chunk(3)

    def split(x):
        return x.unflatten(2, (HEADS, -1)).transpose(1, 2)

    weights = split(q @ wq.T + bq) @ split(k @ wk.T + bk).transpose(2, 3) / math.sqrt(WIDTH / HEADS)
    return module.proj((weights.softmax(3) @ split(v @ wv.T + bv)).transpose(1, 2).flatten(2))


def definition(model, batch, c, drop_path_scale):
    """Return logits of masked patches and the loss; `drop_path_scale(i, branch)` is the (B, 1, 1) factor of a branch of block i."""
    vit, hidden, count = model.vit, batch.permutation[:, c:], iter(range(100))
    position = sine_cosine_positions()

    def encoder_block(block, x):
        i, normal = next(count), block.norm1(x)
        x = x + drop_path_scale(i, 0) * block.ls1(attention(block.attn, normal, normal, normal))
        return x + drop_path_scale(i, 1) * block.ls2(block.mlp(block.norm2(x)))

    def encoder(chosen):
        x = vit._pos_embed(vit.patch_embed(batch.images))
        x = torch.cat([x[:, :1], torch.stack([row[1 + at] for row, at in zip(x, chosen, strict=True)])], dim=1)
        for block in vit.blocks:
            x = encoder_block(block, x)
        return vit.norm(x)[:, 1:]  # the other networks do not attend to the class token

    visible, reference = encoder(batch.permutation[:, :c]), encoder(hidden).detach()
    x = model.mask_token.expand(*hidden.shape, -1)
    for block in model.regressor:
        i, seen = next(count), torch.cat([visible, x], dim=1)
        q = block.norm1(x + position[hidden])
        k = block.norm_k(seen + position[batch.permutation])
        x = x + drop_path_scale(i, 0) * block.ls1(attention(block.attn, q, k, block.norm_v(seen)))
        x = block.norm2(x)
        x = x + drop_path_scale(i, 1) * block.ls2(block.mlp(x))
    x = model.regressor_norm(x)
    alignment = (x - reference).square().mean()
    x = x + position[hidden]
    for block in model.decoder:
        x = encoder_block(block, x)
    assert next(count) == 2 * len(vit.blocks) + 4 + 4
    logits = model.head(model.decoder_norm(x))
    return logits, F.cross_entropy(logits.flatten(0, 1), batch.targets.gather(1, hidden).flatten()) + 2 * alignment


@pytest.mark.parametrize("c", [0, 5, N - 1])
@pytest.mark.parametrize("drops", [False, True])
def test_context_autoencoder(c, drops):
    """Encoder on visible patches alone, regressor, alignment and decoder, written out with torch's own attention, stochastic depth too."""
    model = make("cae", c, ContextAutoencoder)
    assert torch.allclose(model.positions, sine_cosine_positions(), atol=1e-6)  # made in float32
    model.positions = sine_cosine_positions()
    batch, drop_path_scale = draw_batch(), lambda _block, _branch: 1
    if drops:
        torch.manual_seed(2)
        arguments = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "init_values": 0.3}
        vit = create_vit("vit_tiny_patch16_224", (12, 16), PATCH, 3, arguments, drop_path=0.6)
        other = ContextAutoencoder(vit, model.head.out_features, c).double()
        other.load_state_dict(model.state_dict())
        other.positions = model.positions
        model, numbers = other, torch.rand(2, 2 * 12, dtype=torch.float64)
        rates = [0, 0.6, 0, 0.6, 0, 0.2, 0.4, 0.6, 0, 0.2, 0.4, 0.6]
        batch = replace(batch, drop_path_rand=numbers)

        def drop_path_scale(block, branch):
            keep = 1 - rates[block]
            return ((numbers[:, 2 * block + branch] < keep).double() / keep)[:, None, None]

    loss = model(batch).loss
    logits, expected = definition(model, batch, c, drop_path_scale)
    # the rates of the blocks are float32
    assert torch.allclose(loss, expected, atol=1e-6 if drops else 1e-10)
    assert torch.allclose(model.predict(batch), logits, atol=1e-5 if drops else 1e-10)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    for (name, _), got, right in zip(model.named_parameters(), *gradients, strict=True):
        assert torch.allclose(got, right, rtol=1e-5, atol=1e-5 if drops else 1e-10), name


def test_first_weights_are_the_release_s():
    """Xavier-uniform matrices of regressor and decoder, the regressor's q, k and v each by itself; biases are zero."""
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", (8, 8), 4, model_args={"embed_dim": 96, "depth": 1, "num_heads": 2})
    model = ContextAutoencoder(vit, 50, 1)
    matrices = []
    for name in ("regressor", "decoder"):
        for block in getattr(model, name):
            qkv = block.attn.qkv.weight
            matrices += [(f"{name} qkv", part) for part in (qkv.chunk(3) if name == "regressor" else [qkv])]
            matrices += [(name, layer.weight) for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
            assert not any(
                layer.bias.any() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            )
    for name, matrix in matrices:
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max() <= 1.00001 * bound, name
        assert float(matrix.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03), name


def test_positions_need_a_width_of_fours():
    vit = create_vit("vit_tiny_patch16_224", (8, 8), 4, model_args={"embed_dim": 18, "depth": 1, "num_heads": 3})
    with refused("18", "multiple of 4"):
        ContextAutoencoder(vit, 5, 1)


def test_context_autoencoder_does_not_see_hidden_patches():
    model = make("cae", 5, ContextAutoencoder)
    batch = draw_batch(1)
    images, permutation = batch.images, batch.permutation
    changed = images.clone()
    row, column = divmod(int(permutation[0, 7]), GRID[1])
    changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 3
    assert torch.equal(model.predict(batch), model.predict(replace(batch, images=changed)))
