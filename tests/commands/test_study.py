"""`mapet study`: its trials, real runs of them, failure and Ctrl-C, and what it refuses."""

import csv
import itertools
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

import mapet
from mapet.cli import main
from mapet.config.base import build_config
from mapet.config.pipeline import StudyConfig
from mapet.config.pretraining import PretrainConfig
from mapet.data.dataset import EpochBatchSampler
from mapet.errors import Interrupted
from mapet.run_state import RunState
from mapet.studies import trials
from mapet.studies.statistics import COMPUTE, EPOCHS
from mapet.studies.trials import add_equal_compute, grid_trials, pretrain_config
from mapet.training.flops import flops_per_image
from tests.conftest import PRETRAIN
from tests.refused import fails, refused

PIXELS = {"image_size": 8, "patch_size": 2, "channels": 1, "vocab_size": 16}
SHARED = {name: value for name, value in PRETRAIN.items() if name != "device"} | {"lr": 3e-3}
FINETUNE = {"epochs": 1, "batch_size": 32, "views": "center"}


def recipe(images, out, **options):
    given = {"images": str(images), "test_images": str(images), "out": str(out), "tokenizers": {"pixels": PIXELS}}
    return given | {"pretrain": SHARED, "finetune": FINETUNE, "grid": {"objective": ["mim", "mapet"]}} | options


