"""The packed pass: equalities that hold for any ViT, grid, context and channels."""

from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapet.models.backbone import create_vit, load_backbone, save_backbone
from mapet.models.objectives import MAPET, MIM, PIM
from mapet.models.pretraining import ViTForPreTraining
from tests.conftest import make_batch
from tests.refused import refused

VOCAB = 11


def make(objective, c, size=(12, 20), patch=4, channels=3, drop_path=0.0, seed=0, **args):
    torch.manual_seed(seed)
    base = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = create_vit("vit_tiny_patch16_224", size, patch, channels, base | args, drop_path)
    model = ViTForPreTraining(vit, VOCAB, objective, c).double().eval()
    with torch.no_grad():  # default initial values (zero biases, small tokens) would hide bugs
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def draw_batch(model, batch, channels=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, channels, *model.vit.patch_embed.img_size, generator=generator, dtype=torch.float64)
    permutation = torch.rand(batch, model.num_patches, generator=generator).argsort(1)
    tokens = torch.randint(0, VOCAB, (batch, model.num_patches), generator=generator)
    return make_batch(images, tokens, permutation)


variants = st.fixed_dictionaries(
    {
        "class_token": st.booleans(),
        "reg_tokens": st.integers(0, 3),
        "no_embed_class": st.booleans(),
        "init_values": st.sampled_from([None, 0.1]),
        "pre_norm": st.booleans(),
        "qk_norm": st.booleans(),
    }
)
grids = st.tuples(st.integers(1, 4), st.integers(1, 5)).filter(lambda g: g[0] * g[1] > 1)


