"""The trials of a study: their grid and configs, running each in a process of its own, evaluating all alike, and their results."""

import fcntl
import itertools
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from tqdm import tqdm

from mapet.config.base import Config, build_config, diff_configs, read_config, write_config
from mapet.config.evaluation import FinetuneConfig, FinetuneOptions
from mapet.config.limits import use_limits
from mapet.config.pipeline import StudyConfig
from mapet.config.pretraining import PretrainConfig, PretrainOptions
from mapet.config.tokenizers import FitTokenizerConfig, TokenizeConfig
from mapet.device import ComputeContext, usable_cores
from mapet.errors import Interrupted, MapetError, did_you_mean, option, pluralize
from mapet.evaluation.datasets import load_train_test
from mapet.evaluation.features import RANDOM_PREFIX, BackboneWrapper, CacheConfig, FeatureCache
from mapet.evaluation.imbalance import METRIC_NAMES
from mapet.evaluation.probes import probe_accuracy
from mapet.files import is_empty_dir
from mapet.run_state import CONFIG_FILE, RunState, record, run_state, try_read_state
from mapet.signals import stop_signals
from mapet.studies.statistics import COMPUTE, EPOCHS, Condition, Study, Trial, format_condition
from mapet.tokenizers.fitting import fit_tokenizer
from mapet.tokenizers.tokenization import tokenize
from mapet.tokenizers.tokenizer import Tokenizer, load_tokenizer
from mapet.training.flops import flops_per_image
from mapet.training.measure import time_training
from mapet.training.metrics import format_duration
from mapet.training.tasks.finetuning import FinetuningTask
from mapet.training.tasks.pretraining import PretrainingTask
from mapet.training.trainer import Trainer

log = logging.getLogger("mapet")
SAME_TOKENS = frozenset({"memory_gb", "images", "out", "tokenizer", "device", "resume", "trust_teacher", "limits"})
"""Options that change no token: speed, limits, and paths, whose contents are compared by hash when they are opened."""
SAME_TRIAL = frozenset({"images", "out", "tokenizer", "tokens", "device", "trust_teacher", "track", "limits"})
"""Options that may differ when a trial is resumed: paths, for the study may have moved, trackers and limits."""
EVALUATION = frozenset({"finetune", "test_images", "ood_images", "labels_per_class"})
"""Fields of `TrialConfig` that may change until the trial is evaluated."""
POLL_INTERVAL_S = 0.2
Levels = dict[str, dict[str, Any]]
"""Name of a factor's level -> the options of `pretrain` (or `tokenizer`) that it stands for."""


class TrialConfig(Config):
    """All that a trial's process reads, from the config.yaml in the trial's folder.

    Attributes:
        pretrain: of the trial's pre-training run, in the folder `pretrain` of the trial.
        finetune: options of every fine-tuning; backbone, images, labels, device and seed are set by `evaluate`.
        test_images: labeled images to test on.
        ood_images: name -> labeled images of a further (out-of-distribution) test set.
        labels_per_class: numbers of labels to fine-tune with, one fine-tuning for each; None means all.
        num_images: number of training images.
        flops_per_epoch: FLOPs of pre-training for one epoch.
    """

    resume: ClassVar[bool] = True
    pretrain: PretrainConfig
    finetune: FinetuneOptions
    test_images: str
    ood_images: dict[str, str]
    labels_per_class: list[int | None]
    num_images: int
    flops_per_epoch: float


# ---- the grid


