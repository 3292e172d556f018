"""Every shortcut of the training step against the plain way, with gradients, in float64; and within bfloat16's rounding."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mapet import device
from mapet.device import ComputeContext
from mapet.models import pretraining
from mapet.models.backbone import create_vit, prepare_for_device
from mapet.models.objectives import MAPET, MIM, OBJECTIVES, PIM
from mapet.models.packing import attention_mask, eager_attention, split_query_blocks
from mapet.models.pretraining import (
    PreTrainingOutput,
    ViTForPreTraining,
    drop_path_scales,
    linear_cross_entropy,
    residual_update,
)
from mapet.training.step import ForwardBackward, auto_micro_batch
from mapet.training.tasks import pretraining as sizing
from tests.conftest import make_batch
from tests.refused import refused

FLOAT64 = ComputeContext(torch.device("cpu"), torch.float32)  # "no lower precision than the model's own"


def make(objective=MAPET, c=5, num_predict=None, drop_path=0.0, dtype=torch.float64, **args):
    torch.manual_seed(0)
    base = {"embed_dim": 32, "depth": 3, "num_heads": 2} | args
    vit = create_vit("vit_tiny_patch16_224", (16, 20), 4, 3, base, drop_path)
    model = ViTForPreTraining(vit, 40, objective, c, num_predict).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def draw_batch(batch=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 16, 20, generator=generator, dtype=torch.float64).to(dtype)
    permutation = torch.rand(batch, 20, generator=generator).argsort(1)
    return make_batch(images, torch.randint(0, 40, (batch, 20), generator=generator), permutation)


def joined(outputs):
    """One output of those of micro-batches, whose losses are weighted."""
    loss, correct, targets, _ = zip(*outputs, strict=True)
    each = torch.cat([output.loss_per_image for output in outputs])
    return PreTrainingOutput(sum(loss), sum(correct), torch.cat(targets), each)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("args", [{}, {"init_values": 0.1}, {"reg_tokens": 2}, {"class_token": False}])
@pytest.mark.parametrize("fused", [True, False])
def test_equals_the_released_way(args, fused):
    """Dense mask for each image and head, separate streams, all rows, all logits: the same loss and gradients."""
    from benchmarks.reference import reference_loss

    model = make(**args)
    for block in model.vit.blocks:
        block.attn.fused_attn = fused
    batch = draw_batch()
    expected, logits = reference_loss(model, batch.images, batch.targets, batch.permutation)
    expected.backward()
    reference = gradients(model)
    model.zero_grad()
    step = ForwardBackward(model, FLOAT64, micro_batch=4)
    prediction = joined(step(batch))
    assert torch.allclose(prediction.loss, expected, rtol=1e-12)
    assert prediction.num_correct == (logits.argmax(-1) == prediction.targets).sum()
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, reference[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("objective", [MAPET, PIM, MIM], ids=lambda o: o.name)
def test_bfloat16_step_is_the_float32_step_but_for_rounding(objective):
    model = make(objective, dtype=torch.float32)
    low = deepcopy(model)
    batch = draw_batch(32, torch.float32)
    exact = joined(ForwardBackward(model, ComputeContext(torch.device("cpu"), torch.float32), 32)(batch))
    compute = ComputeContext(torch.device("cpu"), torch.bfloat16)
    rough = joined(ForwardBackward(prepare_for_device(low, compute), compute, 8)(batch))
    assert rough.loss.dtype == torch.float32
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.01)
    reference = gradients(model)
    for name, gradient in gradients(low).items():
        assert gradient.dtype == torch.float32
        if name != "vit.cls_token" and reference[name].norm() > 1e-3:
            assert F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 6, 100])
def test_micro_batches_give_the_whole_batch_s_gradient(micro_batch):
    """Also where they don't divide the batch, and with stochastic depth: the mean is over patches, not micro-batches."""
    model, whole = make(drop_path=0.5), make(drop_path=0.5)
    survival = torch.rand(6, 2 * len(model.vit.blocks), dtype=torch.float64)
    for made, size in ((model, micro_batch), (whole, 6)):
        step = ForwardBackward(made, FLOAT64, size)
        made.prediction = joined(step(replace(draw_batch(), drop_path_rand=survival)))
    assert torch.allclose(model.prediction.loss, whole.prediction.loss, rtol=1e-12)
    assert torch.equal(model.prediction.targets, whole.prediction.targets)
    assert model.prediction.num_correct == whole.prediction.num_correct
    reference = gradients(whole)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, reference[name], rtol=1e-9, atol=1e-12), name


