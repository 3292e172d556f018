"""The commands together: exact resume, stored = online tokens, start from weights, Ctrl-C, `run`."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
import yaml
from matplotlib import pyplot
from safetensors.torch import load_file

import mapet
from mapet.cli import main, run_command
from mapet.config.pipeline import RunConfig
from mapet.config.pretraining import PretrainConfig
from mapet.data.dataset import ViewDataset
from mapet.data.sources import list_images
from mapet.data.token_store import TokenShard, TokenStore
from mapet.device import ComputeContext
from mapet.errors import Interrupted, option, spell_as_flags, spell_in_section
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.probes import online_probe, sample_for_probe
from mapet.models.backbone import load_backbone
from mapet.models.objectives import OBJECTIVES
from mapet.reports.render import format_number
from mapet.reports.run import RunFiles
from mapet.run_state import RunState
from mapet.tokenizers.tokenizer import load_tokenizer
from mapet.training.step import ForwardBackward
from mapet.training.tasks.pretraining import PretrainingTask, load_run
from tests.conftest import PRETRAIN, TINY, all_rows, save_crops
from tests.refused import refused

FIGURES = {
    "token_maps", "patches_by_code", "attention_mask", "predictions", "cls_attention", "features", "neighbors", "confusion", "step_through",
}  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def assert_identical(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_run_folder(run_dir, few_digits):
    assert {path.name for path in run_dir.iterdir()} == {
        "run.json",
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "backbone",
        "report.html",
    }
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [3, 6]
    assert metrics[-1]["loss"] < 2.9 and 0 <= metrics[-1]["data_time_fraction"] <= 1
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["lr"] == 0.001
    assert "torch" in (run_dir / "train.log").read_text()
    assert any((run_dir / "tensorboard").iterdir())


def test_backbone_is_the_trained_vit(run_dir):
    trained = {k.removeprefix("vit."): v for k, v in weights(run_dir).items() if k.startswith("vit.")}
    made = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=8, patch_size=2, in_chans=1, init_values=0.1, **TINY
    )
    made.load_state_dict(load_file(run_dir / "backbone" / "model.safetensors"), strict=True)
    assert all(torch.equal(value, trained[name]) for name, value in made.state_dict().items())


class StopAt:
    """Request a stop at a given step, as a signal does."""

    def __init__(self, monkeypatch, step):
        from mapet.training import trainer

        original = trainer.step_seed

        def seed(value, number):
            if number == step - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return original(value, number)

        monkeypatch.setattr(trainer, "step_seed", seed)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_interrupted_and_resumed_equals_uninterrupted(
    stop_at, run_dir, few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch
):
    options = {
        "images": few_digits,
        "tokenizer": tokenizer_dir,
        "tokens": tokens_dir,
        "out": tmp_path / "run",
    } | PRETRAIN
    with monkeypatch.context() as patch:
        StopAt(patch, stop_at)
        resume = f"mapet pretrain {tmp_path}/run/config.yaml --resume"
        with refused("SIGINT", f"step {stop_at} of 6", resume, kind=Interrupted):
            mapet.pretrain(**options)
    assert not (tmp_path / "run" / "backbone").exists()
    assert main(["pretrain", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0
    assert_identical(run_dir, tmp_path / "run")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6]


def test_a_run_that_ends_within_an_epoch(few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch, caplog):
    """5 steps of 3 per epoch: logged, probed and saved at the end, with a schedule of 5 steps; resumed exactly."""
    options = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir}
    options |= PRETRAIN | {"epochs": 1.7, "probe_every": 4, "warmup_epochs": 0, "min_lr": 1e-5}
    with caplog.at_level("INFO", "mapet"):
        mapet.pretrain(out=tmp_path / "whole", **options)
    assert "1.7 epochs" in caplog.text and "epoch 2 (2 of 3 steps): loss" in caplog.text
    with monkeypatch.context() as patch:
        StopAt(patch, 4)
        with pytest.raises(Interrupted):
            mapet.pretrain(out=tmp_path / "resumed", **options)
    mapet.pretrain(out=tmp_path / "resumed", resume=True, **options)
    assert_identical(tmp_path / "whole", tmp_path / "resumed")
    for run in ("whole", "resumed"):
        records = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        assert [(record["step"], "probe/knn" in record) for record in records] == [(3, False), (5, False), (5, True)]
        assert records[1]["epoch"] == 5 / 3
        last = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 4 / 5)) / 2
        assert records[1]["lr"] == pytest.approx(last)
        assert RunState.read(tmp_path / run).counts["total_steps"] == 5


def test_part_of_a_run_names_that_and_has_its_report(few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch):
    """`mapet run` is what resumes, with all that comes after; and there is one report, not an older one inside."""
    (tmp_path / "digits").mkdir()
    RunState(command="run").write(tmp_path / "digits")
    folder = tmp_path / "digits" / "pretrain"
    with monkeypatch.context() as patch:
        StopAt(patch, 3)
        with pytest.raises(Interrupted) as stopped:
            mapet.pretrain(images=few_digits, tokenizer=tokenizer_dir, tokens=tokens_dir, out=folder, **PRETRAIN)
    command = f"Resume with: mapet run {tmp_path / 'digits' / 'config.yaml'} --resume"
    assert str(stopped.value).endswith(command) and command in (folder / "train.log").read_text()
    assert RunFiles.open(tmp_path / "digits").status == "stopped by SIGINT at step 3 of 6, saved"
    assert (tmp_path / "digits" / "report.html").is_file() and not (folder / "report.html").exists()


def test_a_damaged_newest_checkpoint_falls_back(
    few_digits, tokenizer_dir, tokens_dir, run_dir, tmp_path, monkeypatch, caplog
):
    options = {
        "images": few_digits,
        "tokenizer": tokenizer_dir,
        "tokens": tokens_dir,
        "out": tmp_path / "run",
    } | PRETRAIN
    for step in (2, 4):
        with monkeypatch.context() as patch:
            StopAt(patch, step)
            with pytest.raises(Interrupted):
                mapet.pretrain(**options, resume=step > 2)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    mapet.pretrain(**options, resume=True)
    (message,) = [text for text in caplog.messages if "sha256" in text]
    assert "step-00000004" in message and "model.safetensors" in message
    assert_identical(run_dir, tmp_path / "run")


def test_init_from_starts_a_new_run_from_the_weights(run_dir, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    mapet.pretrain(
        images=few_digits, tokenizer=tokenizer_dir, tokens=tokens_dir, out=tmp_path / "run", init_from=run_dir,
        **(PRETRAIN | {"lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0, "epochs": 1}),
    )  # fmt: skip
    old, new = (load_file(run / "backbone" / "model.safetensors") for run in (run_dir, tmp_path / "run"))
    assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in old)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


@pytest.mark.parametrize("views", ["center", "center-flip", "random-crop"])
def test_stored_and_online_tokens_agree(views, crops, tmp_path):
    """Stored ids equal those that the online teacher gives for the student's view."""
    mapet.fit_tokenizer(images=crops, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=32)
    mapet.tokenize(images=crops, tokenizer=tmp_path / "t", out=tmp_path / "s", views=views)
    images, tokenizer = list_images(crops), load_tokenizer(tmp_path / "t")
    store = TokenStore.open(tmp_path / "s", images, tokenizer.hash)
    stored = ViewDataset(images, store.view_spec, image_size=(32, 32), teacher_size=(32, 32), store=store, seed=9)
    batch = stored.batch([(epoch, index) for epoch in range(6) for index in range(12)])
    assert torch.equal(batch.images, batch.teacher_images)
    assert torch.equal(tokenizer(batch.teacher_images).flatten(1), batch.targets)
    if views != "center":
        assert len(batch.images.flatten(1).unique(dim=0)) > 12


