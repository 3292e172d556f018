"""`train-tokenizer`: exact resume, precision, its folder."""

import json
import os
import signal

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import mapet
from mapet.cli import main
from mapet.data.dataset import ViewDataset
from mapet.data.sources import list_images
from mapet.errors import Interrupted
from mapet.run_state import RunState
from mapet.tokenizers.tokenizer import load_tokenizer
from mapet.tokenizers.vqkd import load_vqkd
from mapet.training import trainer
from mapet.training.checkpoint import NonFiniteError
from tests.conftest import PRETRAIN, all_rows
from tests.refused import refused

OPTIONS = {
    "image_size": 8, "patch_size": 2, "channels": 1, "vocab_size": 16, "codebook_dim": 8, "epochs": 2, "batch_size": 100,
    "lr": 1e-3, "decoder_depth": 1, "model_args": {"embed_dim": 64, "depth": 1, "num_heads": 1}, "drop_path": 0.2,
    "device": "cpu", "precision": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread: several are slower for models this small."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def two_threads():
    """Return a fixed precision instead of a timing."""


@pytest.fixture(scope="module")
def whole(few_digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("vqkd") / "run"
    return mapet.train_tokenizer(images=few_digits, out=out, **OPTIONS)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(stop_at, whole, few_digits, tmp_path, monkeypatch):
    def seed(value, step, original=trainer.step_seed):
        if step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(value, step)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_seed", seed)
        with refused("SIGINT", f"step {stop_at} of 6", f"mapet train-tokenizer {out}/config.yaml", kind=Interrupted):
            mapet.train_tokenizer(images=few_digits, out=out, **OPTIONS)
    assert not (out / "vqkd").exists()
    with refused("ema_decay", 0.99, 0.9, "mapet train-tokenizer"):
        mapet.train_tokenizer(images=few_digits, out=out, **OPTIONS, ema_decay=0.9, resume=True)
    assert main(["train-tokenizer", str(out / "config.yaml"), "--resume"]) == 0
    ours, expected = (load_file(file) for file in (out / "vqkd" / "vqkd.safetensors", whole))
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_folder(whole, few_digits):
    out = whole.parents[1]
    recipe = yaml.safe_load((out / "config.yaml").read_text())
    assert RunState.read(out).command == "train-tokenizer"
    assert (recipe["vocab_size"], recipe["warmup_epochs"], recipe["views"]) == (16, 0.2, "random-crop")
    description = json.loads((whole.parent / "vqkd.json").read_text())
    assert description["training"]["num_images"] == 288 and description["teacher"]["teacher"] == "pixels"
    assert description["codebook_stats"]["num_patches"] == 288 * 16
    with refused(field="out"):
        mapet.train_tokenizer(images=few_digits, out=out, **OPTIONS)


def test_bfloat16(few_digits, tmp_path):
    file = mapet.train_tokenizer(images=few_digits, out=tmp_path / "run", **(OPTIONS | {"precision": "bfloat16"}))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in load_file(file).values())
    assert load_vqkd(file).image_size == (8, 8)


def test_stored_and_online_tokens_are_the_same(few_digits, tmp_path):
    """The teacher has a built-in codebook: nothing is clustered, and tokens are its nearest codes."""
    file = mapet.train_tokenizer(images=few_digits, out=tmp_path / "run", **OPTIONS)
    common = {"images": few_digits}
    given = {"image_size": 8, "patch_size": 2, "channels": 1, "teacher": "vqkd", "teacher_checkpoint": str(file)}
    with refused(16, "vocab_size", "kmeans_n_init"):
        mapet.fit_tokenizer(out=tmp_path / "t", vocab_size=8, kmeans_n_init=5, **given, **common)
    fitted = mapet.fit_tokenizer(out=tmp_path / "t", precision="float32", **given, **common)
    assert fitted.vocab_size == 16 and fitted.description["codebook_stats"]["num_patches"] == 16 * len(
        list_images(few_digits)
    )
    store = mapet.tokenize(tokenizer=tmp_path / "t", out=tmp_path / "s", **common)
    tokenizer, encoder = load_tokenizer(tmp_path / "t"), load_vqkd(file)
    batch = ViewDataset(list_images(few_digits), store.view_spec, 1, teacher_size=(8, 8)).batch(
        [(0, i) for i in range(9)]
    )
    ids = tokenizer(batch.teacher_images).flatten(1)
    assert np.array_equal(ids.numpy(), all_rows(store)[:9, 0])
    with torch.inference_mode():
        cosines = torch.einsum("bdhw,kd->bhwk", encoder(batch.teacher_images / 255), encoder.codebook)
    assert torch.equal(ids, cosines.argmax(3).flatten(1))
    runs = []
    for tokens in (tmp_path / "s", None):
        runs.append(tmp_path / f"pretrained-{len(runs)}")
        mapet.pretrain(images=few_digits, tokenizer=tmp_path / "t", tokens=tokens, out=runs[-1], **PRETRAIN)
    first, second = (load_file(run / "backbone" / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_s_teacher_is_recorded(few_digits, tmp_path):
    """visual_tokenizer.json names the teacher of a VQ-KD tokenizer, and its preprocessing."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=1, num_heads=2, num_classes=12
    )
    timm.models.save_for_hf(vit, str(tmp_path / "vit"), safe_serialization=True)
    options = OPTIONS | {"teacher": f"local-dir:{tmp_path / 'vit'}", "teacher_output": "projection", "epochs": 1}
    file = mapet.train_tokenizer(images=few_digits, out=tmp_path / "run", **options)
    mapet.fit_tokenizer(
        images=few_digits, out=tmp_path / "t", image_size=8, patch_size=2, channels=1, teacher="vqkd",
        teacher_checkpoint=str(file),
    )  # fmt: skip
    assert load_file(file)["decode_task_layer.2.weight"].shape[0] == 12  # the projection's width
    description = json.loads((tmp_path / "t" / "visual_tokenizer.json").read_text())
    assert description["interpolation"] is None
    first = description["teacher_metadata"]["learned_from"]
    assert first["teacher"]["teacher"].startswith("local-dir:") and first["teacher"]["output"] == "projection"
    assert first["teacher_metadata"] == {"mean": [0.5], "std": [0.5], "prefix_tokens_dropped": 1}


@pytest.mark.parametrize(
    ("options", "named", "field"),
    [
        ({"image_size": (8, 16)}, ["8 x 16"], None),
        ({"image_size": 9}, ["9 x 9", "2"], None),
        (
            {"model_args": {"embed_dim": 64, "depth": 1, "num_heads": 4}},
            ["4 heads", "num_heads=1", "embed_dim=64"],
            "model_args",
        ),
        ({"model": "resnet18"}, ["'resnet18'"], None),
        ({"teacher_output": "norm"}, ["'pixels'", "teacher_output"], None),
        ({"vocab_size": 4609}, ["4609", "4,608"], "vocab_size"),
    ],
)
def test_bad_options(options, named, field, few_digits, tmp_path):
    with refused(*named, field=field):
        mapet.train_tokenizer(images=few_digits, out=tmp_path / "run", **(OPTIONS | options))
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_stops_the_run(few_digits, tmp_path):
    with pytest.raises(NonFiniteError):
        mapet.train_tokenizer(images=few_digits, out=tmp_path / "run", **(OPTIONS | {"lr": 1e30}))
    assert not (tmp_path / "run" / "vqkd").exists()
    (saved,) = (tmp_path / "run").glob("checkpoints/*/model.safetensors")  # the weights of the last finite step
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


def test_an_interval_without_a_readable_image_is_no_divergence(few_digits, tmp_path):
    """Its loss would be 0 / 0."""
    for path in (few_digits.parent / line for line in few_digits.read_text().splitlines()[:5]):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / path.name).write_bytes(b"no image")
    small = {"vocab_size": 4, "batch_size": 1, "log_interval": 1, "epochs": 1}
    assert mapet.train_tokenizer(images=tmp_path / "images", out=tmp_path / "run", **(OPTIONS | small)).is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
