"""Runs resume bit-exact whatever happens: kills, signals, several processes, numbers and memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mapet
from mapet.cli import main
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.errors import Interrupted, MapetError
from mapet.files import read_checksummed_json, write_checksummed_json
from mapet.run_state import RunState
from mapet.training import trainer
from mapet.training.metrics import MIN_HISTORY, LossMonitor, MetricWindow
from mapet.training.tasks.pretraining import PretrainingTask
from tests.commands.test_pipeline import StopAt
from tests.conftest import PRETRAIN, all_rows
from tests.refused import fails, refused

ROOT = Path(__file__).parents[2]
TIMES = ("images_per_second", "data_time_fraction")


@pytest.fixture
def options(few_digits, tokenizer_dir, tokens_dir, tmp_path):
    """Of a run of 6 steps."""
    return {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "out": tmp_path / "run"} | PRETRAIN


def to_argv(options, **more):
    """The command line of these options."""
    argv = ["pretrain"]
    for name, value in (options | more).items():
        values = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [value]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return argv


def run(argv, processes=1, code=0, seed_environment=None):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    result = subprocess.run(
        [sys.executable, *launch, "-m", "mapet", *argv], capture_output=True, text=True, cwd=ROOT, timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    return result.stderr


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def newest(folder):
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {file.name: load_file(file) for file in newest.glob("*.safetensors")}


def assert_identical(a, b):
    first, second = newest(a), newest(b)
    assert first.keys() == second.keys() == {"model.safetensors", "optimizer.safetensors", "metrics_state.safetensors"}
    for file, tensors in first.items():
        assert tensors.keys() == second[file].keys()
        assert all(torch.equal(tensors[name], second[file][name]) for name in tensors), file
    assert metrics(a) == metrics(b)


def run_with_kills(argv, seed, kills, seconds):
    """Run a command to its end, killed `kills` times after up to so many random seconds."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.crash", *map(str, (seed, kills, seconds)), *argv], capture_output=True,
        text=True, cwd=ROOT, timeout=550, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])["killed"]


