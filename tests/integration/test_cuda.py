"""On a CUDA device: what a step, a codebook and a run give is what the CPU gives. Skipped where there is none."""

import json
import os
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mapet
from mapet.device import ComputeContext
from mapet.models.backbone import create_vit, prepare_for_device
from mapet.models.objectives import CAUSAL, MAPET, MIM, PIM
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.kmeans import KMeans, assign
from mapet.training import trainer
from mapet.training.step import ForwardBackward
from tests.conftest import make_batch, teacher_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # of what lies between two compiled blocks
]
SMALL = {"embed_dim": 128, "depth": 3, "num_heads": 2}


def make(objective, num_predict=None, drop_path=0.0, **args):
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", (64, 80), 8, 3, SMALL | args, drop_path)
    model = ViTForPreTraining(vit, 500, objective, 20, num_predict)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def draw_batch(batch=16):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 64, 80, generator=generator)
    tokens = torch.randint(500, (batch, 80), generator=generator)
    return make_batch(images, tokens, torch.rand(batch, 80, generator=generator).argsort(1))


def gradients(model):
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}


CASES = [(objective, m) for objective in (MAPET, PIM, MIM, CAUSAL) for m in (None, 17)]


@pytest.mark.parametrize(
    ("objective", "num_predict", "precision", "compile"),
    [(*case, precision, False) for case in CASES for precision in ("float32", "bfloat16")]
    + [(MAPET, None, "bfloat16", True), (CAUSAL, 17, "bfloat16", True)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_step_is_the_cpu_s(objective, num_predict, precision, compile):
    torch._dynamo.reset()
    exact = make(objective, num_predict, drop_path=0.2)
    rand = torch.rand(16, 6, generator=torch.Generator().manual_seed(2))
    indices = exact.sample_target_indices(20, [0])
    model, batch = deepcopy(exact), replace(draw_batch(), target_indices=indices, drop_path_rand=rand)
    (reference,) = ForwardBackward(exact, ComputeContext(torch.device("cpu"), torch.float32), 16)(batch)
    compute = ComputeContext.from_options("cuda", precision)
    step = ForwardBackward(prepare_for_device(model, compute), compute, 8)
    if compile:
        model.compile()
    result = step(batch.to(compute.device))
    assert float(sum(output.loss for output in result)) == pytest.approx(
        float(reference.loss), rel=1e-5 if precision == "float32" else 0.01
    )
    assert torch.equal(torch.cat([output.targets for output in result]).cpu(), reference.targets)
    expected = gradients(exact)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        similar = F.cosine_similarity(gradient.flatten().double(), expected[name].flatten().double(), dim=0)
        if expected[name].norm() > 1e-3:
            assert similar > (1 - 1e-7 if precision == "float32" else 0.99), (name, float(similar))


def test_compiled_blocks_are_compiled_once():
    """Twelve blocks with probabilities of their own, and steps of the same shape, share one compiled block."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = make(MAPET, drop_path=0.2, depth=12)
    compute = ComputeContext.from_options("cuda", "bfloat16")
    step = ForwardBackward(prepare_for_device(model, compute), compute, 16)
    model.compile()
    for _ in range(2):
        step(replace(draw_batch().to(compute.device), drop_path_rand=torch.rand(16, 24, device="cuda")))
    # packing, the first block (the same code as the others', but traced for itself), the others, the last, the softmax
    assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebook_and_tokens_are_the_cpu_s(dtype):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(200, 48, generator=generator) * 3
    points = centers.repeat(150, 1) + torch.randn(30_000, 48, generator=generator)
    cpu, gpu = (KMeans(300, 10, dtype=dtype).fit(points.to(device)) for device in ("cpu", "cuda"))
    assert gpu.error == pytest.approx(cpu.error, rel=0.005)
    ids, distances = assign(points, cpu.centroids)
    result, far = assign(points.cuda(), cpu.centroids.cuda())
    assert torch.equal(result.cpu(), ids)
    assert torch.allclose(far.cpu(), distances, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["hog", "whitened"])
def test_features_without_training_are_the_cpu_s(name):
    """But for pixels whose orientation lies at the edge of two bins, which rounding may move."""
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = []
    for device in ("cpu", "cuda"):
        teacher = teacher_of(name, (32, 32), 4).to(device)
        if teacher.is_fitted_to_images:
            teacher.fit(lambda device=device: [images.to(device)], len(images))
        features.append(teacher(images.to(device)).cpu())
    differing = (features[1] - features[0]).abs() > 1e-3 * features[0].abs().max()
    assert differing.float().mean() < 1e-3


def test_out_of_memory_halves_the_micro_batch(caplog):
    compute = ComputeContext.from_options("cuda", "bfloat16")
    torch.cuda.empty_cache()
    model = prepare_for_device(make(MAPET, embed_dim=384, depth=12), compute)
    step = ForwardBackward(model, compute, 512)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(3e9 / total)
    try:
        loss = sum(output.loss for output in step(draw_batch(512).to(compute.device)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert loss.isfinite() and step.micro_batch < 512
    assert "out of memory with 512 images at a time: continuing with micro_batch_size 256" in caplog.text


@pytest.mark.parametrize("compile", [False, True])
def test_run_resumes_and_learns(few_digits: Path, tmp_path: Path, compile: bool, monkeypatch):
    """From images to a backbone; stopped in the middle and resumed it gives the same metrics up to rounding."""
    torch._dynamo.reset()
    common = {"images": few_digits, "device": "cuda"}
    monkeypatch.setenv("MAPET_WORKERS", "2")
    tokenizer, tokens = tmp_path / "tokenizer", tmp_path / "tokens"
    mapet.fit_tokenizer(**common, out=tokenizer, image_size=16, patch_size=2, channels=1, vocab_size=32, kmeans_iters=5)
    mapet.tokenize(**common, tokenizer=tokenizer, out=tokens)
    args = common | {
        "tokenizer": tokenizer, "tokens": tokens, "model_args": SMALL, "epochs": 6, "batch_size": 50, "lr": 1e-3,
        "probe_every": 0, "log_interval": 3, "drop_path": 0.1, "compile": compile,
    }  # fmt: skip
    mapet.pretrain(**args, out=tmp_path / "whole")

    steps = []

    class Stops(trainer.ForwardBackward):
        def __call__(self, *args, **kwargs):
            steps.append(1)
            if len(steps) == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(trainer, "ForwardBackward", Stops)
    with pytest.raises(mapet.errors.Interrupted):
        mapet.pretrain(**args, out=tmp_path / "parts")
    mapet.pretrain(**args, out=tmp_path / "parts", resume=True)
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [m["step"] for m in whole] == [m["step"] for m in parts]
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-3)
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.3
    same = [one["loss"] == other["loss"] for one, other in zip(whole, parts, strict=True)]
    print("windows with a bit-exact loss:", sum(same), "of", len(same))
    assert (tmp_path / "parts" / "backbone" / "model.safetensors").is_file()