def test_online_and_stored_training_agree(few_digits, tokenizer_dir, run_dir, tmp_path, caplog):
    caplog.set_level("INFO", "mapet")
    """Centered views: a run with the teacher in the loop ends with the same weights as one with stored tokens."""
    mapet.pretrain(images=few_digits, tokenizer=tokenizer_dir, out=tmp_path / "run", **PRETRAIN)
    assert "without tokens the teacher runs in every step" in caplog.text
    assert_identical(run_dir, tmp_path / "run")


def test_interrupted_tokenize_resumes(crops, tmp_path, monkeypatch):
    mapet.fit_tokenizer(images=crops, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=32)
    options = {"images": crops, "tokenizer": tmp_path / "t"}
    monkeypatch.setattr("mapet.tokenizers.tokenization.inference_batch_size", lambda _: 3)
    whole = mapet.tokenize(out=tmp_path / "whole", **options)
    original = TokenShard.write

    def stop_at_six(shard, ids, unreadable):
        if shard.num_done == 6:
            raise KeyboardInterrupt
        original(shard, ids, unreadable)

    with monkeypatch.context() as patch:
        patch.setattr(TokenShard, "write", stop_at_six)
        with pytest.raises(KeyboardInterrupt):
            mapet.tokenize(out=tmp_path / "parts", **options)
    assert json.loads((tmp_path / "parts" / "shards" / "00000.json").read_text())["num_done"] == 6
    parts = mapet.tokenize(out=tmp_path / "parts", resume=True, **options)
    assert np.array_equal(all_rows(whole), all_rows(parts))