def test_a_study_runs_evaluates_reports_and_resumes(digits, few_digits, tmp_path):
    """Equal epochs and equal compute, a trial that fails, one seed; the second call runs nothing."""
    out = tmp_path / "study"
    methods = {"mim": {"objective": "mim"}, "mapet": {"objective": "mapet"}, "bad": {"objective": "mim", "lr": 1e30}}
    options = recipe(few_digits, out, grid={"method": methods}, compare_by="method", seeds=[3], devices=["cpu", "cpu"])
    options["ood_images"] = {"other writers": str(digits / "test")}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(options))
    assert main(["study", str(tmp_path / "study.yaml")]) == 0
    trials = {path.name: RunState.read(path) for path in (out / "trials").iterdir()}
    equal_epochs = {"mim_seed_3", "mapet_seed_3", "bad_seed_3"}
    (longer,) = (name for name in trials if re.fullmatch(r"mim_seed_3_\d\.\d+_epochs", name))
    assert set(trials) == equal_epochs | {longer, longer.replace("mim", "bad")}
    result = trials["mapet_seed_3"].results
    assert set(result["scores"]) == {
        "logistic", "knn", "logistic on other writers", "knn on other writers", "finetune, 10 labels a class",
    }  # fmt: skip
    assert all(0 <= score <= 1 for score in result["scores"].values())
    assert result["epochs"] == 2 and result["seconds"] > 0 and result["curve"][-1]["epoch"] == 2
    assert result["curve"][-1]["flops"] == result["flops"] > 1e8
    longer = trials[longer].results
    per_step = trials["mim_seed_3"].results["flops"] / 6  # 2 epochs of 3 steps
    assert abs(longer["flops"] - result["flops"]) < 0.51 * per_step
    assert trials["bad_seed_3"].status == "failed" and "NaN or infinite" in trials["bad_seed_3"].reason
    with (out / "report" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["status"] for row in rows) == ["failed", "failed", "finished", "finished", "finished"]
    text = (out / "report" / "report.md").read_text()
    assert "lower lr" in text and "untrained ViT" in text and " ± 0" not in text  # one seed: no interval
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main(["study", str(out / "config.yaml")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    recorded = (out / "config.yaml").read_bytes()
    for changed, named in (
        ({"pretrain": SHARED | {"lr": 0.1}}, ["(lr: 0.003 -> 0.1)"]),
        ({"tokenizers": {"pixels": PIXELS | {"vocab_size": 8}}}, ["pixels", "(vocab_size: 16 -> 8)"]),
        ({"tokenize": {"views": "center-flip"}}, ["pixels", "(views: 'center' -> 'center-flip')"]),
    ):
        with refused(*named):
            mapet.study(**options | changed)
    assert (out / "config.yaml").read_bytes() == recorded
    assert "Tokenizer 'pixels': teacher pixels, 8 x 8 px in patches of 2, 16 tokens." in text
    assert "K-nn" not in (html := (out / "report" / "report.html").read_text()) and "<h3>Training loss" in html
    assert mapet.study(**options, report_only=True) == out / "report"


@pytest.mark.slow
def test_a_study_killed_with_all_its_trials_at_random_moments(few_digits, tmp_path):
    from tests.integration.test_never_lost import run_with_kills

    shown = {}
    for name, kills in (("whole", 0), ("parts", 12)):
        options = recipe(few_digits, tmp_path / name, seeds=[0], equal_compute=False)
        options["pretrain"] = SHARED | {"epochs": 40, "checkpoint_interval_min": 1e-9}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(options))
        assert run_with_kills(["study", str(tmp_path / f"{name}.yaml")], kills, kills, 12) == kills
        trials = (tmp_path / name / "trials").iterdir()
        shown[name] = {path.name: RunState.read(path).results["scores"] for path in trials}
    assert len(shown["whole"]) == 2 and shown["whole"] == shown["parts"]


def test_ctrl_c_saves_the_running_trials(few_digits, tmp_path):
    options = recipe(few_digits, tmp_path / "study", seeds=[0], equal_compute=False)
    options["pretrain"] = SHARED | {"epochs": 5000}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(options))
    process = subprocess.Popen(
        [sys.executable, "-m", "mapet", "study", str(tmp_path / "study.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "study" / "trials" / "mim_seed_0" / "pretrain" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "stopped by SIGINT: 0 of 2 trials are finished" in error and "Traceback" not in error
    plan = output[output.index("plan: 2 trials") : output.index("fitting tokenizer")]  # first of all
    assert plan.count(" x 5000 epochs at ") == 2 and "pre-training takes about" in plan
    assert list((metrics.parent / "checkpoints").glob("step-*/trainer_state.json"))
    assert RunState.read(metrics.parents[1]).status == RunState.read(metrics.parent).status == "stopped"
    text = (tmp_path / "study" / "report" / "report.csv").read_text()
    assert ",stopped," in text and ",not run," in text


@pytest.mark.parametrize(("stop_signal", "status"), [("SIGTERM", "stopped"), ("", "failed")])
def test_a_trial_that_ends_before_it_handles_signals_is_stopped_if_the_study_is(stop_signal, status, tmp_path):
    RunState(command="trial", status="interrupted", resumes=-1).write(tmp_path)
    trials._log_end(tmp_path, -signal.SIGTERM, stop_signal)
    assert RunState.read(tmp_path).status == status


@pytest.mark.parametrize(("given", "expected"), [("7", "7"), (None, "3")])
def test_trials_have_the_threads_that_the_user_has_set(given, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    started = {}
    monkeypatch.setattr(trials.subprocess, "Popen", lambda *_, env, **__: started.update(env))
    trials._start_process(tmp_path, "cpu", 3)
    assert started["OMP_NUM_THREADS"] == expected


def test_ctrl_c_while_tokenizing_breaks_no_tokenizer(few_digits, tmp_path, monkeypatch):
    """The study stops there, and no trial is recorded as failed."""

    def interrupted(_):
        raise Interrupted("stopped by SIGINT, saved")

    monkeypatch.setattr(trials, "tokenize", interrupted)
    with refused("SIGINT", kind=Interrupted):
        mapet.study(**recipe(few_digits, tmp_path / "study", seeds=[0]))
    assert (tmp_path / "study" / "tokenizers" / "pixels" / "tokenizer").exists()
    assert not (tmp_path / "study" / "trials").exists()


def test_the_grid_is_every_combination_with_every_seed(few_digits, tmp_path, tokenizer_dir):
    options = recipe(few_digits, tmp_path, seeds=[0, 1])
    options["grid"] = {"objective": ["mim", "mapet"], "mask_ratio": [0.5, [0.5, 0.9]]}
    config = build_config(StudyConfig, options)
    study_trials = grid_trials(config)
    assert (
        len({trial.name for trial in study_trials}) == 8 and [trial.seed for trial in study_trials] == [0] * 4 + [1] * 4
    )
    assert study_trials[1].factors == {"objective": "mim", "mask_ratio": "0.5 to 0.9"}
    (tmp_path / "tokenizers" / "pixels").mkdir(parents=True)
    (tmp_path / "tokenizers" / "pixels" / "tokenizer").symlink_to(tokenizer_dir)
    with_compute = add_equal_compute(config, study_trials)
    named = {trial.name: trial for trial in with_compute}
    mapet_trial, mim_trial = named["0.5, mapet, seed 0"], named["0.5, mim, seed 0"]
    epochs = 2 * mapet_trial.flops_per_image / mim_trial.flops_per_image
    assert mapet_trial.budgets == (EPOCHS, COMPUTE)  # the most expensive one of its comparison
    assert mim_trial.budgets == (EPOCHS,) and mim_trial.options["epochs"] == 2
    assert named[f"0.5, mim, seed 0, {epochs:.6g} epochs"].budgets == (COMPUTE,)
    # Compute is equal to half a step of the cheaper one, however many steps an epoch has.
    for steps_per_epoch in (1, 3, 7, 100, 5005):
        for seed, ratio in itertools.product((0, 1), ("0.5", "0.5 to 0.9")):
            pair = [
                c for c in with_compute if (c.seed, c.factors["mask_ratio"]) == (seed, ratio) and COMPUTE in c.budgets
            ]
            assert {trial.factors["objective"] for trial in pair} == {"mim", "mapet"} and len(pair) == 2
            steps = [
                len(EpochBatchSampler(np.arange(steps_per_epoch), 1, pretrain_config(config, trial).epochs, seed))
                for trial in pair
            ]
            flops = [number * trial.flops_per_image for number, trial in zip(steps, pair, strict=True)]
            cheaper = min(trial.flops_per_image for trial in pair)
            assert abs(flops[0] - flops[1]) <= cheaper * 0.500001, (steps_per_epoch, ratio)


def test_operations_are_those_of_the_definition(few_digits, tokenizer_dir, tmp_path):
    """MIM of 16 patches and a class token, counted by hand: linear layers, attention, head; the pixels need no gradient."""
    given = {"images": few_digits, "out": tmp_path, "tokenizer": tokenizer_dir, "mask_ratio": 0.75, "objective": "mim"}
    config = build_config(PretrainConfig, PRETRAIN | given)
    width, depth = config.model_args["embed_dim"], config.model_args["depth"]
    num_codes = json.loads((tokenizer_dir / "visual_tokenizer.json").read_text())["vocab_size"]
    block = 17 * 12 * width**2 + 2 * 17 * 17 * width
    last = 17 * 2 * width**2 + 12 * 10 * width**2 + 2 * 12 * 17 * width  # only the 12 masked patches have queries
    embedding = 16 * 4 * width
    by_hand = 2 * (3 * ((depth - 1) * block + last + 12 * width * num_codes + embedding) - embedding)
    assert flops_per_image(config) == by_hand


@pytest.mark.parametrize(
    ("options", "named", "attributes"),
    [
        ({"grid": {}}, ["grid"], {"field": "grid", "value": {}}),
        ({"grid": {"objective": []}}, ["grid", "'objective'"], {}),
        ({"grid": {"objective": ["mim", "mim"]}}, ["grid", "'objective'"], {}),
        ({"grid": {"objektive": ["mim"]}}, ["'objektive'", "`pretrain`", "'objective'"], {}),
        ({"grid": {"m": {"a": {"lr": 1}, "b": {"lr": 1}}}, "compare_by": "m"}, ["grid"], {}),
        ({"grid": {"m": {"a": {"epocs": 1}}}, "compare_by": "m"}, ["grid", "m a", "'epocs'", "'epochs'"], {}),
        ({"grid": {"m": {"a": {"lr": -1}}}, "compare_by": "m"}, ["grid", "m a", "lr", "-1"], {}),
        ({"grid": {"tokenizer": ["pixel"]}, "compare_by": "tokenizer"}, ["grid", "'pixel'", "'pixels'"], {}),
        ({"compare_by": "ratio"}, ["compare_by", "'ratio'", "objective"], {}),
        ({"seeds": []}, ["seeds"], {"field": "seeds", "value": []}),
        ({"seeds": [1, 1]}, ["seeds"], {}),
        ({"tokenizers": {}}, ["tokenizers"], {"field": "tokenizers", "value": {}}),
        ({"grids": {}}, ["'grids'", "'grid'"], {"field": "grids"}),
        ({"tokenizers": {"a": {"vocab": 3}}}, ["'tokenizers.a.vocab'"], {"field": "vocab", "value": 3}),
        ({"grid": {"objective": ["mim", "mapett"]}}, ["grid", "'mapett'", "'mapet'"], {}),
        (
            {"tokenizers": {"pixels": PIXELS | {"patch_size": 3}}},
            ["8 x 8", "3", "tokenizers.pixels.image_size=(9, 9)"],
            {"field": "image_size", "value": (8, 8)},
        ),
        ({"tokenizers": {"a": {"image_siz": 3}}}, ["'tokenizers.a.image_size'"], {"field": "image_siz", "value": 3}),
        ({"labels_per_class": [5, 1000]}, ["1,000"], {"field": "labels_per_class", "value": 1000}),
        ({"grid": {"lr": [1, 2], "objective_": {}}}, ["grid", "'objective_'"], {}),
        ({"grid": {"lr": [0.1, 0.2], "epochs": [1, 2]}}, ["compare_by", "'objective'", "lr, epochs"], {}),
        ({"test_images": "nowhere"}, ["nowhere"], {}),
        ({"images": "nowhere"}, ["nowhere"], {}),
    ],
)
def test_what_a_study_refuses_before_it_writes_anything(options, named, attributes, few_digits, tmp_path):
    with refused(*named, **attributes):
        mapet.study(**recipe(few_digits, tmp_path / "study") | options)
    assert not (tmp_path / "study").exists()


def test_all_of_it_on_the_command_line(few_digits, tmp_path, capsys):
    argv = ["study", "--images", str(few_digits), "--test-images", str(few_digits), "--out", str(tmp_path / "study")]
    argv += ["--grid", "objective=[mim, pim]", "--seeds", "0", "--no-equal-compute", "--labels-per-class", "5"]
    fails(
        capsys,
        *argv,
        "--tokenizers",
        "pixels={image_size:8,patch_size:2}",
        named=["'pixels={image_size:8,patch_size:2}'", "YAML"],
    )
    fails(capsys, *argv, named=["--tokenizers", "'pixels={}'"], field="tokenizers")


def test_evaluation_options_of_a_trial_may_change_until_it_is_evaluated(few_digits, tmp_path):
    """Options of evaluation may change after pre-training. A single factor that varies is compared."""
    lines = [str(path.relative_to(few_digits.parent)) for path in sorted(few_digits.parent.rglob("*.png"))[1::5]]
    test_images = few_digits.parent / "imbalanced.txt"
    imbalanced = [line for number, line in enumerate(lines) if line.startswith(lines[0].split("/")[0]) or number % 2]
    test_images.write_text("".join(f"{line}\n" for line in imbalanced))
    options = recipe(few_digits, tmp_path / "study", seeds=[0], equal_compute=False, grid={"lr": [1e-3]})
    options["test_images"] = str(test_images)
    mapet.study(**options)
    (folder,) = (tmp_path / "study" / "trials").iterdir()
    state = RunState.read(folder)
    state.model_copy(update={"status": "interrupted", "results": {}}).write(folder)
    weights = (folder / "pretrain" / "backbone" / "model.safetensors").stat().st_mtime_ns
    mapet.study(**options | {"labels_per_class": [3]})
    scores, name = RunState.read(folder).results["scores"], "finetune, 3 labels a class"
    assert list(scores)[-3:] == [f"{name}, balanced accuracy", f"{name}, AUROC", name]
    assert weights == (folder / "pretrain" / "backbone" / "model.safetensors").stat().st_mtime_ns
    with refused("labels_per_class", [3], [4]):
        mapet.study(**options | {"labels_per_class": [4]})


def test_a_tokenizer_that_cannot_be_made_fails_its_trials_alone(few_digits, tmp_path):
    options = recipe(few_digits, tmp_path / "study", seeds=[0], equal_compute=False, compare_by="tokenizer")
    options["tokenizers"] |= {"too large": PIXELS | {"vocab_size": 10**6}}
    options["grid"] = {"tokenizer": ["pixels", "too large"]}
    mapet.study(**options)
    report = (tmp_path / "study" / "report" / "report.md").read_text()
    assert "1,000,000 exceeds the" in report
    states = {path.name: RunState.read(path).status for path in (tmp_path / "study" / "trials").iterdir()}
    assert states == {"pixels_seed_0": "finished", "too_large_seed_0": "failed"}


def test_operations_of_drawn_ratios_and_fewer_targets(few_digits, tokenizer_dir, tmp_path):
    given = PRETRAIN | {"images": few_digits, "out": tmp_path, "tokenizer": tokenizer_dir}

    def cost(**options):
        return flops_per_image(build_config(PretrainConfig, given | options))

    assert cost(mask_ratio=0.5) < cost(mask_ratio=[0.5, 0.9]) < cost(mask_ratio=0.9)
    assert cost(num_predict=3) < cost(num_predict=6) < cost()
    assert cost(objective="mim", target="pixels") < cost(objective="mim")  # 4 pixels instead of 16 codes
