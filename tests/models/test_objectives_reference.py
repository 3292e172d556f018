"""Every objective against a slow program of its own: one image, one row at a time, with the attention mask written out again."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mapet.models.backbone import create_vit
from mapet.models.context_autoencoder import ALIGNMENT_WEIGHT, ContextAutoencoder
from mapet.models.objectives import OBJECTIVES, num_context_from_ratio
from mapet.models.pretraining import ViTForPreTraining, normalized_patches
from tests.conftest import make_batch
from tests.refused import refused

GRID, PATCH, CODES, HEADS = (3, 4), 4, 7, 2
N = GRID[0] * GRID[1]


def make(name, c, kind=ViTForPreTraining, **options):
    torch.manual_seed(0)
    vit = create_vit(
        "vit_tiny_patch16_224",
        (12, 16),
        PATCH,
        3,
        {"embed_dim": 16, "depth": 2, "num_heads": HEADS, "init_values": 0.3},
    )
    values = {"pixels": 3 * PATCH**2, "features": 5}.get(options.get("target"), CODES)
    first = () if kind is ContextAutoencoder else (OBJECTIVES[name],)
    model = kind(vit, values, *first, c, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def draw_batch(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 12, 16, generator=generator, dtype=torch.float64)
    permutation = torch.rand(batch, N, generator=generator).argsort(1)
    return make_batch(images, torch.randint(CODES, (batch, N), generator=generator), permutation)


def seen_by(name, segment, i, c, p):
    """What row i of a segment attends to, as the papers describe it: ('context', j), ('mask', j), ..."""
    context = [("context", j) for j in range(1 + c)]
    masks = [("mask", j) for j in range(p)]

    def revealed(stop):
        return [("target", j) for j in range(stop)]

    if name in ("mim", "mapet", "mapet_content_ignores_masks", "mapet_single_stream") and segment == "mask":
        return context + masks
    if name in ("mim", "mapet", "mapet_single_stream") and segment == "context":
        return context + masks
    if segment == "context":
        return context
    if segment == "next":
        earlier = [("next", j) for j in range(i + 1)]
        return context + earlier + (masks[i + 1 :] if name == "mapet_single_stream" else [])
    if segment == "target":
        return context + revealed(i + 1) + (masks[i + 1 :] if name == "mapet" else [])
    return context + revealed(i) + (masks[i:] if name in ("mapet", "mapet_content_ignores_masks") else [])


def plain_logits(model, name, image, order, c):
    """(p, V): rows as a dictionary, attention as sums over a list."""
    vit, p = model.vit, N - c
    positions = vit.pos_embed[0]
    patches = vit.patch_embed(image[None])[0]

    def content(patch):
        return patches[patch] + positions[1 + patch]

    def token(parameter, i):
        return parameter[0, 0] + positions[1 + order[c + i]]

    rows = {("context", 0): vit.cls_token[0, 0] + positions[0]}
    rows |= {("context", 1 + j): content(order[j]) for j in range(c)}
    if name not in ("pim", "causal"):
        rows |= {("mask", i): token(model.mask_token, i) for i in range(p)}
    if name in ("mapet", "pim", "mapet_content_ignores_masks"):
        rows |= {("target", i): content(order[c + i]) for i in range(p)}
        query = model.mask_token if model.query_token is None else model.query_token
        rows |= {("query", i): token(query, i) for i in range(p)}
    if name in ("mapet_single_stream", "causal"):
        before = [content(order[c + i - 1]) if c + i else model.mask_token[0, 0] for i in range(p)]
        rows |= {("next", i): before[i] + positions[1 + order[c + i]] for i in range(p)}
    for block in vit.blocks:
        normal = {key: block.norm1(x) for key, x in rows.items()}
        qkv = {key: block.attn.qkv(x).view(3, HEADS, -1) for key, x in normal.items()}
        after = {}
        for key, x in rows.items():
            others = seen_by(name, *key, c, p)
            heads = []
            for h in range(HEADS):
                q = qkv[key][0, h]
                weights = torch.stack([q @ qkv[other][1, h] / math.sqrt(len(q)) for other in others]).softmax(0)
                heads.append(sum(w * qkv[other][2, h] for w, other in zip(weights, others, strict=True)))
            x = x + block.ls1(block.attn.proj(torch.cat(heads)))
            after[key] = x + block.ls2(block.mlp(block.norm2(x)))
        rows = after
    read = {"mim": "mask", "mapet_single_stream": "next", "causal": "next"}.get(name, "query")
    return model.head(vit.norm(torch.stack([rows[read, i] for i in range(p)])))


TABLED = [name for name in OBJECTIVES if name != "cae"]


@pytest.mark.parametrize("c", [0, 1, 5, N - 1])
@pytest.mark.parametrize("name", TABLED)
def test_logits_equal_the_row_by_row_program(name, c):
    model = make(name, c)
    batch = draw_batch()
    images, permutation = batch.images, batch.permutation
    logits = model.predict(batch)
    for b in range(len(images)):
        expected = plain_logits(model, name, images[b], permutation[b].tolist(), c)
        assert torch.allclose(logits[b], expected, atol=1e-10)


@pytest.mark.parametrize("name", ["mapet", "pim"])
def test_separate_query_tokens(name):
    model = make(name, 4, separate_query_token=True)
    batch = draw_batch(1)
    images, permutation = batch.images, batch.permutation
    expected = plain_logits(model, name, images[0], permutation[0].tolist(), 4)
    assert torch.allclose(model.predict(batch)[0], expected, atol=1e-10)


def test_separate_query_tokens_start_as_the_mask_token_and_need_queries():
    vit = create_vit("vit_tiny_patch16_224", (12, 16), PATCH, 3, {"embed_dim": 16, "depth": 1, "num_heads": 2})
    model = ViTForPreTraining(vit, CODES, OBJECTIVES["mapet"], 4, separate_query_token=True)
    assert torch.equal(model.query_token, model.mask_token)
    with refused("'mim'", "query"):
        make("mim", 4, separate_query_token=True)


def test_raster_order_from_nothing_is_a_causal_transformer():
    """timm's own blocks under a triangular mask, the next position added: AIM's and iGPT's control."""
    model = make("causal", 0)
    vit = model.vit
    batch = draw_batch()
    images = batch.images
    order = torch.arange(N).expand(2, -1)
    embedded = vit._pos_embed(vit.patch_embed(images))
    start = model.mask_token.expand(2, -1, -1)
    rows = torch.cat([start, embedded[:, 1:-1]], dim=1) + vit.pos_embed[:, 1:]
    rows = torch.cat([embedded[:, :1], rows], dim=1)
    for block in vit.blocks:
        rows = block(rows, attn_mask=torch.ones(1 + N, 1 + N, dtype=torch.bool).tril())
    logits = model.head(vit.norm(rows[:, 1:]))
    assert torch.allclose(model.predict(replace(batch, permutation=order)), logits, atol=1e-10)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert torch.allclose(model(replace(batch, permutation=order)).loss, loss, atol=1e-10)