@pytest.mark.parametrize(("seed", "kills"), [(0, 4), pytest.param(1, 60, marks=pytest.mark.slow)])
def test_killed_at_random_moments(seed, kills, options, tmp_path):
    """A checkpoint after every step: many kills fall into writing one. The result is bit-exact."""
    options |= {"epochs": 10 * kills, "checkpoint_interval_min": 1e-9, "drop_path": 0.3}
    whole = to_argv(options | {"out": tmp_path / "whole", "checkpoint_interval_min": 10})
    assert run_with_kills(whole, seed, 0, 0) == 0
    survived = run_with_kills([*to_argv(options), "--resume"], seed, kills, 1.5)
    assert survived == kills
    assert_identical(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_writes_the_same_metrics(stop_at, options, run_dir, monkeypatch):
    with monkeypatch.context() as patch:
        StopAt(patch, stop_at)
        with pytest.raises(Interrupted):
            mapet.pretrain(**options)
    mapet.pretrain(**options, resume=True)
    assert_identical(run_dir, options["out"])


def test_resuming_what_was_never_begun_starts_it(options, run_dir, capsys):
    assert main([*to_argv(options), "--resume"]) == 0
    assert_identical(run_dir, options["out"])
    (options["out"] / "config.yaml").unlink()
    fails(capsys, *to_argv(options), "--resume", named=[options["out"], "config.yaml"])


# ---- tokenizers and tokens


def tokenizing(images, out, **more):
    options = {"images": images, "out": out, "image_size": 32, "patch_size": 4, "vocab_size": 64}
    return ["fit-tokenizer", *to_argv(options | {"kmeans_iters": 40, "precision": "float32"} | more)[1:]]


def naming(images, tokenizer, out, **more):
    options = {"images": images, "tokenizer": tokenizer, "out": out} | more
    return ["tokenize", *to_argv(options)[1:]]


def files(folder):
    """All but run.json, which has times and processes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_tokenizer_killed_at_random_moments(kills, crops, tmp_path):
    argv = tokenizing(crops, tmp_path / "whole", kmeans_iters=1500)
    run(argv)
    argv[argv.index(str(tmp_path / "whole"))] = str(tmp_path / "parts")
    assert run_with_kills([*argv, "--resume"], 1, kills, 0.6) == kills
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert not list(tmp_path.rglob("*.kmeans.safetensors"))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_tokens_killed_at_random_moments(kills, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    argv = naming(few_digits, tokenizer_dir, tmp_path / "pieces")
    assert run_with_kills([*argv, "--resume"], 2, kills, 0.25) == kills
    assert files(tokens_dir) == files(tmp_path / "pieces")


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_fine_tuning_killed_at_random_moments(kills, run_dir, digits, tmp_path):
    options = {"backbone": run_dir, "images": digits / "test", "test_images": digits / "test", "labels_per_class": 3}
    options |= {"epochs": 10 * kills, "batch_size": 10, "ema_decay": 0.9, "drop_path": 0.3}
    recipe = tmp_path / "often.yaml"
    recipe.write_text("checkpoint_interval_min: 1.0e-9\n")
    argv = {
        name: ["finetune", str(recipe), *to_argv(options | {"out": tmp_path / name})[1:]] for name in ("whole", "parts")
    }
    assert run_with_kills(argv["whole"], 3, 0, 0) == 0
    assert run_with_kills([*argv["parts"], "--resume"], 3, kills, 1.5) == kills
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in argv]
    whole, parts = (RunState.read(tmp_path / name) for name in argv)
    for state in (whole, parts):
        state.counts.pop("warnings", None)  # each session warns of a busy machine
    assert weights[0] == weights[1] and whole.counts == parts.counts
    assert whole.results | {"provenance": 0} == parts.results | {"provenance": 0}  # that has the name of the folder


PARTS_OF_FIVE = "import sys, mapet.data.token_store as t; t.SHARD_SIZE = 5; from mapet.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("quantizer", [[], pytest.param(["--pca-dim", "8"], marks=pytest.mark.slow),
                                       pytest.param(["--quantizer", "lfq"], marks=pytest.mark.slow)])  # fmt: skip
def test_two_processes_make_the_tokenizer_and_tokens_of_one(quantizer, crops, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        argv = [*tokenizing(crops, tmp_path / name), *quantizer]
        if "lfq" in quantizer:  # which fits nothing
            place = argv.index("--kmeans-iters")
            del argv[place : place + 2]
        run(argv, processes)
    one, two = (load_file(tmp_path / name / "codebook.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and one["usage"].sum() == two["usage"].sum() == 12 * 64
    assert (one["usage"] - two["usage"]).abs().sum() <= 12  # another order of sums: a patch may change its code
    descriptions = [
        json.loads((tmp_path / name / "visual_tokenizer.json").read_text())["codebook_stats"] for name in ("one", "two")
    ]
    stats = [
        {name: value for name, value in one.items() if value is not None} for one in descriptions
    ]  # lfq has no error
    assert descriptions[0].keys() == descriptions[1].keys() and stats[1] == pytest.approx(stats[0], rel=0.01)
    whole = mapet.tokenize(images=crops, tokenizer=tmp_path / "one", out=tmp_path / "whole")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable]
    subprocess.run([*launch, "-c", PARTS_OF_FIVE, *naming(crops, tmp_path / "one", tmp_path / "shared")], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, timeout=300)  # fmt: skip
    store = TokenStore.open(tmp_path / "shared", list_images(crops))
    assert len(store.shards) == 3 and store.num_done == len(store)
    assert (all_rows(store) == all_rows(whole)).all()


# ---- several processes


@pytest.mark.parametrize(
    ("shard", "objective"),
    [(False, "mapet"), *(pytest.param(True, name, marks=pytest.mark.slow) for name in ("mapet", "cae"))],
)
def test_two_processes_learn_what_one_does(shard, objective, options, tmp_path):
    """At the same global batch the losses are equal but for rounding, stochastic depth included, sharded or not."""
    options |= {"drop_path": 0.3, "log_interval": 1, "objective": objective}
    mapet.pretrain(**options)
    argv = to_argv(options | {"out": tmp_path / "two", "micro_batch_size": 20})
    run([*argv, *(["--fsdp"] if shard else [])], processes=2)
    one, two = metrics(tmp_path / "run"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for ours, expected in zip(one, two, strict=True):
        assert expected == pytest.approx(ours, rel=1e-5)
    a, b = newest(tmp_path / "run")["model.safetensors"], newest(tmp_path / "two")["model.safetensors"]
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_one_two_one(shard, options, tmp_path):
    """Stopped on one process, resumed on two, stopped, finished on one."""
    options |= {"drop_path": 0.3, "epochs": 60, "log_interval": 1}
    mapet.pretrain(**(options | {"out": tmp_path / "whole"}))
    for processes in (1, 2):
        sharded = ["--fsdp"] if shard and processes > 1 else []
        stop_after(3, [*to_argv(options), "--resume", *sharded], processes, options["out"])
    stopped = len(metrics(options["out"]))
    assert 6 <= stopped < 180
    run([*to_argv(options), "--resume"])
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert len(parts) == 180
    for ours, expected in zip(whole, parts, strict=True):
        assert expected["loss"] == pytest.approx(ours["loss"], rel=1e-3)


def stop_after(steps, argv, processes, folder):
    """Start a run, and send SIGTERM when it has made so many steps."""
    before = len(metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launch, "-m", "mapet", *argv], stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= before + steps)
    process.terminate()
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("Resume with: mapet pretrain") == 1, error


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_one_of_two_processes_is_killed(options, tmp_path):
    """All stop, and the run resumes."""
    options |= {"epochs": 3000, "log_interval": 1, "checkpoint_interval_min": 1e-9}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mapet", *to_argv(options)],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*/trainer_state.json")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in error or "exitcode  : -9" in error
    done = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    stop_after(1, [*to_argv(options), "--resume"], 2, tmp_path / "run")
    assert sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] > done


# ---- NaN and Inf


def poisoned(monkeypatch, steps):
    """Let the images of these steps (counted from 0) be NaN."""
    original = PretrainingTask.prepare

    def prepare(self, batch, step):
        made = original(self, batch, step)
        return replace(made, images=made.images * torch.nan) if step in steps else made

    monkeypatch.setattr(PretrainingTask, "prepare", prepare)


def test_a_non_finite_step_is_skipped(options, monkeypatch, caplog):
    """The other steps are made; metrics are theirs."""
    with monkeypatch.context() as patch:
        poisoned(patch, {1, 3})
        mapet.pretrain(**options)
    lines = metrics(options["out"])
    assert lines[-1]["skipped_steps"] == 2 and all(line["loss"] > 0 for line in lines)
    assert all(value.isfinite().all() for value in newest(options["out"])["model.safetensors"].values())
    assert [r.message.split(":")[0] for r in caplog.records if "skipped" in r.message] == [
        "step 2 skipped, weights unchanged", "step 4 skipped, weights unchanged"]  # fmt: skip
    assert "train/few.txt" not in caplog.text and ".png' (inf)" in caplog.text


def test_weights_of_a_run_with_a_skipped_step(options, monkeypatch, tmp_path):
    """A skipped step leaves the optimizer unchanged: the step after is Adam's first."""
    poisoned(monkeypatch, {0, 1, 2, 3, 4})
    monkeypatch.setattr(trainer, "MAX_SKIPPED_STEPS", 6)
    mapet.pretrain(**options)
    moments = newest(options["out"])["optimizer.safetensors"]
    assert {float(value) for name, value in moments.items() if name.endswith("/step")} == {1.0}


def test_after_a_few_in_a_row_the_run_stops_and_can_be_looked_at(options, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        poisoned(patch, {2, 3, 4})
        patch.setattr(trainer, "MAX_SKIPPED_STEPS", 2)
        with refused("mapet debug-step") as error:
            mapet.pretrain(**(options | {"log_interval": 1}))
        bundle = options["out"] / "debug" / "step-00000003"
        assert str(bundle) in str(error.value)
        looks = mapet.debug_step(bundle=bundle)
        assert [look.step for look in looks] == [3, 4]
        assert looks[0].module == "vit.patch_embed.proj" and "head.weight" in looks[0].parameters
        assert not torch.tensor(looks[0].loss).isfinite()
    looks = mapet.debug_step(bundle=bundle)  # without the NaN images
    assert all(look.module == "" and look.parameters == [] and look.norm > 0 for look in looks)
    assert [loss for _, loss in looks[0].losses] == sorted((loss for _, loss in looks[0].losses), reverse=True)
    named = json.loads((bundle / "bundle.json").read_text())["images"]["3"]
    assert {name for name, _ in looks[0].losses} == set(named) and len(named) == 96
    assert "largest losses" in caplog.text


def test_damaged_and_foreign_bundles(options, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        poisoned(patch, range(6))
        with pytest.raises(MapetError):
            mapet.pretrain(**options)
    bundle = next((options["out"] / "debug").iterdir())
    with refused("run"):
        mapet.debug_step(bundle=tmp_path)
    with refused(bundle):
        mapet.debug_step(bundle=options["out"])
    content = read_checksummed_json(bundle / "bundle.json", "debug bundle")
    write_checksummed_json(bundle / "bundle.json", content | {"images": {"1": ["other.png"]}})
    with refused("step 1"):
        mapet.debug_step(bundle=bundle)
    (bundle / "model.safetensors").write_bytes(b"x" * 100)
    with refused(bundle):
        mapet.debug_step(bundle=bundle)


def test_roll_back(options, monkeypatch, caplog):
    """Rolled back to the last checkpoint, continued with the next images to the end."""
    poisoned(monkeypatch, {3, 4})
    monkeypatch.setattr(trainer, "MAX_SKIPPED_STEPS", 2)
    mapet.pretrain(**(options | {"log_interval": 1, "max_rollbacks": 1, "checkpoint_interval_min": 1e-9}))
    (message,) = (text for text in caplog.messages if text.startswith("rolled back"))
    assert "step 3" in message and "step 6" in message
    state = json.loads((options["out"] / "checkpoints" / "step-00000006" / "trainer_state.json").read_text())
    assert state["num_rollbacks"] == 1 and (options["out"] / "backbone").exists()


def test_spikes_are_logged_with_their_images(few_digits, caplog):
    watch = LossMonitor(list_images(few_digits))
    images = (torch.tensor([7, 8, 9]), torch.tensor([1.0, 30.0, 2.0]))
    usual = [2.0 + 0.01 * (step % 5) for step in range(MIN_HISTORY)]
    watch.update(MetricWindow({}, [*usual, 2.05, 9.0], [images] * (MIN_HISTORY + 2)), last_step=MIN_HISTORY + 2)
    spikes = [record.message for record in caplog.records]
    assert len(spikes) == 1
    assert f"loss spike at step {MIN_HISTORY + 2}: 9.000, median 2.02" in spikes[0]
    assert f"largest losses: '{watch.images.id(8)}' (30)" in spikes[0]


# ---- memory, workers, disk


def test_out_of_memory_halves_the_micro_batch(options, monkeypatch, caplog, run_dir):
    """The gradient stays that of the batch; a resumed run keeps the micro-batch that fitted."""
    from mapet.models.pretraining import ViTForPreTraining

    original = ViTForPreTraining.encode

    def encode(self, batch):
        if len(batch) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    monkeypatch.setattr(ViTForPreTraining, "encode", encode)
    with monkeypatch.context() as patch:
        StopAt(patch, 2)
        with pytest.raises(Interrupted):
            mapet.pretrain(**(options | {"micro_batch_size": 50}))
    mapet.pretrain(**options, resume=True)
    assert "out of memory with 50 images at a time: continuing with micro_batch_size 25" in caplog.text
    assert caplog.text.count("out of memory") == 2  # 50 and 25, not again after resuming
    for ours, expected in zip(metrics(run_dir), metrics(options["out"]), strict=True):
        assert expected == pytest.approx(ours, rel=1e-4)


def test_not_even_one_image_fits(options, monkeypatch):
    from mapet.models.pretraining import ViTForPreTraining

    def encode(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(ViTForPreTraining, "encode", encode)
    with refused("out of memory"):
        mapet.pretrain(**options)


def test_a_dead_worker_is_reported_as_such(options, monkeypatch):
    from mapet.data.dataset import ViewDataset

    def die(self, positions):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ViewDataset, "batch", die)
    monkeypatch.setenv("MAPET_WORKERS", "1")
    with refused("MAPET_WORKERS", "resume=True"):
        mapet.pretrain(**options)


def test_a_full_disk_leaves_the_last_checkpoint(options, monkeypatch):
    import errno

    import mapet.training.checkpoint as checkpoint

    with monkeypatch.context() as patch:
        StopAt(patch, 2)
        with pytest.raises(Interrupted):
            mapet.pretrain(**options)

    def full(path, tensors, metadata=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.files, "write_tensors", full)
        with refused(os.strerror(errno.ENOSPC), " bytes", "step-00000002", "resume=True"):
            mapet.pretrain(**options, resume=True)
    mapet.pretrain(**options, resume=True)


def test_what_the_disk_garbles_is_noticed(options, monkeypatch):
    import mapet.training.checkpoint as checkpoint

    original = checkpoint.files.write_tensors

    def garbled(path, tensors, metadata=None):
        original(path, {name: value + 1 if name == "head.bias" else value for name, value in tensors.items()})

    monkeypatch.setattr(checkpoint.files, "write_tensors", garbled)
    with refused("head.bias"):
        mapet.pretrain(**options)
    assert not list((options["out"] / "checkpoints").glob("*"))


# ---- damaged checkpoints, and images that have changed


def damage(checkpoint):
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")


@pytest.mark.parametrize("steps", [[2], [4, 6]])
def test_damaged_newer_checkpoints_do_not_outlive_the_last_good_one(steps, options, run_dir, monkeypatch, caplog):
    """The final one is written again; with one checkpoint kept, the good one is not removed in favor of the damaged."""
    monkeypatch.setattr(trainer, "KEEP_CHECKPOINTS", 9)
    mapet.pretrain(**options | {"checkpoint_interval_min": 1e-9})
    shutil.rmtree(options["out"] / "backbone")
    saved = options["out"] / "checkpoints"
    for checkpoint in saved.iterdir():
        if int(checkpoint.name[5:]) >= steps[0]:
            damage(checkpoint)
    monkeypatch.setattr(trainer, "KEEP_CHECKPOINTS", 1)
    with monkeypatch.context() as patch:
        StopAt(patch, steps[0])
        with pytest.raises(Interrupted):
            mapet.pretrain(**options | {"checkpoint_interval_min": 1e-9}, resume=True)
    assert [checkpoint.name for checkpoint in saved.iterdir()] == [f"step-{steps[0]:08d}"]
    mapet.pretrain(**options, resume=True)
    assert_identical(run_dir, options["out"])
    assert f"step-{steps[0]:08d} is removed" in caplog.text


@pytest.mark.parametrize("command", ["finetune", "train_tokenizer", "pretrain"])
def test_images_with_other_contents_are_not_resumed(command, options, run_dir, digits, tmp_path, monkeypatch):
    """Names and sizes stay as they were, as of bitmaps of one size."""
    images = tmp_path / "images"
    for path in sorted((digits / "test").rglob("*.png"))[::6]:
        target = images / path.parent.name / f"{path.stem}.bmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(target)
    given = {"images": images, "out": tmp_path / "run", "epochs": 2, "batch_size": 10, "device": "cpu"}
    given |= {
        "finetune": {"backbone": run_dir, "test_images": images, "views": "center"},
        "train_tokenizer": {"image_size": 8, "patch_size": 2, "channels": 1, "vocab_size": 8, "model_args": TINY_VQKD},
        "pretrain": {"tokenizer": options["tokenizer"], "model_args": options["model_args"], "probe_every": 0},
    }[command]
    call = getattr(mapet, command)
    with monkeypatch.context() as patch:
        StopAt(patch, 2)
        with pytest.raises(Interrupted):
            call(**given)
    changed = sorted(images.rglob("*.bmp"))[0]
    data = bytearray(changed.read_bytes())
    data[-8:] = bytes(8 * [255])
    changed.write_bytes(data)
    with refused("image_contents", tmp_path / "run"):
        call(**given, resume=True)


TINY_VQKD = {"embed_dim": 64, "depth": 1, "num_heads": 1}