def test_stochastic_depth_by_given_numbers_is_timm_s():
    """Kept branches are scaled, dropped ones leave their rows unchanged; images are independent."""
    model = make(drop_path=0.4)
    block, rows = model.vit.blocks[2].train(), torch.randn(3, 5, 32, dtype=torch.float64)
    assert block.drop_path1.drop_prob == pytest.approx(0.4)
    attended = torch.randn_like(rows)

    def through(*numbers: list[float]) -> torch.Tensor:
        """Return the block after its attention, with these random numbers of its two branches for the three images."""
        survival = torch.zeros(3, 2 * len(model.vit.blocks), dtype=torch.float64)
        survival[:, 4], survival[:, 5] = map(torch.tensor, numbers)
        return residual_update(block, rows, attended, drop_path_scales(model.vit.blocks, survival, rows)[2])

    nothing, always = [0.61] * 3, [0.59] * 3
    assert torch.equal(through(nothing, nothing), rows)
    attended_only = through(always, nothing)
    assert torch.allclose(attended_only, rows + block.ls1(attended) / 0.6, atol=1e-6)
    both = through(always, always)
    assert torch.allclose(both, attended_only + block.ls2(block.mlp(block.norm2(attended_only))) / 0.6, atol=1e-5)
    mixed = through([0.59, 0.61, 0.59], always)
    assert torch.equal(mixed[[0, 2]], both[[0, 2]]) and not torch.equal(mixed[1], both[1])
    model.eval()
    assert torch.equal(through(nothing, nothing), residual_update(block, rows, attended))


@given(
    st.integers(0, 4), st.integers(0, 12), st.integers(1, 12), st.sampled_from(list(OBJECTIVES)), st.integers(0, 2**31)
)
@settings(max_examples=60, deadline=None)
def test_blocks_cover_the_table(prefix, c, p, name, seed):
    """Blocks are consecutive, omit only keys that no query attends to, and claim to need no mask only where that is so."""
    if name == "pim" and prefix + c == 0:
        return
    table = attention_mask(OBJECTIVES[name], prefix, c, p)
    blocks = split_query_blocks(table)
    assert [b.queries.start for b in blocks] == [0, *(b.queries.stop for b in blocks[:-1])]
    assert blocks[-1].queries.stop == len(table)
    for rows, columns, masked in blocks:
        outside = table[rows].clone()
        outside[:, columns] = False
        assert not outside.any()
        assert masked or table[rows, columns].all()


def test_mapet_needs_two_attention_calls():
    """At the paper's sizes: mask and context queries run without a mask over 197 keys, target and query rows with one."""
    table = attention_mask(MAPET, 1, 49, 147)[:, :344]
    assert split_query_blocks(table) == [
        (slice(0, 197), slice(0, 197), False),
        (slice(197, 491), slice(0, 344), True),
    ]
    assert len(split_query_blocks(attention_mask(MIM, 1, 49, 147))) == 1