@given(st.sampled_from(TABLED), st.integers(0, N - 1), st.integers(0, N - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_c_of_a_pass_is_that_of_a_model_made_for_it(name, c, other, train):
    """With gradients: what a drawn ratio relies on."""
    model, made = make(name, other), make(name, c)
    batch = draw_batch()
    for one, given_c in ((model.train(train), c), (made.train(train), None)):
        one(replace(batch, num_context=given_c)).loss.backward()
    for (key, parameter), same in zip(model.named_parameters(), made.parameters(), strict=True):
        if key == "mask_token" and name == "causal" and c:
            assert parameter.grad is None  # only what starts from nothing starts from it
        else:
            assert torch.allclose(parameter.grad, same.grad, atol=1e-10), key


@pytest.mark.parametrize(("ratio", "c"), [(0.1, 176), (0.5, 98), (0.75, 49), (0.9, 20), (1.0, 0), (0.001, 195)])
def test_ratios_of_224_px(ratio, c):
    assert num_context_from_ratio(ratio, 196) == c


@pytest.mark.parametrize("name", ["mapet", "mim", "cae"])
@pytest.mark.parametrize("target", ["pixels", "features"])
def test_targets_that_are_numbers(name, target):
    kind = ContextAutoencoder if name == "cae" else ViTForPreTraining
    model = make(name, 5, kind, target=target)
    batch = draw_batch()
    images, permutation = batch.images, batch.permutation
    if target == "pixels":
        reference = normalized_patches(images, GRID)
    else:
        reference = torch.randn(2, N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    prediction = model(replace(batch, targets=reference))
    guesses = model.predict(batch)
    losses = []
    for b in range(2):
        for i, patch in enumerate(permutation[b, 5:].tolist()):
            row, column = divmod(patch, GRID[1])
            guess = guesses[b, i]
            if target == "pixels":
                values = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
                losses.append((guess - (values - values.mean()) / (values.var() + 1e-6).sqrt()).square().mean())
            else:
                feature = reference[b, patch]
                losses.append(1 - guess @ feature / (guess.norm() * feature.norm()))
    expected = torch.stack(losses).mean()
    if name == "cae":
        expected = expected + ALIGNMENT_WEIGHT * model.forward_latents(batch)[1]
    assert torch.allclose(prediction.loss, expected, atol=1e-10)
    assert prediction.num_correct is None