@given(variants, grids, st.data(), st.sampled_from([1, 3, 5]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_any_vit_grid_context_and_channels(args, grid, data, channels, batch):
    """Prediction t depends on the context and on targets before t, not on later ones."""
    n = grid[0] * grid[1]
    c = data.draw(st.integers(0, n - 1))
    model = make(MAPET, c, (4 * grid[0], 4 * grid[1]), channels=channels, **args)
    drawn = draw_batch(model, batch, channels)
    images, tokens, permutation = drawn.images, drawn.targets, drawn.permutation
    loss, correct, targets, losses = model(drawn)
    assert torch.allclose(losses.mean(), loss) and losses.shape == (len(images),)
    logits = model.predict(drawn)
    assert correct == (logits.argmax(-1) == targets).sum()
    assert logits.shape == (batch, n - c, VOCAB)
    assert torch.equal(targets, torch.stack([row[order[c:]] for row, order in zip(tokens, permutation, strict=True)]))
    expected = -logits.log_softmax(-1).gather(2, targets[:, :, None]).mean()
    assert torch.allclose(loss, expected, atol=1e-10)

    t = data.draw(st.integers(0, n - c - 1))
    patch = int(permutation[0, c + t])
    changed = images.clone()
    row, column = divmod(patch, grid[1])
    changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 3.0
    after = model.predict(replace(drawn, images=changed))
    assert torch.allclose(after[0, : t + 1], logits[0, : t + 1], atol=1e-9)  # no prediction up to its own attends to it
    if t + 1 < n - c:
        assert not torch.allclose(after[0, t + 1 :], logits[0, t + 1 :], atol=1e-9)  # all later ones attend to it
    assert torch.allclose(after[1:], logits[1:], atol=1e-9)


@pytest.mark.parametrize("c", [0, 1, 7, 14])
@pytest.mark.parametrize("args", [{}, {"reg_tokens": 2}, {"class_token": False}, {"init_values": 0.1}])
def test_context_and_mask_rows_equal_a_mim_pass(c, args):
    for segment in ("context", "mask"):
        if segment == "context" and c == 0 and args.get("class_token") is False:
            continue  # there are no such tokens
        whole, part = (make(replace(objective, output_segment=segment), c, **args) for objective in (MAPET, MIM))
        part.load_state_dict(whole.state_dict())
        batch = draw_batch(whole, 2)
        assert torch.allclose(*(model.encode(batch) for model in (whole, part)), atol=1e-10)


def test_mim_equals_timm_with_the_hidden_patches_replaced():
    """An independent MIM: as BEiT, in raster order, mask tokens in place of masked patches, no attention mask."""
    model = make(MIM, 5)
    vit = model.vit
    batch = draw_batch(model, 2)
    images, permutation = batch.images, batch.permutation
    x = vit.patch_embed(images)
    hidden = torch.zeros(2, model.num_patches, dtype=torch.bool).scatter(1, permutation[:, 5:], True)
    x = torch.where(hidden[:, :, None], model.mask_token, x)
    x = vit.norm(vit.blocks(vit._pos_embed(x)))[:, vit.num_prefix_tokens :]
    logits = model.head(x).gather(1, permutation[:, 5:, None].expand(-1, -1, VOCAB))
    assert torch.allclose(model.predict(batch), logits, atol=1e-10)


def test_pim_equals_a_loop_that_reveals_one_patch_after_the_other():
    """An independent PIM: for each index a separate two-stream pass over the patches before (XLNet's definition)."""
    c = 4
    model = make(PIM, c)
    vit = model.vit
    batch = draw_batch(model, 1)
    images, permutation = batch.images, batch.permutation
    logits = model.predict(batch)
    embedded = vit._pos_embed(vit.patch_embed(images))
    prefix, patches = embedded[:, :1], embedded[:, 1:]
    positions = vit.pos_embed[:, 1:]
    order = permutation[0]
    for t in range(model.num_masked):
        revealed = torch.cat([prefix, patches[:, order[: c + t]]], dim=1)
        query = model.mask_token + positions[:, order[c + t]][:, None]
        for block in vit.blocks:
            keys = block.norm1(revealed)
            asking = torch.cat([keys, block.norm1(query)], dim=1)
            n = revealed.shape[1]
            mask = torch.ones(n + 1, n + 1, dtype=torch.bool)
            mask[:, n] = False  # nothing attends to the query, not even itself
            mask[:n, :n] = torch.ones(n, n).tril().bool()
            mask[: 1 + c, : 1 + c] = True  # the context attends to all of itself
            attended = block.attn(asking, attn_mask=mask)
            query = query + attended[:, n:]
            revealed = revealed + attended[:, :n]
            query = query + block.mlp(block.norm2(query))
            revealed = revealed + block.mlp(block.norm2(revealed))
        assert torch.allclose(model.head(vit.norm(query))[0, 0], logits[0, t], atol=1e-10)


def test_one_stochastic_depth_draw_for_all_segments_of_a_sample():
    """A dropped branch leaves every row of that sample as it was: a draw per row would leave some."""
    model = make(MAPET, 5, drop_path=0.5).train()
    result = []
    last = model.vit.blocks[1]
    last.norm1.register_forward_pre_hook(lambda _, inputs: result.append(inputs[0]))
    last.norm2.register_forward_pre_hook(lambda _, inputs: result.append(inputs[0]))
    model.encode(draw_batch(model, 64))
    before, after = result
    unchanged = (after == before[:, model.layout().output_rows]).all(dim=2)
    assert torch.equal(unchanged.any(dim=1), unchanged.all(dim=1))
    assert 0 < unchanged.all(dim=1).sum() < 64


@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_plain_attention_agree(fused):
    model = make(MAPET, 5)
    batch = draw_batch(model, 2)
    results = []
    for setting in (True, False):
        for block in model.vit.blocks:
            block.attn.fused_attn = setting
        results.append(model.predict(batch))
    assert torch.allclose(*results, atol=1e-10)


@pytest.mark.parametrize(
    "args", [{}, {"class_token": False}, {"reg_tokens": 4, "no_embed_class": True}, {"init_values": 0.1}]
)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_export_is_free(args, channels, tmp_path):
    """The pre-trained state dict loads into timm with strict=True and gives the same features."""
    model = make(MAPET, 5, channels=channels, drop_path=0.1, **args).float()
    images = draw_batch(model, 2, channels).images.float()
    features = model.vit.forward_features(images)

    made = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=(12, 20), patch_size=4, in_chans=channels, embed_dim=24, depth=2, num_heads=2,
        **args, **({"global_pool": "avg", "fc_norm": False} if args.get("class_token") is False else {}),
    )  # fmt: skip
    made.load_state_dict(model.vit.state_dict(), strict=True)
    assert torch.allclose(made.eval().forward_features(images), features, rtol=1e-6, atol=1e-6)

    save_backbone(model.vit, tmp_path / "backbone")
    for loaded in (
        load_backbone(tmp_path / "backbone"),
        timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True),
    ):
        assert torch.allclose(loaded.eval().forward_features(images), features, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("c", [-1, 15, 100])
def test_context_out_of_range(c):
    with refused(c, "0 to 14"):
        make(MAPET, c)


def test_positions_are_required():
    with refused("position embedding"):
        make(MAPET, 5, pos_embed="none")


@pytest.mark.parametrize(
    "model",
    [
        "vit_base_patch16_224.augreg_in21k",
        "deit3_small_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_base_patch16_clip_224",
    ],
)
def test_timm_s_own_variants(model):
    """Real architectures by name: class token without position, registers, pre-norm, LayerScale, other patch sizes."""
    patch = 14 if "patch14" in model else 16
    vit = create_vit(model, (2 * patch, 3 * patch), model_args={"depth": 1})
    pretrainer = ViTForPreTraining(vit, VOCAB, MAPET, 2)
    images, tokens = torch.randn(2, 3, 2 * patch, 3 * patch), torch.zeros(2, 6, dtype=torch.int64)
    loss = pretrainer(make_batch(images, tokens, torch.rand(2, 6).argsort(1))).loss
    loss.backward()
    unused = {name for name, parameter in pretrainer.named_parameters() if parameter.grad is None}
    assert unused == set()
