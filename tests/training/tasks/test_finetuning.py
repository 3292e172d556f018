"""What fine-tuning's options do, on images of one gray each: views and flips do not change them, and a step can be computed by hand."""

import hashlib
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import mapet
from mapet.cli import main
from mapet.commands import training
from mapet.config.evaluation import FinetuneConfig
from mapet.device import ComputeContext
from mapet.errors import Interrupted
from mapet.evaluation.eval_context import mean_over_seeds
from mapet.models.backbone import create_vit, load_backbone, save_backbone
from mapet.run_state import RunState
from mapet.training import trainer
from mapet.training.tasks import finetuning
from tests.conftest import TINY
from tests.refused import fails, refused

ONE_STEP = {"epochs": 1, "batch_size": 12, "warmup_epochs": 0, "drop_path": 0.0, "weight_decay": 0.0}
CPU = {"device": "cpu", "precision": "float32"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def grays(tmp_path_factory):
    """Six images of each of two classes: a is black and b white."""
    root = tmp_path_factory.mktemp("grays")
    for name, gray in (("a", 0), ("b", 255)):
        (root / name).mkdir()
        for number in range(6):
            Image.fromarray(np.full((8, 8), gray, np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A backbone with a classifier of two classes."""
    folder = tmp_path_factory.mktemp("vit") / "vit"
    torch.manual_seed(0)
    model = create_vit("vit_tiny_patch16_224", (8, 8), 4, 1, TINY | {"depth": 3})
    model.reset_classifier(2)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    save_backbone(model, folder)
    return folder


@pytest.fixture(autouse=True)
def its_classifier(vit, monkeypatch):
    """Fine-tuning draws a fresh classifier; here it starts with the folder's, so that its first step can be computed by hand."""
    load = finetuning.load_backbone

    def with_classifier(*args, **options):
        model = load(*args, **options)
        weights = load_file(vit / "model.safetensors")
        model.head.load_state_dict({name: weights[f"head.{name}"] for name in ("weight", "bias")})
        return model

    monkeypatch.setattr(finetuning, "load_backbone", with_classifier)


def tune(vit, grays, out, **options):
    """Return the saved weights and the rows of metrics.jsonl."""
    mapet.finetune(backbone=vit, images=grays, test_images=grays, out=out, **(ONE_STEP | CPU | options))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [
        {name: value for name, value in line.items() if name not in ("images_per_second", "data_time_fraction")}
        for line in lines
    ]
    return load_file(out / "model" / "model.safetensors"), rows


@torch.no_grad()
def log_chances(vit, whiteness):
    """Return the logits of the initial backbone for images of one gray each."""
    model = load_backbone(vit, global_pool="avg", fc_norm=False).eval()
    pixels = ((whiteness - 0.5) / 0.25).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    return model(pixels).log_softmax(1)


@pytest.mark.parametrize("decay", [0.5, None])
def test_layer_decay_scales_the_first_step(decay, vit, grays, tmp_path):
    """AdamW's first step moves every weight by the learning rate, whatever its gradient: BEiT's factor of each block shows."""
    after, _ = tune(vit, grays, tmp_path / "out", lr=1e-3, min_lr=0.0, layer_decay=decay)
    before = load_file(vit / "model.safetensors")
    steps = {name: float((after[name] - before[name]).abs().max()) / 1e-3 for name in before}
    depth, decay = 3, decay or 1.0
    places = {
        "patch_embed.proj.weight": 0,
        "pos_embed": 0,
        "cls_token": 0,
        "head.weight": depth + 1,
        "head.bias": depth + 1,
    }
    for block in range(depth):
        places |= {
            f"blocks.{block}.{layer}": block + 1 for layer in ("norm1.weight", "attn.qkv.weight", "mlp.fc2.bias")
        }
    for name, place in places.items():
        assert steps[name] == pytest.approx(decay ** (depth + 1 - place), rel=0.01), name


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_in_the_loss_of_a_step(smoothing, vit, grays, tmp_path):
    """(1 - s) of the target is the class, s is spread over all."""
    _, rows = tune(vit, grays, tmp_path / "out", label_smoothing=smoothing)
    chances = log_chances(vit, torch.tensor([0.0, 1.0]))
    right, all_classes = -chances.diag(), -chances.mean(1)
    expected = ((1 - smoothing) * right + smoothing * all_classes).mean()
    assert rows[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.fixture
def recorded_batches(its_classifier, monkeypatch):
    """Record (training, pixels in [0, 1]) of each batch that the model gets; and the model."""
    seen, models, inner = [], [], finetuning.load_backbone

    def load(*source, **options):
        model = inner(*source, **options)
        model.register_forward_pre_hook(lambda model, images: seen.append((model.training, images[0] * 0.25 + 0.5)))
        models.append(model)
        return model

    monkeypatch.setattr(finetuning, "load_backbone", load)
    return seen, models


def select_pixels(seen, training):
    return torch.cat([pixels for while_training, pixels in seen if while_training == training])


def test_mixup_blends_images_and_labels_in_training_alone(recorded_batches, vit, grays, tmp_path):
    """The gray of mixed black and white gives the target's mixture; label smoothing applies, too."""
    _, rows = tune(vit, grays, tmp_path / "out", mixup=1.0, label_smoothing=0.2)
    trained, evaluated = (select_pixels(recorded_batches[0], training).mean((1, 2, 3)) for training in (True, False))
    assert ((trained > 0.01) & (trained < 0.99)).sum() >= 2
    assert sorted(evaluated.round(decimals=4).tolist()) == [0.0] * 6 + [1.0] * 6
    white = trained * 0.8 + 0.1
    targets = torch.stack([1 - white, white], dim=1)
    assert rows[0]["loss"] == pytest.approx(float(-(targets * log_chances(vit, trained)).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "share"), [({"random_erasing": 1.0}, 0.6), ({"cutmix": 1.0, "seed": 1}, 0.1), ({}, 0.0)]
)
def test_boxes_are_erased_and_swapped_in_training_alone(options, share, recorded_batches, vit, grays, tmp_path):
    tune(vit, grays, tmp_path / "out", **(options | {"epochs": 3}))
    uneven = [
        (select_pixels(recorded_batches[0], training).std((1, 2, 3)) > 0.01).float().mean()
        for training in (True, False)
    ]
    assert len(select_pixels(recorded_batches[0], True)) == 36 and uneven[1] == 0
    assert uneven[0] >= share if share else uneven[0] == 0


def test_drop_path_rises_to_the_last_block_and_is_not_saved(recorded_batches, vit, grays, tmp_path):
    tune(vit, grays, tmp_path / "out", drop_path=0.4)
    (model,) = recorded_batches[1]
    rates = [
        getattr(layer, "drop_prob", 0.0) for block in model.blocks for layer in (block.drop_path1, block.drop_path2)
    ]
    assert rates == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    saved = load_backbone(tmp_path / "out" / "model")
    assert not any(hasattr(block.drop_path1, "drop_prob") for block in saved.blocks)


def test_moving_average_is_evaluated_and_saved(monkeypatch, vit, grays, tmp_path):
    """Train twice: the weights of each step are evaluated, and with `ema_decay` their average, worked out here."""
    weights = []

    def classify(model, *rest):
        weights.append(model.head.weight.detach().clone())
        return original(model, *rest)

    original = finetuning.classify_images
    monkeypatch.setattr(finetuning, "classify_images", classify)
    tune(vit, grays, tmp_path / "raw", epochs=6, lr=0.03)
    raw = weights.copy()
    weights.clear()
    saved, _ = tune(vit, grays, tmp_path / "out", epochs=6, lr=0.03, ema_decay=0.5)
    average = raw[0]
    for step, own in enumerate(raw):
        decay = 0.0 if step < 2 else min(0.5, 1 - step ** (-2 / 3))  # a warm-up, so that the first weights don't linger
        average = decay * average + (1 - decay) * own
        torch.testing.assert_close(weights[step], average, atol=1e-6, rtol=1e-5)
    assert len(weights) == len(raw) == 6 and float((average - raw[-1]).abs().max()) > 1e-3
    assert torch.equal(saved["head.weight"], weights[-1])


@pytest.mark.parametrize(
    ("options", "count"),
    [({"labels_per_class": 0.5}, 3), ({"labels_per_class": 2}, 2), ({"labels_per_class": 0.01}, 1)],
)
def test_labels_are_those_of_the_published_split(options, count, recorded_batches, vit, grays):
    """The images of smallest BLAKE2b number, as docs/evaluation.md says it."""
    config = FinetuneConfig(
        backbone=str(vit), images=grays, test_images=grays, seed=5, **(ONE_STEP | CPU | options | {"batch_size": 1})
    )
    tuned = trainer.Trainer(finetuning.FinetuningTask(), config).fit()

    def number(name):
        return int.from_bytes(hashlib.blake2b(f"5:{name}".encode(), digest_size=8).digest(), "little")

    ids = {kind: sorted((f"{kind}/{i}.png" for i in range(6)), key=number)[:count] for kind in "ab"}
    train = tuned.train
    assert sorted(train.images.id(i) for i in range(len(train.images))) == sorted(ids["a"] + ids["b"])
    assert train.labels.tolist() == [0] * count + [1] * count
    assert len(select_pixels(recorded_batches[0], True)) == 2 * count and tuned.num_test == 12  # all test images


ALL_THAT_IS_DRAWN = {
    "epochs": 4, "batch_size": 5, "lr": 1e-2, "drop_path": 0.5, "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5,
    "views": "random-crop", "ema_decay": 0.9,
}  # fmt: skip


def interrupt(monkeypatch, at):
    """SIGTERM in step `at`, counted from 0 and over all fine-tunings."""
    steps, seed_of = iter(range(10**6)), trainer.step_seed

    def step_seed(seed, step):
        if next(steps) == at:
            signal.raise_signal(signal.SIGTERM)
        return seed_of(seed, step)

    monkeypatch.setattr(trainer, "step_seed", step_seed)


@pytest.mark.parametrize("at", [0, 4, 5, 11])
def test_a_resumed_fine_tuning_equals_an_uninterrupted_one(at, vit, grays, tmp_path, monkeypatch):
    """In the middle of an epoch, at its end and at the very end: weights, their average and the curve, bit-exact."""
    options = ALL_THAT_IS_DRAWN
    whole = tune(vit, grays, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        if at < 11:
            with refused(f"step {at + 1} of 12", "parts/config.yaml --resume", kind=Interrupted):
                tune(vit, grays, tmp_path / "parts", **options)
            assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == [f"step-{at + 1:08d}"]
            parts = tune(vit, grays, tmp_path / "parts", **options, resume=True)
        else:  # nothing is left to do
            parts = tune(vit, grays, tmp_path / "parts", **options)
    assert parts[1] == whole[1]
    assert all(torch.equal(parts[0][name], value) for name, value in whole[0].items())
    assert not (tmp_path / "parts" / "checkpoints").exists()
    assert tune(vit, grays, tmp_path / "parts", **options, resume=True)[1] == whole[1]  # it is finished


def test_fine_tuning_records_accuracy_and_provenance_together(vit, grays, tmp_path, monkeypatch):
    """A run without provenance is not finished: it resumes, and has both."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "finetuning_provenance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(vit, grays, tmp_path / "out")
    assert "accuracy" not in RunState.read(tmp_path / "out").results
    tune(vit, grays, tmp_path / "out", resume=True)
    assert {"accuracy", "provenance"} <= RunState.read(tmp_path / "out").results.keys()


def test_an_unfinished_fine_tuning_says_how_to_resume(vit, grays, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Interrupted):
            tune(vit, grays, tmp_path / "out", **ALL_THAT_IS_DRAWN)
    for argv in (["export"], ["evaluate", "--images", str(grays), "--test-images", str(grays)]):
        hint = f"mapet finetune {tmp_path / 'out' / 'config.yaml'} --resume"
        fails(capsys, *argv, "--backbone", tmp_path / "out", "--out", tmp_path / "x", named=[hint])
    fails(capsys, "finetune", "--backbone", vit, "--images", grays, "--resume", named=["--out"])
    with refused("lr"):
        tune(vit, grays, tmp_path / "out", **ALL_THAT_IS_DRAWN | {"lr": 0.5}, resume=True)
    assert main(["finetune", str(tmp_path / "out" / "config.yaml"), "--resume"]) == 0
    assert (tmp_path / "out" / "model").is_dir()


def test_several_seeds_have_a_mean_and_an_interval(vit, grays, tmp_path, monkeypatch, capsys):
    options = ONE_STEP | CPU | {"backbone": vit, "images": grays, "test_images": grays}
    options |= {"lr": 1e-9, "labels_per_class": 2, "batch_size": 2}
    evaluated = iter([3, 6, 12])
    classes = torch.arange(12) % 2
    monkeypatch.setattr(  # so many of 12 are right
        finetuning,
        "classify_images",
        lambda *_: (torch.eye(2)[classes ^ (torch.arange(12) >= next(evaluated))], classes),
    )
    hint = f"mapet finetune {tmp_path}/out/config.yaml --resume"
    for at, resume, progress in ((1, False, "seed 4"), (0, True, "step 1 of 2")):  # two steps a seed
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            with refused(progress, hint, kind=Interrupted):
                mapet.finetune(**options, seed=4, num_seeds=3, out=tmp_path / "out", resume=resume)
    assert main(["finetune", str(tmp_path / "out" / "config.yaml"), "--resume"]) == 0
    message = RunState.read(tmp_path / "out").results
    scores = {"seed-4": 0.25, "seed-5": 0.5, "seed-6": 1.0}
    figure = mean_over_seeds(list(scores.values()))
    assert message == {
        "accuracy": figure.value,
        "ci95_low": figure.ci_low,
        "ci95_high": figure.ci_high,
        "seeds": scores,
    }
    splits = {
        RunState.read(tmp_path / "out" / name).results["provenance"]["finetuned"][0]["images"]["hash"]
        for name in scores
    }
    assert len(splits) > 1  # which labels are used is each seed's own
    with refused(field="out"):
        mapet.finetune(**options, num_seeds=2, out=tmp_path / "out")
    again = ["finetune", str(tmp_path / "out" / "config.yaml"), "--resume"]
    for options_now in (
        ["--from-scratch"],
        ["--num-seeds", "1"],
        ["--lr", "0.5"],
    ):  # not the metrics of before under another name
        fails(capsys, *again, *options_now, named=[f"mapet finetune {tmp_path}/out/config.yaml --resume;"])
    evaluated = iter([3])
    assert main([*again, "--num-seeds", "4"]) == 0
    assert main(again) == 0 and "num_seeds: 4" in (tmp_path / "out" / "config.yaml").read_text()
    assert set(RunState.read(tmp_path / "out").results["seeds"]) == {"seed-4", "seed-5", "seed-6", "seed-7"}
    with refused("seed-4"):
        load_backbone(tmp_path / "out")
    evaluated = iter([3, 9])
    assert mapet.finetune(**options, num_seeds=2) == 0.5


def test_balanced_accuracy_and_auroc_lead_on_imbalanced_test_images(vit, grays, tmp_path, caplog):
    """Log, run.json, curve and the mean over seeds; the values are scikit-learn's on the saved model's logits."""
    caplog.set_level("INFO", "mapet")
    rng = np.random.default_rng(0)
    for name, count in (("a", 9), ("b", 3)):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(count):
            gray = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(gray).save(tmp_path / "test" / name / f"{number}.png")
    options = ONE_STEP | CPU | {"backbone": vit, "images": grays, "test_images": tmp_path / "test"}
    accuracy = mapet.finetune(**options, num_seeds=2, out=tmp_path / "out")
    config = FinetuneConfig(**options, out=tmp_path / "out" / "seed-0")
    _, test = finetuning._load_labeled_images(config)
    model = load_backbone(tmp_path / "out" / "seed-0" / "model")
    logits, labels = finetuning.classify_images(model, test, ComputeContext.from_options("cpu", "float32"))
    results = RunState.read(tmp_path / "out" / "seed-0").results
    assert list(results)[:3] == ["balanced_accuracy", "balanced_accuracy_ci95_low", "balanced_accuracy_ci95_high"]
    assert results["auroc"] == pytest.approx(roc_auc_score(labels, logits.softmax(1)[:, 1]))
    assert results["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    means = RunState.read(tmp_path / "out").results
    assert next(iter(means)) == "balanced_accuracy" and means["accuracy"] == accuracy and "auroc_ci95_low" in means
    last = json.loads((tmp_path / "out" / "seed-0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert list(last) == ["step", "epoch", "balanced_accuracy", "auroc", "accuracy"]
    assert "test balanced accuracy 0." in caplog.text and ", AUROC 0." in caplog.text