@pytest.mark.parametrize(("name", "to"), [("SIGINT", "group"), ("SIGTERM", "group"), ("SIGUSR1", "process")])
def test_signals_save_a_real_process(name, to, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    argv = [
        "pretrain",
        "--images",
        few_digits,
        "--tokenizer",
        tokenizer_dir,
        "--tokens",
        tokens_dir,
        "--out",
        tmp_path / "run",
    ]
    argv += ["--epochs", "10000", "--batch-size", "50", "--log-interval", "1", "--probe-every", "0"]
    argv += ["--model-args", "embed_dim=256", "depth=8", "num_heads=4"]  # a step takes longer than a process to die
    process = subprocess.Popen(
        [sys.executable, "-m", "mapet", *map(str, argv)], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"MAPET_WORKERS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    # As Ctrl-C and services do, to all processes: loader workers get it too.
    (os.killpg if to == "group" else os.kill)(process.pid, getattr(signal, name))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert f"stopped by {name}" in error and "Traceback" not in error
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/trainer_state.json"))


def test_evaluate_finetune_figures_export(run_dir, digits, tmp_path, few_digits):
    common = ["--images", str(digits / "train"), "--test-images", str(digits / "test")]
    backbones = [f"random:{run_dir}", str(run_dir)]
    assert main(["evaluate", "--backbone", *backbones, *common, "--protocols", "logistic", "knn"]) == 0
    accuracy = mapet.finetune(
        backbone=run_dir, images=digits / "train", test_images=digits / "test", epochs=8, batch_size=64, views="center", lr=3e-3, drop_path=0.0,
        out=tmp_path / "tuned",
    )  # fmt: skip
    assert accuracy > 0.3
    tuned = load_backbone(tmp_path / "tuned" / "model")
    assert tuned.num_classes == 10
    pyplot.switch_backend("svg")  # a notebook draws into itself
    figures = list(mapet.report(run=run_dir, figures_dir=tmp_path / "figures").iterdir())
    assert {path.stem for path in figures} == FIGURES
    assert matplotlib.get_backend() == "svg"
    assert all(path.stat().st_size > (5000 if path.suffix == ".png" else 1000) for path in figures)
    assert main(["export", "--backbone", str(run_dir), "--out", str(tmp_path / "export")]) == 0
    assert timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).embed_dim == 32


def test_finetuning_keeps_the_pretrained_norm(run_dir):
    """Mean pooling must keep the pre-trained final norm."""
    vit = load_backbone(run_dir, num_classes=10, global_pool="avg", fc_norm=False)
    saved = load_file(run_dir / "backbone" / "model.safetensors")
    assert torch.equal(vit.norm.weight, saved["norm.weight"])
    assert isinstance(vit.fc_norm, torch.nn.Identity)


def test_export_of_an_unfinished_run(few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch):
    StopAt(monkeypatch, 2)
    with pytest.raises(Interrupted):
        mapet.pretrain(images=few_digits, tokenizer=tokenizer_dir, tokens=tokens_dir, out=tmp_path / "run", **PRETRAIN)
    mapet.export(backbone=tmp_path / "run", out=tmp_path / "export")
    trained = weights(tmp_path / "run")
    assert torch.equal(load_backbone(tmp_path / "export").pos_embed, trained["vit.pos_embed"])


@pytest.mark.parametrize(
    ("size", "patch", "channels", "args", "ratio", "num_context"),
    [
        ((24, 40), 8, 3, {"reg_tokens": 2}, {"mask_ratio": 1.0}, 0),
        ((30, 20), 5, 1, {"class_token": False}, {"mask_ratio": 1 / 24}, 23),
        ((32, 32), 8, 6, {"no_embed_class": True}, {}, 4),
    ],
)
def test_any_size_channels_and_tokens(size, patch, channels, args, ratio, num_context, crops, photos, tmp_path):
    if channels == 6:  # bands that no file format of colors holds
        for path in crops.glob("*.png"):
            path.unlink()
        for number in range(8):
            bands = np.concatenate([photo[number * 20 : number * 20 + 40, 100:150] for photo in photos], axis=2)
            np.save(crops / f"{number}.npy", bands)
    common = {"images": crops}
    mapet.fit_tokenizer(
        out=tmp_path / "t", image_size=size, patch_size=patch, channels=channels, vocab_size=8, **common
    )
    mapet.tokenize(out=tmp_path / "s", tokenizer=tmp_path / "t", views="random-crop", **common)
    mapet.pretrain(
        tokenizer=tmp_path / "t", tokens=tmp_path / "s", out=tmp_path / "r", epochs=2, batch_size=4,
        model_args={"embed_dim": 16, "depth": 1, "num_heads": 2} | args, **ratio, **common,
    )  # fmt: skip
    assert load_run(tmp_path / "r").model.num_context == num_context
    vit = load_backbone(tmp_path / "r").eval()
    trained = weights(tmp_path / "r")
    assert torch.equal(vit.blocks[0].attn.qkv.weight, trained["vit.blocks.0.attn.qkv.weight"])
    assert vit.forward_features(torch.zeros(1, channels, *size)).isfinite().all()
    mapet.report(run=tmp_path / "r", figures_dir=tmp_path / "figures")


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "pim"},
        {"objective": "mim", "patch_order": "blockwise"},
        {"objective": "cae"},
        {"objective": "causal", "patch_order": "raster", "mask_ratio": 1.0},
        {"objective": "mapet_single_stream", "mask_ratio": 0.5, "num_predict": 3},
        {"objective": "mapet_content_ignores_masks", "separate_query_token": True},
        {"target": "pixels", "objective": "mim"},
        {"target": "features", "mask_ratio": (0.5, 0.9)},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_other_objectives_and_ablations_train(options, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    """The loss falls, and the run can be loaded and reported."""
    changed = PRETRAIN | {"epochs": 4, "lr": 3e-3} | options
    mapet.pretrain(images=few_digits, tokenizer=tokenizer_dir, tokens=tokens_dir, out=tmp_path / "run", **changed)
    metrics = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]
    figures = mapet.report(run=tmp_path / "run", figures_dir=tmp_path / "figures")
    assert (figures / "predictions.png").exists() == ("target" not in options)
    assert load_backbone(tmp_path / "run").embed_dim == 32