def grid_trials(config: StudyConfig) -> list[Trial]:
    """Return a trial for every combination of the grid's levels and every seed, at equal epochs, seed by seed.

    A level (a value of a factor) stands for options of `pretrain`, which replace those of `config.pretrain`, or for a tokenizer; without
    one a trial has the first of `config.tokenizers`.

    Args:
        config: of the study; `grid`, `seeds`, `compare_by`, `pretrain` and `tokenizers` are used.

    Returns:
        Trials without results, seed by seed.

    Raises:
        MapetError: a level or seed that is given twice, an unknown name, options that `pretrain` refuses.
    """
    grid = {name: _parse_levels(name, values) for name, values in config.grid.items()}
    if (compared := get_compared_factor(config)) not in grid:
        expected = f"{option('compare_by')} takes one of {', '.join(grid)}"
        raise MapetError(f"compare_by: '{compared}' is not varied{did_you_mean(compared, grid)}; {expected}")
    if len(set(config.seeds)) < len(config.seeds):
        given = " ".join(map(str, config.seeds))
        raise MapetError(
            f"{option('seeds')} {given} has a seed twice: give each once", field="seeds", value=config.seeds
        )
    shared = {"epochs": PretrainConfig.model_fields["epochs"].default, **config.pretrain.model_dump(exclude_unset=True)}
    trials: dict[str, Trial] = {}  # by their options, defaults included
    for levels in itertools.product(*grid.values()):
        factors, options = dict(zip(grid, levels, strict=True)), dict(shared)
        for factor, level in factors.items():
            options |= grid[factor][level]
        tokenizer = str(options.pop("tokenizer", next(iter(config.tokenizers))))
        if tokenizer not in config.tokenizers:
            hint = did_you_mean(tokenizer, config.tokenizers) or f": give one of {', '.join(config.tokenizers)}"
            raise MapetError(f"grid: no tokenizer '{tokenizer}'{hint}")
        try:
            resolved = build_config(PretrainOptions, options).model_dump_json() + tokenizer
        except MapetError as error:
            raise MapetError(f"grid, trial {format_condition(tuple(factors.items()))}: {error}") from None
        if resolved in trials:
            same = " and ".join(format_condition(tuple(each.items())) for each in (factors, trials[resolved].factors))
            raise MapetError(f"grid: {same} are the same trial: omit one")
        trials[resolved] = Trial(factors, 0, tokenizer, options)
    return [replace(trial, seed=seed) for seed in config.seeds for trial in trials.values()]