@pytest.mark.parametrize("masked", [True, False])
def test_eager_attention_equals_pytorch_s(masked):
    q, k, v = (torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.zeros(7, 7, dtype=torch.float64).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    results = []
    for attention in (eager_attention, F.scaled_dot_product_attention):
        out = attention(q, k, v, attn_mask=bias if masked else None, dropout_p=0.0, scale=0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_chunked_cross_entropy(monkeypatch, rows, scale):
    """Loss, accuracy and gradients of PyTorch's, in any chunks, also where a softmax in one go would underflow."""
    monkeypatch.setitem(pretraining.CHUNK_ROWS, "cpu", rows)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).requires_grad_()
        for shape in ((23, 8), (40, 8), (40,))
    )
    targets = torch.randint(0, 40, (23,), generator=generator)
    loss, correct, each = linear_cross_entropy(x, weight, bias, targets)
    assert torch.allclose(each, F.cross_entropy(F.linear(x, weight, bias), targets, reduction="none"), rtol=1e-12)
    logits = F.linear(x, weight, bias)
    expected = F.cross_entropy(logits, targets)
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert correct == (logits.argmax(1) == targets).sum()
    ours, theirs = (torch.autograd.grad(3 * value, (x, weight, bias)) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", [MAPET, PIM, MIM], ids=lambda o: o.name)
@pytest.mark.parametrize("m", [1, 4, 15])
def test_a_subset_of_targets_predicts_what_all_of_them_do(objective, m):
    """The rows of some indices, computed alone, equal those computed with all others."""
    model = make(objective, num_predict=m)
    batch = draw_batch()
    everything = model.encode(batch)
    ranks = torch.randperm(15)[:m].sort().values
    some = model.encode(replace(batch, target_indices=ranks))
    assert torch.allclose(some, everything[:, ranks], atol=1e-12)
    drawn = model.sample_target_indices(5, [0])
    assert len(drawn.unique()) == m and drawn.min() >= 0 and drawn.max() < 15
    assert model(replace(batch, target_indices=drawn)).targets.shape == (6, m)
    assert model(batch).targets.shape == (6, 15)


def test_a_subset_of_targets_is_an_unbiased_estimate():
    model = make(num_predict=5).train()
    batch = draw_batch(2)
    with torch.no_grad():
        draws = torch.stack(
            [model(replace(batch, target_indices=model.sample_target_indices(5, [n]))).loss for n in range(400)]
        )
        whole = model(batch).loss
    assert abs(float(draws.mean() - whole)) < 4 * float(draws.std()) / 20
    assert draws.std() > 0


@pytest.mark.parametrize("m", [0, 16])
def test_targets_out_of_range(m):
    with refused(m, 15):
        make(num_predict=m)


def test_micro_batch_of_a_cpu_fits_its_cache_and_of_a_gpu_is_the_batch():
    vit = create_vit("vit_tiny_patch16_224", (224, 224))
    model = ViTForPreTraining(vit, 10, MAPET, 49)
    assert auto_micro_batch(model, 64, ComputeContext(torch.device("cpu"), torch.bfloat16)) == 8
    assert auto_micro_batch(model, 64, ComputeContext(torch.device("cpu"), torch.float32)) == 4
    assert auto_micro_batch(model, 64, ComputeContext(torch.device("meta"), torch.bfloat16)) == 64


def test_a_full_cache_of_files_is_free_memory_and_does_not_shrink_a_cpu_s_batch(monkeypatch, tmp_path):
    cpu = ComputeContext(torch.device("cpu"), torch.float32)
    before = sizing.auto_batch_size(make(), 10_000, cpu)
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemFree:  1 kB\nMemAvailable:  500 kB\n")
    monkeypatch.setattr(device, "MEMINFO", tmp_path / "meminfo")
    assert device.free_memory(cpu.device) == 512_000
    assert sizing.auto_batch_size(make(), 10_000, cpu) == before == 256
    monkeypatch.setattr(device, "MEMINFO", tmp_path / "none")  # another system
    assert device.free_memory(cpu.device) > 1_000_000


@pytest.mark.parametrize(("name", "peak"), [("tiny", 10.7), ("small", 20.3), ("base", 39.7)])
def test_images_that_fit_a_gpu_are_counted_as_was_measured_there(name, peak):
    """Peak GB at batch 256, on an H100 (docs/performance.md): never more than counted, and not much less."""
    model = ViTForPreTraining(create_vit(f"vit_{name}_patch16_224", (224, 224)), 8192, MAPET, 49)
    compute = ComputeContext(torch.device("cuda"), torch.bfloat16)
    assert 1 < 256 * sizing.activation_bytes_per_image(model, compute) / (peak * 1e9) < 1.25


def test_arithmetic_is_what_pytorch_counts():
    """The exact count, with masked attention scores added, equals PyTorch's counter, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.flops import Shape, forward, reference_training_flops, training_flops

    model = make(dtype=torch.float32)
    for block in model.vit.blocks:
        block.attn.fused_attn = False
    shape = Shape(32, 3, patches=20, context=5, vocabulary=40, patch_values=48)
    batch = draw_batch(1, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    p, content = 15, 36
    # Two blocks' target and query rows; the last block's queries, which don't even multiply with the last target.
    unseen = 2 * shape.width * (2 * 2 * p * (content - 21) + p * (content - 1 - 21))
    assert counter.get_total_flops() == training_flops(shape) + 2 * 3 * unseen
    base = Shape(768, 12)
    everything = (reference_training_flops(base) / 2 + forward(base)["patch embedding"]) / 3
    assert everything / 1e9 == pytest.approx(43.7, abs=0.1)  # GMAC of ViT-B with every row in every block
    assert sum(forward(base).values()) < everything


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of what lies between two compiled blocks
def test_compiled_step_equals_eager():
    """torch.compile of the pass; a minute or two of compiling, and a C++ compiler, are needed."""
    eager, compiled = make(dtype=torch.float32), make(dtype=torch.float32)
    compiled.compile()
    results = [joined(ForwardBackward(m, FLOAT64, 6)(draw_batch(6, torch.float32))) for m in (eager, compiled)]
    assert torch.allclose(results[0].loss, results[1].loss, rtol=1e-5)
    reference = gradients(eager)
    for name, gradient in gradients(compiled).items():
        assert torch.allclose(gradient, reference[name], rtol=1e-3, atol=1e-5), name