def test_blockwise_masks_are_drawn_for_the_number_of_masked_patches(few_digits, tokenizer_dir, tmp_path):
    """Blocks fill the mask of the ratio, or of the larger of two ratios."""
    for ratio, num_context in (((0.25, 0.25), 12), ((0.25, 0.75), 4)):
        options = PRETRAIN | {"patch_order": "blockwise", "mask_ratio": ratio}
        config = PretrainConfig(images=few_digits, tokenizer=tokenizer_dir, out=tmp_path, **options)
        task = PretrainingTask()
        task.build(config, ComputeContext.from_options("cpu", "float32"))
        assert (task.dataset.order, task.dataset.num_context) == ("blockwise", num_context)


def test_a_drawn_ratio_resumes_exactly(few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch):
    options = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "mask_ratio": (0.2, 0.9)}
    mapet.pretrain(out=tmp_path / "whole", **options, **PRETRAIN)
    with monkeypatch.context() as patch:
        StopAt(patch, 3)
        with pytest.raises(Interrupted):
            mapet.pretrain(out=tmp_path / "parts", **options, **PRETRAIN)
    assert main(["pretrain", str(tmp_path / "parts" / "config.yaml"), "--resume"]) == 0
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_runs_that_differ_in_objective_share_all_else(few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch):
    """Initial weights, images, jitter, views, their order, permutations, stochastic depth and tokens of every step."""
    seen = {}
    original = ForwardBackward.__call__

    def record(self, batch, *rest, **options):
        model = self.module.model
        steps = seen.setdefault(model.objective.name, [])
        if not steps:
            steps.append({key: value.clone() for key, value in model.state_dict().items()})
        steps.append(batch)
        return original(self, batch, *rest, **options)

    monkeypatch.setattr(ForwardBackward, "__call__", record)
    for objective in OBJECTIVES:
        options = PRETRAIN | {"objective": objective, "color_jitter": 0.4, "patch_order": "blockwise"}
        mapet.pretrain(
            images=few_digits, tokenizer=tokenizer_dir, tokens=tokens_dir, out=tmp_path / objective, **options
        )
    weights, *steps = seen.pop("mapet")
    for name, (others, *other_steps) in seen.items():
        assert len(steps) == len(other_steps) > 2
        for key, value in weights.items():
            assert torch.equal(value, others[key]), (name, key)
        for ours, expected in zip(steps, other_steps, strict=True):
            for key in ("images", "targets", "permutation"):
                assert torch.equal(getattr(ours, key), getattr(expected, key))
            of_vit = ours.drop_path_rand.shape[1]
            assert name == "cae" or expected.drop_path_rand.shape[1] == of_vit  # cae draws more, for its further blocks
            assert torch.equal(ours.drop_path_rand, expected.drop_path_rand[:, :of_vit])
            assert ours.num_context == expected.num_context is not None