def _parse_levels(name: str, values: list[Any] | Levels) -> Levels:
    """Return the levels of one entry of the grid: those given, or, for a list of values of an option, one level for each value.

    Args:
        name: of the factor: an option of `pretrain`, or 'tokenizer'; with a mapping any name.
        values: a list of the option's values, or level -> options.

    Returns:
        Level -> options. The level of a value is its text; that of a range such as [0.4, 0.6] is '0.4 to 0.6'.

    Raises:
        MapetError: an empty entry, a value that is given twice, or a list for something that is no option.
    """
    option_names = [*PretrainOptions.model_fields, "tokenizer"]
    if isinstance(values, dict):
        levels = values
    elif name in option_names:
        texts = [" to ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
        levels = {text: {name: value} for text, value in zip(texts, values, strict=True)}
    else:
        raise MapetError(
            f"grid: '{name}' is not an option of `pretrain`{did_you_mean(name, option_names) or '.'} Options that vary together are written "
            f"{name}: {{LEVEL: {{option: value}}}}, where LEVEL is any name for them"
        )
    if not values or len(levels) < len(values):
        problem = "has no values: give a list" if not values else "has a value twice: give each once, found "
        raise MapetError(f"grid: '{name}' {problem}{', '.join(map(str, values))}")
    return levels


def get_compared_factor(config: StudyConfig) -> str:
    """Return the factor (a key of the grid) whose levels are compared: `compare_by`, else the only one of the grid, else 'objective'."""
    return config.compare_by or (next(iter(config.grid)) if len(config.grid) == 1 else "objective")


def add_equal_compute(config: StudyConfig, trials: list[Trial]) -> list[Trial]:
    """Return the trials with their FLOPs per image, and further ones of more epochs for the comparison at equal compute.

    A trial that is compared with more expensive ones (those that differ from it in the compared factor alone) is run a second time, for as
    many epochs, with a fraction, as cost what the most expensive one costs: training rounds them to whole steps. Until its tokenizer is
    fitted, which decides the size of the model's head, a trial costs 0 and gets no second run.

    Args:
        config: of the study; `equal_compute` says whether there are second runs.
        trials: at equal epochs, as `grid_trials` returns them.

    Returns:
        Trials with `flops_per_image`. A trial that needs no second run counts for both budgets, `EPOCHS` and `COMPUTE`. Of one that does,
        the trial itself counts for `EPOCHS`, and its second run, which follows it, for `COMPUTE`.

    Raises:
        MapetError: a model cannot be built for its tokenizer.
    """
    costs: dict[Condition, float] = {}  # by all factors: building the model of each takes a while, and seeds cost alike
    for trial in trials:
        if (factors := trial.condition("")) not in costs:
            is_fitted = not is_empty_dir(tokenizer_folder(config, trial.tokenizer) / "tokenizer")
            costs[factors] = flops_per_image(pretrain_config(config, trial)) if is_fitted else 0.0
    trials = [replace(trial, flops_per_image=costs[trial.condition("")]) for trial in trials]
    if not config.equal_compute:
        return trials
    compared, max_flops, result = get_compared_factor(config), defaultdict[Condition, float](float), []
    for trial in trials:
        flops = trial.flops_per_image * trial.options["epochs"]
        max_flops[trial.condition(compared)] = max(max_flops[trial.condition(compared)], flops)
    for trial in trials:
        epochs = trial.options["epochs"]
        if trial.flops_per_image:
            epochs = max_flops[trial.condition(compared)] / trial.flops_per_image
        if math.isclose(epochs, trial.options["epochs"]):  # as expensive as the most expensive one, or of unknown cost
            result.append(replace(trial, budgets=(EPOCHS, COMPUTE)))
        else:
            result += [trial, replace(trial, options=trial.options | {"epochs": epochs}, budgets=(COMPUTE,))]
    return result


# ---- configs of the commands


def tokenizer_folder(config: StudyConfig, name: str) -> Path:
    """Return the folder that holds `tokenizer` and `tokens` of one tokenizer."""
    return config.out / "tokenizers" / name


def tokenizer_configs(config: StudyConfig, name: str) -> tuple[FitTokenizerConfig, TokenizeConfig]:
    """Return the configs of `fit-tokenizer` and `tokenize` for one tokenizer, and check them against what is there already.

    Args:
        name: key of `config.tokenizers`. Its folder may be missing, or hold what an earlier call of the study has made of it.

    Raises:
        MapetError: options that contradict each other, or that differ from those in the run.json of its folders.
    """
    folder, options = tokenizer_folder(config, name), config.tokenizers[name].model_dump(exclude_unset=True)
    shared = {"images": config.images, "device": config.devices[0], "resume": True}
    try:
        fitting = build_config(FitTokenizerConfig, options | shared | {"out": folder / "tokenizer"})
    except MapetError as error:
        raise MapetError(f"tokenizer '{name}': {error}") from None
    paths = {"out": folder / "tokens", "tokenizer": fitting.out}
    tokenizing = build_config(TokenizeConfig, config.tokenize.model_dump(exclude_unset=True) | shared | paths)
    for new in (fitting, tokenizing):
        if state := try_read_state(new.out):
            _check_unchanged(folder, diff_configs(build_config(type(new), state.config), new, SAME_TOKENS))
    return fitting, tokenizing


def trial_folder(config: StudyConfig, trial: Trial) -> Path:
    """Return the folder of a trial's run.json, config.yaml, trial.log and pre-training run."""
    return config.out / "trials" / re.sub(r"[^\w.=+-]+", "_", trial.name)


def pretrain_config(config: StudyConfig, trial: Trial) -> PretrainConfig:
    """Return the config of a trial's `pretrain`."""
    folder = tokenizer_folder(config, trial.tokenizer)
    inputs = {"images": config.images, "tokenizer": folder / "tokenizer", "tokens": folder / "tokens"}
    outputs = {"out": trial_folder(config, trial) / "pretrain", "seed": trial.seed, "limits": config.limits}
    return build_config(PretrainConfig, trial.options | inputs | outputs)


def trial_config(config: StudyConfig, trial: Trial, num_images: int) -> TrialConfig:
    """Return the config of a trial's process; `num_images`: training images."""
    return TrialConfig(
        pretrain=pretrain_config(config, trial), finetune=config.finetune, test_images=config.test_images,
        ood_images=config.ood_images, num_images=num_images, flops_per_epoch=trial.flops_per_image * num_images,
        labels_per_class=[None if amount == "all" else amount for amount in config.labels_per_class],
    )  # fmt: skip


def check_same_trial(folder: Path, new: TrialConfig) -> None:
    """Check that a trial which has been started has the options it was started with; those of its evaluation may change before that.

    Args:
        folder: of the trial. Without a readable run.json and a pre-training run it has not been started, and nothing is checked.
        new: what the trial would be run with now.

    Raises:
        MapetError: its options differ; the message lists them. Paths, devices and trackers may differ (`SAME_TRIAL`).
    """
    state = try_read_state(folder)
    if state is None or not (folder / "pretrain").exists():
        return
    old = build_config(TrialConfig, state.config)
    mutable = frozenset({"pretrain", "flops_per_epoch"}) | (frozenset() if state.status == "finished" else EVALUATION)
    _check_unchanged(folder, diff_configs(old.pretrain, new.pretrain, SAME_TRIAL) + diff_configs(old, new, mutable))


def _check_unchanged(folder: Path, changed: list[str]) -> None:
    """Raise MapetError if there are changed options; it lists them ('lr: 0.1 -> 0.2'). `folder` is that of a trial or tokenizer."""
    if changed:
        problem = f"{folder} was made with other options ({'; '.join(changed)})"
        raise MapetError(f"{problem}: restore them, rename this trial or tokenizer, or give a new {option('out')}")


# ---- running


def describe_plan(config: StudyConfig, trials: list[Trial], num_images: int) -> list[str]:
    """Return the lines of what a study will run: trials and the hours of their pre-training, by a timed step of each kind of trial.

    Args:
        config: of the study.
        trials: at equal epochs; finished ones cost nothing.
        num_images: number of training images.
    """
    compute = ComputeContext.from_options(config.devices[0], config.pretrain.precision)
    waiting = [trial for trial in trials if not is_finished(trial_folder(config, trial))]
    lines, total = [], 0.0
    for condition, own in itertools.groupby(sorted(waiting, key=_condition_name), key=_condition_name):
        same = list(own)
        training, fitting = pretrain_config(config, same[0]), tokenizer_configs(config, same[0].tokenizer)[0]
        seconds = time_training(training, fitting.image_size, fitting.patch_size, fitting.channels, compute)
        hours = len(same) * training.epochs * num_images * seconds / 3600
        total += hours
        lines.append(
            f"  {condition}: {len(same)} x {training.epochs:g} epochs at {1 / seconds:,.0f} images/s, {format_duration(3600 * hours)}"
        )
    per_device = total / len(set(config.devices))
    tokenizers, devices = sorted({trial.tokenizer for trial in trials}), pluralize(len(set(config.devices)), "device")
    more = "runs at equal compute, " if config.equal_compute else ""
    head = f"plan: {pluralize(len(trials), 'trial')}, {len(waiting)} to run, {pluralize(len(tokenizers), 'tokenizer')}, {num_images:,} images"
    cost = f"  pre-training takes about {format_duration(3600 * per_device)} on {devices}; {more}probes and fine-tuning come on top"
    return [head, *lines, *([cost] if waiting else [])]


def _condition_name(trial: Trial) -> str:
    return format_condition(trial.condition(""))


def make_tokenizers(config: StudyConfig, names: set[str]) -> dict[str, str]:
    """Fit tokenizers and store their tokens, where that is not done yet.

    A fitted tokenizer is kept, and `tokenize` resumes: it computes the tokens that are missing. A tokenizer that fails is logged as a
    warning, and tried again by the next call.

    Args:
        config: of the study.
        names: of the tokenizers that its trials use.

    Returns:
        Name -> reason, of the tokenizers that could not be made; the others are made all the same.

    Raises:
        Interrupted: a signal asked to stop; what is done is kept, and the same command resumes.
        MapetError: a tokenizer exists that was made with other options.
    """
    broken = {}
    for name in sorted(names):
        fitting, tokenizing = tokenizer_configs(config, name)
        try:
            if is_empty_dir(fitting.out):  # k-means saves its state beside the folder: an interrupted fit is resumed
                log.info("--- fitting tokenizer %s", name)
                with run_state(fitting.out, "fit-tokenizer", fitting):
                    fit_tokenizer(fitting)
            with run_state(tokenizing.out, "tokenize", tokenizing):
                tokenize(tokenizing)
        except Interrupted as error:
            raise Interrupted(error.what, "the same command") from None
        except MapetError as error:
            broken[name] = str(error)
            log.warning("tokenizer %s: %s", name, error)
    return broken


def is_finished(folder: Path) -> bool:
    """Return whether the trial of this folder is pre-trained and evaluated."""
    state = try_read_state(folder)
    return state is not None and state.status == "finished"


def run_trials(config: StudyConfig, trials: list[Trial], broken: dict[str, str], num_images: int) -> str:
    """Run each trial that is not finished in a process of its own, one at a time on each device.

    A trial that was interrupted is resumed, one that failed is run again from its newest checkpoint. A signal to stop is passed on to the
    running processes, which save a checkpoint if they train; the function waits for them and returns. A trial that fails is logged as a
    warning and does not stop the others.

    Args:
        config: of the study; its `devices` are the devices to run on. One that is listed twice runs two trials at a time.
        trials: all trials of the study, in the order in which they are started. The caller has checked that their options are those they
            were started with (`check_same_trial`), and has made their tokenizers (`make_tokenizers`).
        broken: name of a tokenizer -> why it could not be made; its trials are recorded as failed and not run.
        num_images: number of training images.

    Returns:
        The name of the signal that stopped the trials, e.g. 'SIGTERM', or '' if all have ended. Results are in each trial's run.json.
    """
    waiting = []
    for trial in trials:
        folder = trial_folder(config, trial)
        if is_finished(folder):
            continue
        if trial.tokenizer in broken:
            reason = f"tokenizer {trial.tokenizer}: {broken[trial.tokenizer]}"
            RunState(command="trial", status="failed", reason=reason).write(folder)
        else:
            write_config(trial_config(config, trial, num_images), folder / CONFIG_FILE)
            waiting.append(folder)
    text = "%d trials, %d of them to run; each logs to trial.log in its folder in %s"
    log.info(text, len(trials), len(waiting), config.out / "trials")
    free_devices, running = list(config.devices), list[tuple[str, Path, subprocess.Popen[bytes]]]()
    # The processes share the CPU cores equally, on GPUs too, where they need them to read images.
    num_threads = max(1, usable_cores() // len(config.devices))
    with (
        stop_signals("stopping: the running trials are saved") as stop,
        tqdm(total=len(waiting), desc="study", unit="trial", disable=None, dynamic_ncols=True) as bar,
    ):
        while running or (waiting and not stop.signal_name):
            while free_devices and waiting and not stop.signal_name:
                device, folder = free_devices.pop(0), waiting.pop(0)
                running.append((device, folder, _start_process(folder, device, num_threads)))
                bar.set_postfix_str("; ".join(folder.name for _, folder, _ in running))
            time.sleep(POLL_INTERVAL_S)
            if stop.signal_name:
                for _, _, process in running:  # first all of them, so that they save at the same time
                    process.terminate()
                for _, _, process in running:
                    process.wait()
            for device, folder, process in list(running):
                if process.poll() is not None:
                    running.remove((device, folder, process))
                    free_devices.append(device)
                    bar.update()
                    _log_end(folder, process.returncode, stop.signal_name)
    return stop.signal_name


def _start_process(folder: Path, device: str, num_threads: int) -> subprocess.Popen[bytes]:
    """Start `run_trial` in a process of its own, whose output is appended to trial.log.

    It gets a session of its own too, so that Ctrl-C reaches only the study, which passes it on once.

    Args:
        folder: of the trial, with its config.yaml.
        device: that it trains on, e.g. 'cuda:0'.
        num_threads: CPU threads of its OpenMP libraries, PyTorch and scikit-learn, unless the user has set OMP_NUM_THREADS.
    """
    if try_read_state(folder) is None:
        RunState(command="trial", status="starting").write(folder)  # the folder, with its files so far, is the trial's
    code = "import sys; from mapet.studies.trials import run_trial; sys.exit(run_trial(*sys.argv[1:]))"
    with (folder / "trial.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), device],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            env={"OMP_NUM_THREADS": str(num_threads)} | os.environ,  # scikit-learn's threads too compete for the cores
        )  # fmt: skip


def _log_end(folder: Path, exit_status: int, stop_signal: str) -> None:
    """Log how a trial ended, from its run.json: the scores of a finished one, a warning for a failed one, nothing for a stopped one.

    One whose process died before it wrote its end is recorded as failed, or as stopped if the study was; the next call of `run_trials`
    resumes it.

    Args:
        folder: of the trial, whose process has ended.
        exit_status: of the process; negative for the signal that killed it.
        stop_signal: that stopped the study, or ''.
    """
    state = try_read_state(folder) or RunState(command="trial", status="interrupted")
    if state.status in ("starting", "interrupted"):
        end = f"signal {-exit_status}" if exit_status < 0 else f"exit status {exit_status}"
        state.status, state.reason = "failed", f"its process ended with {end}; see {folder / 'trial.log'}"
        if stop_signal:  # before the process could handle it
            state.status, state.reason = "stopped", f"stopped by {stop_signal}"
        state.write(folder)
    if state.status == "finished":
        scores = state.results["scores"].items()
        log.info("%s: %s", folder.name, ", ".join(f"{name} {value:.3f}" for name, value in scores))
    elif state.status == "failed":
        log.warning("%s failed: %s", folder.name, state.reason)


def run_trial(folder_name: str, device: str) -> int:
    """Pre-train and evaluate the trial of a folder, as its config.yaml says: the whole work of a trial's process.

    A finished trial is kept. A pre-training run that has its backbone is not trained again, one that has started resumes from its newest
    checkpoint; an evaluation that was stopped is repeated as a whole. Results go to the folder's run.json, with the keys "scores",
    "epochs", "flops", "seconds" and "curve" of `Trial`, or status and reason of a failure, whose traceback is printed.

    Args:
        folder_name: path of the trial's folder.
        device: that it trains and evaluates on; it replaces that of config.yaml.

    Returns:
        The process's exit status: 0 finished, 1 failed, `Interrupted.exit_code` stopped by a signal or Ctrl-C.
    """
    folder = Path(folder_name)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a study that was killed may have left a process that runs this trial
        if is_finished(folder):
            return 0
        config = build_config(TrialConfig, read_config(folder / CONFIG_FILE))
        run = config.pretrain.out
        resume = (run / CONFIG_FILE).exists()
        pretraining = config.pretrain.model_copy(update={"device": device, "resume": resume})
        try:
            with use_limits(config.pretrain.limits), run_state(folder, "trial", config):
                if not (run / "backbone").exists():
                    with run_state(run, "pretrain", pretraining):
                        Trainer(PretrainingTask(), pretraining).fit()
                scores = evaluate(config, device)
                record(folder, results={"scores": scores, "epochs": pretraining.epochs, **learning_curve(config)})
        except (Interrupted, KeyboardInterrupt):
            return Interrupted.exit_code
        except Exception:  # whatever it is: the report says which trial failed and why, and the others run
            traceback.print_exc()
            return 1
    return 0


def evaluate(config: TrialConfig, device: str, seed: int | None = None, pretrained: bool = True) -> dict[str, float]:
    """Evaluate a trial's frozen features, by logistic regression and k-NN on every test set, and its fine-tuning.

    Args:
        config: of the trial, whose pre-training has finished, also for random weights: its backbone gives the architecture.
        device: e.g. 'cuda:0'.
        seed: of random weights and fine-tuning; None means the trial's.
        pretrained: False for the same ViT with random weights.

    Returns:
        Name of the metric -> accuracy (0..1): 'logistic' and 'knn', the same with ' on NAME' for each of `ood_images`, then
        'finetune, 10 labels a class' or 'finetune, all labels' for each of `labels_per_class`, on `test_images` alone. On imbalanced test
        images each stands after its ', balanced accuracy' and ', AUROC'.

    Raises:
        MapetError: backbone, images or labels cannot be read.
    """
    run, images, cache = config.pretrain.out, config.pretrain.images, CacheConfig(progress=False)
    seed = config.pretrain.seed if seed is None else seed
    wrapper = BackboneWrapper.load(
        f"{'' if pretrained else RANDOM_PREFIX}{run}", ComputeContext.from_options(device, "float32"), seed
    )
    features = config.pretrain.layers, config.pretrain.pool
    train = FeatureCache.extract(wrapper, load_train_test(images, config.test_images)[0], cache, *features)
    scores: dict[str, float] = {}
    for name, folder in {"": config.test_images, **config.ood_images}.items():
        test = FeatureCache.extract(wrapper, load_train_test(images, folder)[1], cache, *features)
        suffix = f" on {name}" if name else ""
        scores |= {metric + suffix: accuracy for metric, accuracy in probe_accuracy(train, test).items()}
    shared = {"backbone": run, "images": images, "test_images": config.test_images, "device": device, "seed": seed}
    shared |= config.finetune.model_dump(exclude_unset=True) | {"from_scratch": not pretrained}
    for labels in config.labels_per_class:
        finetuning = build_config(FinetuneConfig, shared | {"labels_per_class": labels})
        result = Trainer(FinetuningTask(), finetuning).fit()
        name = f"finetune, {labels} labels a class" if labels else "finetune, all labels"
        for kind, metric in result.metrics.items():
            scores[name if kind == "accuracy" else f"{name}, {METRIC_NAMES[kind]}"] = metric.value
    return scores


def learning_curve(config: TrialConfig) -> dict[str, Any]:
    """Return cost and learning curve of a finished pre-training run, from its metrics.jsonl.

    Seconds of a line of training are those of its images at its images_per_second, which counts neither evaluation nor start-up; so a
    run that was stopped and resumed counts as if it had been run in one go.

    Args:
        config: of the trial; it gives the run's folder, the number of images and the FLOPs of an epoch.

    Returns:
        "flops" and "seconds" of the run, the latter without start-up and evaluation; "curve", a list of points as in `Trial`.
    """
    points: list[dict[str, float]] = []
    seconds, epoch = 0.0, 0.0
    for line in (config.pretrain.out / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "loss" in metrics:  # a line of training; others are of probes
            seconds += (metrics["epoch"] - epoch) * config.num_images / metrics["images_per_second"]
            epoch = metrics["epoch"]
        point = {"epoch": epoch, "flops": epoch * config.flops_per_epoch, "seconds": seconds}
        renamed = {"loss": "loss", "probe/logistic": "logistic", "probe/knn": "knn"}
        points.append(point | {short: metrics[name] for name, short in renamed.items() if name in metrics})
    return {"flops": epoch * config.flops_per_epoch, "seconds": seconds, "curve": points}


# ---- results


def collect_results(config: StudyConfig, trials: list[Trial], notes: list[str], evaluate_baselines: bool) -> Study:
    """Return all trials with their results, finished or not, and what the report prints with them.

    Results of a trial are read from its run.json; a trial that is not finished has status and reason alone, one without a readable
    run.json is 'not run'.

    Args:
        config: of the study.
        trials: of the study, without results, in the order of the report.
        notes: sentences for the top of the report.
        evaluate_baselines: whether to evaluate untrained models that are not evaluated yet.
    """
    completed = []
    for trial in trials:
        if state := try_read_state(trial_folder(config, trial)):
            results = state.results if state.status == "finished" else {}
            trial = replace(trial, status=state.status, reason=state.reason, **results)
        completed.append(trial)
    title = f"Study of {Path(config.images).name}: {', '.join(config.grid)}"
    baselines, command = (
        _evaluate_baselines(config, trials, evaluate_baselines),
        f"mapet study {config.out / CONFIG_FILE}",
    )
    return Study(title, get_compared_factor(config), completed, baselines, notes, command)


def _evaluate_baselines(
    config: StudyConfig, trials: list[Trial], evaluate_missing: bool
) -> dict[str, dict[str, float]]:
    """Return the scores of each model of the grid untrained (frozen, and fine-tuned from scratch), averaged over the seeds.

    They are kept in the study's run.json, after each model, so that a study that is stopped does not evaluate them again.

    Args:
        config: of the study.
        trials: their levels of the factors 'model' and 'model_args' tell the models; if neither is varied there is a single one.
        evaluate_missing: whether to evaluate models that have no scores yet, if one of their trials is pre-trained: its backbone gives
            the architecture. Others have no entry.

    Returns:
        'untrained ViT MODEL' -> metric -> accuracy (0..1), metrics as in `evaluate`.
    """
    state = try_read_state(config.out)
    baselines: dict[str, dict[str, float]] = dict(state.results.get("baselines", {})) if state else {}
    for trial in trials:
        model = ", ".join(level for factor, level in trial.factors.items() if factor in ("model", "model_args"))
        name = f"untrained ViT {model}".strip()
        if evaluate_missing and name not in baselines and (trial_folder(config, trial) / "pretrain/backbone").exists():
            log.info("--- evaluating the baseline %s: frozen, and trained from scratch", name)
            options = trial_config(config, trial, 0)  # the number of images is used for costs alone
            by_seed = [evaluate(options, config.devices[0], seed, pretrained=False) for seed in config.seeds]
            baselines[name] = {metric: fmean(scores[metric] for scores in by_seed) for metric in by_seed[0]}
            record(config.out, results={"baselines": baselines})
    return baselines


def read_tokenizers(config: StudyConfig) -> dict[str, tuple[FitTokenizerConfig, Tokenizer | None]]:
    """Return name -> (config of `fit-tokenizer`, tokenizer without its teacher, or None until it is fitted) of each tokenizer.

    Raises:
        MapetError: see `tokenizer_configs`; or a fitted tokenizer cannot be read.
    """
    tokenizers: dict[str, tuple[FitTokenizerConfig, Tokenizer | None]] = {}
    for name in config.tokenizers:
        fitting, _ = tokenizer_configs(config, name)
        is_fitted = not is_empty_dir(fitting.out)
        tokenizers[name] = fitting, load_tokenizer(fitting.out, with_teacher=False) if is_fitted else None
    return tokenizers
