"""A time budget: the steps that fit, corrections that change no learning rate of the past, the time before a kill."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mapet
from mapet.cli import main
from mapet.config.base import build_config
from mapet.config.pipeline import RunConfig
from mapet.run_state import RunState, elapsed_seconds, run_state
from mapet.training.step import ConstantLRScheduler, create_scheduler
from mapet.training.time_budget import fit_steps
from tests.conftest import PRETRAIN
from tests.refused import refused

BUDGET = {"schedule": "constant", "warmup_epochs": 0.5}


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    """One thread: on a busy machine the time of a step varies with several."""
    torch.set_num_threads(1)


def rates(total: int, warmup: int, change_at: int = -1, new_total: int = 0) -> list[float]:
    """Learning rates of all steps, with the number of steps changed before one of them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = create_scheduler(optimizer, total, warmup, 0.5, "constant")
    result = []
    for step in range(max(total, new_total)):
        if step == change_at:
            schedule.total_steps = new_total
        schedule.step_update(step)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_constant_then_decay_against_its_definition():
    """Linear to the peak, constant, then peak - (peak - min) sqrt(fraction of the last fifth): arXiv 2405.18392, equation 1."""
    result = rates(100, 10)
    assert result[0] == pytest.approx(1e-6) and result[5] == pytest.approx(1.0, abs=1e-5)
    assert result[10:81] == [2.0] * 71
    assert result[81:] == pytest.approx([2.0 - 1.5 * ((step - 80) / 20) ** 0.5 for step in range(81, 100)])


@pytest.mark.parametrize(("total", "step", "new_total"), [(50, 30, 200), (200, 60, 90), (20, 15, 19), (3, 1, 40)])
def test_a_correction_in_time_gives_the_rates_of_the_same_steps_from_the_start(total, step, new_total):
    assert ConstantLRScheduler.decay_start(total) >= step and ConstantLRScheduler.decay_start(new_total) >= step
    assert rates(total, 12, step, new_total)[:new_total] == rates(new_total, 12)


@pytest.mark.parametrize(
    ("step", "speed", "seconds"), [(100, 2.0, 50.0), (100, 2.0, 0.0), (7, 0.01, -3.0), (1, 1e3, 1.0)]
)
def test_steps_fit_into_the_time_left_and_the_rate_has_not_fallen_yet(step, speed, seconds):
    num_steps = fit_steps(step, speed, seconds)
    assert ConstantLRScheduler.decay_start(num_steps) > step
    assert num_steps - step >= seconds * speed - 1
    shorter = num_steps - 1
    assert shorter - step < seconds * speed + 1 or ConstantLRScheduler.decay_start(shorter) <= step


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def test_a_run_keeps_its_time_and_the_same_steps_give_the_same_weights(few_digits, tokenizer_dir, tokens_dir, tmp_path):
    """A hopeless number of epochs is corrected; a run of the corrected epochs, without a budget, has bit-exact weights."""
    options = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir} | PRETRAIN | BUDGET
    started = time.monotonic()
    mapet.pretrain(out=tmp_path / "timed", **options | {"epochs": 5000, "max_minutes": 0.1, "batch_size": 50})
    assert time.monotonic() - started < 30  # 6 s, and what imports and other programs take
    state = RunState.read(tmp_path / "timed")
    corrections = state.results["corrections"]
    assert 1 <= len(corrections) <= 3 and corrections[-1]["total_steps"] == state.counts["total_steps"] < 5000 * 6
    epochs = yaml.safe_load((tmp_path / "timed" / "config.yaml").read_text())["epochs"]
    assert round(epochs * 6) == state.counts["total_steps"] == state.counts["steps"]
    mapet.pretrain(out=tmp_path / "given", **options | {"epochs": epochs, "batch_size": 50})
    first, second = weights(tmp_path / "timed"), weights(tmp_path / "given")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_killed_run_keeps_its_time_and_has_the_weights_of_one_that_was_not(
    few_digits, tokenizer_dir, tokens_dir, tmp_path
):
    """SIGKILL after a checkpoint: the seconds before it count, and the weights are those of the same steps in one go."""
    options = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "epochs": 5000, "batch_size": 50}
    options = PRETRAIN | BUDGET | options | {"max_minutes": 10, "checkpoint_interval_min": 0.01}
    path, out = tmp_path / "options.yaml", tmp_path / "killed"
    path.write_text(
        yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in (options | {"out": out}).items()})
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mapet", "pretrain", str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not list((out / "checkpoints").glob("step-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = RunState.read(out)
    assert before.status == "interrupted"
    config = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump(config | {"max_minutes": before.seconds / 60 + 0.1}))
    assert main(["pretrain", str(out / "config.yaml"), "--resume"]) == 0
    state = RunState.read(out)
    assert before.seconds < state.seconds < before.seconds + 60 and state.resumes == 1
    assert 1 <= len(state.results["corrections"]) <= 3 and state.counts["steps"] < 5000
    epochs = yaml.safe_load((out / "config.yaml").read_text())["epochs"]
    mapet.pretrain(**options | {"out": tmp_path / "whole", "epochs": epochs, "max_minutes": None})
    first, second = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_time_before_a_kill_counts(tmp_path):
    """The newest file of a folder whose process is gone is the end of its work."""
    from mapet.config.pipeline import DemoConfig

    out = tmp_path / "run"
    state = RunState(command="demo", seconds=5.0, pid=2**22 + 1)
    state.write(out)
    (out / "token").write_text("")
    late = state.updated.timestamp() + 40
    os.utime(out / "token", (late, late))
    with run_state(out, "demo", DemoConfig(out=out, resume=True)):
        assert 44 < elapsed_seconds(out) < 47
    assert json.loads((out / "run.json").read_text())["seconds"] > 44