def test_run_does_all_stages_and_resumes(digits, few_digits, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "mapet")
    monkeypatch.setattr("mapet.evaluation.logistic_regression.C_CANDIDATES", (0.01, 1.0))  # quicker
    argv = ["run", "--images", few_digits, "--test-images", digits / "test", "--out", tmp_path / "run"]
    argv += [
        "--fit-tokenizer.image-size",
        "8",
        "--fit-tokenizer.patch-size",
        "2",
        "--fit-tokenizer.channels",
        "1",
        "--fit-tokenizer.vocab-size",
        "16",
    ]
    argv += [
        "--pretrain.epochs",
        "2",
        "--pretrain.model-args",
        "embed_dim=16",
        "depth=1",
        "num_heads=1",
        "--pretrain.batch-size",
        "100",
        "--pretrain.pool",
        "2x2",
        "--pretrain.probe-every",
        "2",
    ]
    argv = [str(arg) for arg in argv]
    with monkeypatch.context() as patch:
        StopAt(patch, 4)
        assert main(argv) == 130
    assert main([*argv, "--resume"]) == 0
    evaluation = RunState.read(tmp_path / "run").results["evaluation"]
    assert evaluation["data"]["test_images"] == 360 and evaluation["features"] == "pool 2x2, layers -1"
    assert {*evaluation["controls"]} == {"raw pixels", "HOG features", "k-means patch features", "teacher", "tokens"}
    everything = {"untrained": evaluation["untrained"], **evaluation["controls"]}
    best = max(everything, key=lambda name: everything[name]["logistic"])
    verdict = evaluation["verdicts"][0]
    assert (verdict["backbone"], verdict["metric"], verdict["control"]) == ("pretrained", "logistic", best)
    assert verdict["control_value"] == everything[best]["logistic"] and not verdict["is_ahead"]
    recorded = RunState.read(tmp_path / "run").results["verdict"]
    text = (tmp_path / "run" / "report.html").read_text()
    assert recorded["sentence"] in text and recorded["sentence"] in caplog.text
    assert f"linear probe {evaluation['pretrained']['logistic']:.3f} on 360 test images" in recorded["sentence"]
    assert {row[0] for row in recorded["table"][2:]} == everything.keys()
    # One number of each probe: the same in the terminal and run.json (above), the report and the model card.
    assert "(held-out part of the training images)" not in text
    mapet.export(backbone=str(tmp_path / "run"), out=tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    for name in ("logistic", "knn"):
        number = format_number(evaluation["pretrained"][name])
        assert re.findall(rf">{name}, pretrained</th><td>([^<]*)<", text) == [number]
        assert re.findall(rf"pretrained, {name} \| (\S+) \|", card) == [number]
        assert f"probe/{name}" not in card
    sets, compute = (
        sample_for_probe(LabeledSet.from_images(list_images(few_digits))),
        ComputeContext.from_options("cpu"),
    )
    result = [json.loads(line) for line in (tmp_path / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    online = online_probe(load_backbone(tmp_path / "run"), *sets, compute, pool="2x2")
    assert {name: result[-1][name] for name in online} == online
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} == FIGURES
    assert main([*argv, "--resume", "--seed", "7"]) == 2
    assert main(["run", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0


def test_a_run_that_was_moved_has_its_own_tokenizer(digits, tmp_path, monkeypatch):
    """Its config has relative paths, where another run may be now; its images move too; and the run resumes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits / "test", tmp_path / "images")
    small = {"model_args": {"embed_dim": 16, "depth": 1, "num_heads": 1}, "epochs": 1, "probe_every": 0}
    fit_options = {"image_size": 8, "patch_size": 2, "channels": 1}
    options = {"pretrain": small, "device": "cpu"}
    for moved, vocab_size in (("a", 16), ("b", 12)):
        mapet.run(images="images", out="run", fit_tokenizer=fit_options | {"vocab_size": vocab_size}, **options)
        Path("run").rename(moved)
    mapet.run(images="images", out="run", fit_tokenizer=fit_options | {"vocab_size": 12}, seed=1, **options)
    for name, vocab_size in (("a", 16), ("b", 12), ("run", 12)):
        run = load_run(Path(name))
        assert (
            run.tokenizer.vocab_size == vocab_size
            and run.tokenizer.hash == load_tokenizer(Path(name, "tokenizer")).hash
        )
        assert RunFiles.open(Path(name)).tokenizer["hash"] == run.tokenizer.hash
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_run(tmp_path / "run").config.images == str(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    Path("images").rename("photos")
    with spell_as_flags(), refused("--out a"):
        run_command("run", ["a/config.yaml", "--resume"])
    shutil.rmtree("a/pretrain/backbone")  # as if it had been stopped just before
    run_command("run", ["a/config.yaml", "--resume", "--out", "a", "--images", "photos"])
    recipes = [yaml.safe_load(Path("a", name).read_text()) for name in ("config.yaml", "pretrain/config.yaml")]
    assert [(recipe["images"], recipe["out"]) for recipe in recipes] == [("photos", "a"), ("photos", "a/pretrain")]
    assert recipes[1]["tokenizer"] == "a/tokenizer" and recipes[1]["tokens"] == "a/tokens"
    with refused("images", "photos"):
        run_command("run", ["a/config.yaml", "--resume", "--images", str(digits / "train")])


@pytest.mark.parametrize("wrong", [{"layers": (2,)}, {"pool": "cls", "model_args": TINY | {"class_token": False}}])
def test_features_of_probes_that_the_vit_lacks_are_refused_at_once(
    wrong, few_digits, tokenizer_dir, tokens_dir, tmp_path
):
    options = PRETRAIN | wrong | {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir}
    with refused(field=next(iter(wrong))):
        mapet.pretrain(out=tmp_path / "out", **options)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_tokenizer_or_images_that_were_exchanged_are_refused(
    few_digits, digits, tokenizer_dir, tmp_path, monkeypatch
):
    """Without stored tokens, checkpoints alone bind a run to its tokenizer and images."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, tokenizer)
    options = {"images": few_digits, "tokenizer": tokenizer, "out": tmp_path / "run", **PRETRAIN}
    with monkeypatch.context() as patch:
        StopAt(patch, 3)
        with pytest.raises(Interrupted):
            mapet.pretrain(**options)
    with refused("images"):
        mapet.pretrain(**options | {"images": digits / "test"}, resume=True)
    shutil.rmtree(tokenizer)
    mapet.fit_tokenizer(images=few_digits, out=tokenizer, image_size=8, patch_size=2, channels=1, vocab_size=16, seed=5)
    for again in (lambda: mapet.pretrain(**options, resume=True), lambda: load_run(tmp_path / "run")):
        with refused("tokenizer"):
            again()


def test_an_option_is_spelled_where_the_user_is():
    """lr in Python, --lr on the command line, --pretrain.lr in a section of `run`, whose own options keep their names."""
    assert (option("lr"), option("image_size", 32, 32), option("resume", True)) == (
        "lr",
        "image_size=(32, 32)",
        "resume=True",
    )
    with spell_as_flags():
        assert (option("lr"), option("image_size", 32, 32), option("resume", True)) == (
            "--lr",
            "--image-size 32 32",
            "--resume",
        )
        with spell_in_section("pretrain", RunConfig.model_fields):
            assert (option("mask_ratio"), option("max_unreadable")) == ("--pretrain.mask-ratio", "--max-unreadable")
    assert option("lr") == "lr"


def test_run_of_unlabeled_images_that_are_no_files(photos, tmp_path):
    """Its report shows images of a prepared set, and their names."""
    made = mapet.prepare(images=save_crops(photos, tmp_path / "photos", 20, size=(32, 32)), out=tmp_path / "prepared")
    small = {"model_args": TINY, "epochs": 1, "batch_size": 10}
    mapet.run(
        images=made, out=tmp_path / "run", device="cpu", pretrain=small,
        fit_tokenizer={"image_size": 32, "patch_size": 8, "vocab_size": 8},
    )  # fmt: skip
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} == FIGURES - {"confusion"}
    steps = json.loads((tmp_path / "run" / "figures" / "step_through.json").read_text())
    assert steps["images"][0]["name"] in os.listdir(tmp_path / "photos")
    assert steps["images"][0]["src"] in (tmp_path / "run" / "report.html").read_text()


def test_an_interrupted_demo_resumes(tmp_path, monkeypatch, capsys):
    from mapet import commands
    from mapet.commands import pipeline

    quick = {"model_args": {"embed_dim": 16, "depth": 1, "num_heads": 1}, "epochs": 1, "batch_size": 256}
    monkeypatch.setitem(pipeline.DEMO_CONFIG, "pretrain", quick)
    monkeypatch.setattr(commands, "finetune", lambda **_: 0.5)
    argv = ["demo", "--out", str(tmp_path / "demo")]
    with monkeypatch.context() as patch:
        StopAt(patch, 2)
        assert main(argv) == 130
    assert f"Resume with: mapet {' '.join(argv)} --resume" in capsys.readouterr().err
    assert main(argv) == 2 and "resume with --resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    results = RunState.read(tmp_path / "demo").results
    assert results["pretrained"]["finetune"] == 0.5 and results["pretrained"]["logistic"] > 0.2


def test_bfloat16_is_used_and_agrees_with_float32(few_digits, tokenizer_dir, tokens_dir, run_dir, tmp_path):
    options = {
        "images": few_digits,
        "tokenizer": tokenizer_dir,
        "tokens": tokens_dir,
        "out": tmp_path / "run",
    } | PRETRAIN
    mapet.pretrain(**(options | {"precision": "bfloat16"}))
    losses = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in (run_dir, tmp_path / "run")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_automatic_values_are_recorded_and_kept_on_resume(few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch):
    """Automatic values of memory and cores at the start are kept on resume."""
    automatic = {key: value for key, value in PRETRAIN.items() if key not in ("batch_size", "lr", "log_interval")}
    options = {
        "images": few_digits,
        "tokenizer": tokenizer_dir,
        "tokens": tokens_dir,
        "out": tmp_path / "run",
    } | automatic
    with monkeypatch.context() as patch:
        StopAt(patch, 2)
        with pytest.raises(Interrupted):
            mapet.pretrain(**options)
    first = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (first["batch_size"], first["mask_ratio"]) == (16, [0.75, 0.75])
    model = load_run(tmp_path / "run").model
    assert (model.num_context, model.vit.patch_embed.img_size) == (4, (8, 8))
    monkeypatch.setattr("mapet.training.tasks.pretraining.auto_batch_size", lambda *_: 3)
    mapet.pretrain(**options, resume=True)
    steps = -(-288 // 16) * 2
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}").exists()


def test_a_non_finite_loss_stops_the_run(few_digits, tokenizer_dir, tokens_dir, tmp_path):
    options = {
        "images": few_digits,
        "tokenizer": tokenizer_dir,
        "tokens": tokens_dir,
        "out": tmp_path / "run",
    } | PRETRAIN
    with refused("mapet debug-step", "step-00000002", "lr"):
        mapet.pretrain(**(options | {"lr": 1e30, "clip_grad": None}))
    assert not (tmp_path / "run" / "backbone").exists()


def test_a_run_whose_weights_give_no_numbers_writes_no_backbone(
    few_digits, tokenizer_dir, tokens_dir, tmp_path, caplog
):
    """Too few steps for `MAX_SKIPPED_STEPS`: the folder stays readable, resuming says the same, and the report is written."""
    run = tmp_path / "run"
    given = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "out": run}
    options = given | PRETRAIN | {"epochs": 1, "batch_size": 96, "lr": 1e30, "clip_grad": None, "probe_every": 1}
    for resume in (False, True):
        with refused("mapet debug-step ", "lr") as error:
            mapet.pretrain(**options, resume=resume)
    assert not (run / "backbone").exists() and (run / "report.html").exists()
    assert "not evaluated after epoch 1" in caplog.text
    looks = mapet.debug_step(bundle=re.search(r"mapet debug-step (\S+)\. ", str(error.value))[1])
    assert all(math.isnan(look.loss) for look in looks)
    with refused("precision", "float32"):
        mapet.report(run=run, figures_dir=tmp_path / "figures")
    assert mapet.report(run=run, out=tmp_path / "report.html").exists()
    assert "no new figures" in caplog.text


def test_a_batch_larger_than_all_images(few_digits, tokenizer_dir, tokens_dir, tmp_path, caplog):
    """Every step has all of them, and the learning rate is that of so many."""
    given = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "out": tmp_path / "run"}
    mapet.pretrain(**given | PRETRAIN | {"epochs": 1, "batch_size": 2048, "lr": None})
    recipe = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recipe["batch_size"] == 2048 and recipe["lr"] == pytest.approx(1.5e-3 * (288 / 2048) ** 0.5)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and last["lr"] == recipe["lr"]  # the only step's, no warm-up
    assert "batch_size 2,048 is more than the 288 images" in caplog.text
    assert "Cosine annealing" not in caplog.text


def test_a_small_learning_rate_never_rises(few_digits, tokenizer_dir, tokens_dir, tmp_path):
    """A learning rate below `min_lr` is constant after the warm-up."""
    given = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "out": tmp_path / "run"}
    mapet.pretrain(**given | PRETRAIN | {"lr": 5e-7, "log_interval": 1, "warmup_epochs": 0.5, "min_lr": 1e-5})
    rates = [json.loads(line).get("lr", 0) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(rates) == pytest.approx(5e-7) == rates[-1]


def test_learns_what_can_be_learned(digits, tmp_path):
    """A few epochs on real digits: far better than the majority and unigram baselines."""
    mapet.fit_tokenizer(
        images=digits / "train", out=tmp_path / "t", image_size=8, patch_size=2, channels=1, vocab_size=64
    )
    mapet.pretrain(
        images=digits / "train", tokenizer=tmp_path / "t", out=tmp_path / "run", model_args={"embed_dim": 64, "depth": 2, "num_heads": 2},
        epochs=8, batch_size=64, lr=2e-3, probe_every=0, drop_path=0.0, color_jitter=0.0,
    )  # fmt: skip
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] < last["unigram_entropy"] - 0.7
    assert last["token_accuracy"] > last["majority_token_accuracy"] + 0.02