def test_a_time_limit_needs_the_schedule_that_does_not_depend_on_the_number_of_steps(
    tokenizer_dir, few_digits, tmp_path
):
    with refused("schedule", "constant"):
        mapet.pretrain(images=few_digits, tokenizer=tokenizer_dir, out=tmp_path / "run", max_minutes=1)


@pytest.mark.slow
def test_run_keeps_to_its_time_and_its_steps_as_an_option_give_the_same_weights(few_digits, tmp_path):
    out, time_limit = tmp_path / "timed", 3
    mapet.run(images=few_digits, out=out, time=time_limit, device="cpu")
    state = RunState.read(out)
    assert state.seconds <= 1.15 * 60 * time_limit
    assert sum(state.results["plan"]["costs"].values()) <= 60 * time_limit
    assert "epochs" not in yaml.safe_load((out / "config.yaml").read_text())["pretrain"]
    pretrained = RunState.read(out / "pretrain")
    assert 1 <= len(pretrained.results["corrections"]) <= 3
    epochs = yaml.safe_load((out / "pretrain" / "config.yaml").read_text())["epochs"]
    assert main(["run", str(out / "config.yaml"), "--epochs", str(epochs), "--out", str(tmp_path / "given")]) == 0
    first, second = weights(out / "pretrain"), weights(tmp_path / "given" / "pretrain")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shortcuts_are_options_of_sections(tmp_path):
    config = build_config(
        RunConfig, {"images": "a", "image_size": 32, "epochs": "3", "time": "2h", "pretrain": {"lr": 1}}
    )
    assert config.user_options == {
        "fit_tokenizer": {"image_size": (32, 32)},
        "tokenize": {},
        "pretrain": {"lr": 1.0, "epochs": 3.0},
    }
    assert config.time == 120 and build_config(RunConfig, {"images": "a", "time": "90s"}).time == 1.5
    assert RunConfig(images="a", epochs=3, out=Path("b")).pretrain.epochs == 3
    typed = build_config(RunConfig, {"images": "a", "pretrain": {"epochs": 9, "lr": 2}}, None, {"epochs": "4"})
    assert (typed.pretrain.epochs, typed.pretrain.lr) == (4, 2)
    with refused("epochs", field="epochs"):
        build_config(RunConfig, {"images": "a", "epochs": 3, "pretrain": {"epochs": 3}})
    with refused("30m", field="time"):
        build_config(RunConfig, {"images": "a", "time": "soon"})


def test_a_run_without_out_is_named_after_folder_and_day_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = build_config(RunConfig, {"images": str(tmp_path / "my photos")}).out
    assert first == Path("runs") / f"my-photos-{datetime.date.today().isoformat()}"
    first.mkdir(parents=True)
    (first / "file").write_text("")
    assert build_config(RunConfig, {"images": str(tmp_path / "my photos")}).out == first.with_name(f"{first.name}-2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("out"):
        build_config(RunConfig, {"images": "photos"})
