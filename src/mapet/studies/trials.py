"""A study: its grid of trials, its tokenizers, each trial in a process of its own and evaluated alike, and what came out of them."""

import fcntl
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from tqdm import tqdm

from mapet.config.base import Config, build_config, diff_configs, read_config, write_config
from mapet.config.evaluation import FinetuneConfig, FinetuneOptions
from mapet.config.pipeline import StudyConfig
from mapet.config.pretraining import PretrainConfig, PretrainOptions
from mapet.config.shared import is_custom_teacher
from mapet.config.tokenizers import FitTokenizerConfig, TokenizeConfig
from mapet.device import ComputeContext, usable_cores
from mapet.errors import Interrupted, MapetError, did_you_mean, format_size, option
from mapet.evaluation.datasets import train_and_test
from mapet.evaluation.features import RANDOM, BackboneWrapper, CacheConfig, FeatureCache
from mapet.evaluation.probes import probe_accuracy
from mapet.files import is_empty_dir
from mapet.run_state import CONFIG_FILE, RunState, record, run_state, try_read_state
from mapet.signals import stop_signals
from mapet.studies.statistics import COMPUTE, EPOCHS, Study, Trial
from mapet.tokenizers.stages import fit_tokenizer, tokenize
from mapet.tokenizers.tokenizer import load_tokenizer
from mapet.training.estimate import flops_per_image
from mapet.training.tasks.finetuning import FinetuningTask
from mapet.training.tasks.pretraining import PretrainingTask
from mapet.training.trainer import Trainer

log = logging.getLogger("mapet")
SAME_TOKENS = frozenset({"memory_gb", "images", "out", "tokenizer", "device", "resume", "trust_teacher"})
"""Options that change no token: how fast, and where things are, whose hashes are compared elsewhere."""
SAME_TRIAL = frozenset({"images", "out", "tokenizer", "tokens", "device", "trust_teacher", "track"})
"""Options that may differ when a trial is resumed: the study may have moved, and trackers are only told."""
EVALUATION = frozenset({"finetune", "test_images", "ood_images", "labels_per_class"})
Axes = dict[str, dict[str, dict[str, Any]]]
"""Name of a factor -> name of a value -> the options that it stands for."""


class TrialConfig(Config):
    """Everything that a trial's process needs to know.

    Attributes:
        labels_per_class: None means all.
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
    """Return every combination with every seed, at equal epochs; all of one seed first.

    Raises:
        MapetError: a doubled value, an unknown name, options that `pretrain` refuses.
    """
    axes = _axes(config)
    if (name := compared_factor(config)) not in axes:
        known = f"{option('compare_by')} takes one of {', '.join(axes)}"
        raise MapetError(f"compare_by: '{name}' is not varied{did_you_mean(name, axes)}; {known}")
    if len(set(config.seeds)) < len(config.seeds):
        raise MapetError(f"seeds: {config.seeds} has one twice")
    trials: dict[str, Trial] = {}
    for names in itertools.product(*axes.values()):
        factors = dict(zip(axes, names, strict=True))
        options: dict[str, Any] = {"epochs": PretrainConfig.model_fields["epochs"].default}
        for chosen in [config.pretrain.model_dump(exclude_unset=True), *(axes[axis][factors[axis]] for axis in axes)]:
            options |= chosen
        tokenizer = str(options.pop("tokenizer", next(iter(config.tokenizers))))
        if tokenizer not in config.tokenizers:
            raise MapetError(f"grid: no tokenizer '{tokenizer}'{did_you_mean(tokenizer, config.tokenizers)}")
        try:
            resolved = build_config(PretrainOptions, options).model_dump_json() + tokenizer
        except MapetError as error:
            raise MapetError(f"grid, {factors}: {error}") from None
        if resolved in trials:
            raise MapetError(f"grid: {factors} and {trials[resolved].factors} are the same trial")
        trials[resolved] = Trial(factors, 0, tokenizer, options)
    return [replace(trial, seed=seed) for seed in config.seeds for trial in trials.values()]


def _axes(config: StudyConfig) -> Axes:
    known = [*PretrainOptions.model_fields, "tokenizer"]
    axes: Axes = {}
    for name, values in config.grid.items():
        if isinstance(values, list) and name not in known:
            raise MapetError(
                f"grid: '{name}' is no option of `pretrain`{did_you_mean(name, known)}; options that vary together are "
                f"written {name}: {{NAME: {{option: value}}}}"
            )
        if isinstance(values, dict):
            axes[name] = values
        else:
            words = [" to ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
            axes[name] = {word: {name: value} for word, value in zip(words, values, strict=True)}
        if not values or len(axes[name]) < len(values):
            raise MapetError(f"grid: '{name}' has {f'a value twice: {values}' if values else 'no values'}")
    return axes


def compared_factor(config: StudyConfig) -> str:
    """Return the varied name whose values are compared."""
    return config.compare_by or (next(iter(config.grid)) if len(config.grid) == 1 else "objective")


def with_budgets(config: StudyConfig, trials: list[Trial]) -> list[Trial]:
    """Return the trials with their cost, and longer ones that cost as much as the most expensive of their comparison."""
    costs: dict[str, float] = {}
    for trial in trials:
        if str(trial.factors) not in costs:
            made = not is_empty_dir(tokenizer_folder(config, trial.tokenizer) / "tokenizer")
            costs[str(trial.factors)] = flops_per_image(pretrain_config(config, trial)) if made else 0.0
    trials = [replace(trial, flops_per_image=costs[str(trial.factors)]) for trial in trials]
    if not config.equal_compute:
        return trials
    compare, result = compared_factor(config), []
    for trial in trials:
        epochs, rivals = (
            trial.options["epochs"],
            [one for one in trials if one.condition(compare) == trial.condition(compare)],
        )
        if trial.flops_per_image:
            most = max(rival.flops_per_image * rival.options["epochs"] for rival in rivals)
            epochs = round(most / trial.flops_per_image)
        if epochs == trial.options["epochs"]:
            result.append(replace(trial, budgets=(EPOCHS, COMPUTE)))
        else:
            result += [trial, replace(trial, options=trial.options | {"epochs": epochs}, budgets=(COMPUTE,))]
    return result


# ---- options of the commands


def tokenizer_folder(config: StudyConfig, name: str) -> Path:
    """Return the folder that holds `tokenizer` and `tokens`."""
    return config.out / "tokenizers" / name


def tokenizer_configs(config: StudyConfig, name: str) -> tuple[FitTokenizerConfig, TokenizeConfig]:
    """Return what `fit-tokenizer` and `tokenize` are called with.

    Raises:
        MapetError: options that contradict each other, or other options than those it was made with.
    """
    folder, options = tokenizer_folder(config, name), config.tokenizers[name].model_dump(exclude_unset=True)
    shared = {"images": config.images, "device": config.devices[0], "resume": True}
    try:
        fitting = build_config(FitTokenizerConfig, options | shared | {"out": folder / "tokenizer"})
    except MapetError as error:
        raise MapetError(f"tokenizer '{name}': {error}") from None
    teacher = fitting.teacher if is_custom_teacher(fitting.teacher) else None
    given = {"out": folder / "tokens", "tokenizer": fitting.out, "trust_teacher": teacher}
    tokenizing = build_config(TokenizeConfig, config.tokenize.model_dump(exclude_unset=True) | shared | given)
    for now in (fitting, tokenizing):
        state = try_read_state(now.out)
        if state and (changed := diff_configs(build_config(type(now), state.config), now, SAME_TOKENS)):
            raise MapetError(
                f"{folder} was made with other options ({'; '.join(changed)}): use the same, another name for it, or a new {option('out')}"
            )
    return fitting, tokenizing


def trial_folder(config: StudyConfig, trial: Trial) -> Path:
    """Return where a trial's run.json, trial.log and pre-training run lie."""
    return config.out / "trials" / re.sub(r"[^\w.=+-]+", "_", trial.name)


def pretrain_config(config: StudyConfig, trial: Trial) -> PretrainConfig:
    """Return what `pretrain` is called with."""
    folder, teacher = tokenizer_folder(config, trial.tokenizer), config.tokenizers[trial.tokenizer].teacher
    given = {"images": config.images, "out": trial_folder(config, trial) / "pretrain", "seed": trial.seed}
    given |= {"tokenizer": folder / "tokenizer", "tokens": folder / "tokens"}
    return build_config(
        PretrainConfig, trial.options | given | {"trust_teacher": teacher if is_custom_teacher(teacher) else None}
    )


def trial_config(config: StudyConfig, trial: Trial, num_images: int) -> TrialConfig:
    """Return what a trial's process is called with."""
    return TrialConfig(
        pretrain=pretrain_config(config, trial), finetune=config.finetune, test_images=config.test_images,
        ood_images=config.ood_images, num_images=num_images, flops_per_epoch=trial.flops_per_image * num_images,
        labels_per_class=[None if amount == "all" else amount for amount in config.labels_per_class],
    )  # fmt: skip


def check_same_trial(folder: Path, now: TrialConfig) -> None:
    """Check that a trial that was begun has the same options; how it is evaluated may change until it is.

    Raises:
        MapetError: its options are others.
    """
    state = try_read_state(folder)
    if state is None or not (folder / "pretrain").exists():
        return
    old = build_config(TrialConfig, state.config)
    free = frozenset({"pretrain", "flops_per_epoch"}) | (frozenset() if state.status == "finished" else EVALUATION)
    if changed := diff_configs(old.pretrain, now.pretrain, SAME_TRIAL) + diff_configs(old, now, free):
        raise MapetError(
            f"{folder} was run with other options ({'; '.join(changed)}): use the same, or a new {option('out')}"
        )


# ---- running


def make_tokenizers(config: StudyConfig, names: set[str]) -> dict[str, str]:
    """Fit each and store its tokens; return name -> reason for those that could not be made."""
    broken = {}
    for name in sorted(names):
        fitting, tokenizing = tokenizer_configs(config, name)
        try:
            if is_empty_dir(fitting.out):
                log.info("--- tokenizer %s", name)
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
    """Whether a trial was evaluated."""
    return bool((state := try_read_state(folder)) and state.status == "finished")


def run_trials(config: StudyConfig, trials: list[Trial], broken: dict[str, str], num_images: int) -> str:
    """Run each in a process of its own, one at a time on each device.

    Args:
        broken: name of a tokenizer -> why it could not be made.

    Returns:
        The name of the signal that stopped them, or ''.
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
    log.info("%d trials, %d of them to run, log of each in its folder in %s", len(trials), len(waiting), config.out)
    running: dict[int, tuple[Path, subprocess.Popen[bytes]]] = {}  # by index of the device
    threads = max(1, usable_cores() // len(config.devices))
    with (
        stop_signals("stopping: the running trials are saved") as stop,
        tqdm(total=len(waiting), desc="study", unit="trial", disable=None, dynamic_ncols=True) as bar,
    ):
        while (waiting and not stop.signal_name) or running:
            for index, device in enumerate(config.devices):
                if index not in running and waiting and not stop.signal_name:
                    folder = waiting.pop(0)
                    running[index] = folder, _start(folder, device, threads)
                    bar.set_postfix_str("; ".join(folder.name for folder, _ in running.values()))
            time.sleep(0.2)
            for _, process in running.values() if stop.signal_name else ():
                process.terminate()
            for _, process in running.values() if stop.signal_name else ():
                process.wait()
            for index, (folder, process) in list(running.items()):
                if process.poll() is not None:
                    del running[index]
                    bar.update()
                    _log_end(folder, process.returncode)
    return stop.signal_name


def _start(folder: Path, device: str, threads: int) -> subprocess.Popen[bytes]:
    """Start `run_trial` in a new session: Ctrl-C reaches the study alone, which asks each process once to save."""
    code = "import sys; from mapet.studies.trials import run_trial; sys.exit(run_trial(*sys.argv[1:]))"
    with (folder / "trial.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), device],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},  # scikit-learn's threads too, or they fight
        )  # fmt: skip


def _log_end(folder: Path, exit_status: int) -> None:
    """Log how a trial ended; one whose process was killed has failed."""
    state = try_read_state(folder) or RunState(command="trial", status="interrupted")
    if state.status == "interrupted":
        end = f"signal {-exit_status}" if exit_status < 0 else f"exit status {exit_status}"
        state.status, state.reason = "failed", f"its process ended with {end}; see {folder / 'trial.log'}"
        state.write(folder)
    if state.status == "finished":
        scores = state.results["scores"].items()
        log.info("%s: %s", folder.name, ", ".join(f"{name} {value:.3f}" for name, value in scores))
    elif state.status == "failed":
        log.warning("%s failed: %s", folder.name, state.reason)


def run_trial(folder_name: str, device: str) -> int:
    """Pre-train and evaluate, with scores or the reason of a failure in run.json; return the process's exit status."""
    folder = Path(folder_name)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of a study that was killed, this trial may be running still
        if is_finished(folder):
            return 0
        config = build_config(TrialConfig, read_config(folder / CONFIG_FILE))
        run = config.pretrain.out
        resume = (run / CONFIG_FILE).exists()
        pretraining = config.pretrain.model_copy(update={"device": device, "resume": resume})
        try:
            with run_state(folder, "trial", config):
                if not (run / "backbone").exists():
                    with run_state(run, "pretrain", pretraining):
                        Trainer(PretrainingTask(), pretraining).fit()
                scores = evaluate(config, device)
                record(folder, results={"scores": scores, "epochs": pretraining.epochs, **learning_curve(config)})
        except (Interrupted, KeyboardInterrupt):
            return Interrupted.exit_code
        except Exception:  # the other trials go on: the report says which failed and why
            traceback.print_exc()
            return 1
    return 0


def evaluate(config: TrialConfig, device: str, seed: int | None = None, pretrained: bool = True) -> dict[str, float]:
    """Evaluate frozen features by linear probe and k-NN on every test set, and fine-tuning.

    Args:
        seed: other than the trial's.
        pretrained: False for the same ViT with random weights.

    Returns:
        Name of the metric -> accuracy (0..1).
    """
    run, images, cache = config.pretrain.out, config.pretrain.images, CacheConfig(progress=False)
    seed = config.pretrain.seed if seed is None else seed
    wrapper = BackboneWrapper.load(f"{'' if pretrained else RANDOM}{run}", ComputeContext.from_options(device), seed)
    fit = FeatureCache.extract(wrapper, train_and_test(images, config.test_images)[0], cache)
    scores: dict[str, float] = {}
    for name, folder in {"": config.test_images, **config.ood_images}.items():
        found = probe_accuracy(fit, FeatureCache.extract(wrapper, train_and_test(images, folder)[1], cache))
        scores |= {f"{metric} on {name}" if name else metric: value for metric, value in found.items()}
    shared = {"backbone": run, "images": images, "test_images": config.test_images, "device": device, "seed": seed}
    for labels in config.labels_per_class:
        given = shared | {"labels_per_class": labels, "from_scratch": not pretrained}
        tuning = build_config(FinetuneConfig, config.finetune.model_dump(exclude_unset=True) | given)
        tuned = Trainer(FinetuningTask(), tuning).fit()
        name = f"finetune, {labels} labels a class" if labels else "finetune, all labels"
        scores[name] = tuned.num_correct / tuned.num_test
    return scores


def learning_curve(config: TrialConfig) -> dict[str, Any]:
    """Return cost and learning curve of a finished run, from its metrics; seconds count training alone."""
    points: list[dict[str, float]] = []
    seconds, epoch = 0.0, 0.0
    for line in (config.pretrain.out / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "loss" in metrics:
            seconds += (metrics["epoch"] - epoch) * config.num_images / metrics["images_per_second"]
            epoch = metrics["epoch"]
        point = {"epoch": epoch, "flops": epoch * config.flops_per_epoch, "seconds": seconds}
        named = {"loss": "loss", "probe/logistic": "logistic", "probe/knn": "knn"}
        points.append(point | {short: metrics[name] for name, short in named.items() if name in metrics})
    return {"flops": epoch * config.flops_per_epoch, "seconds": seconds, "curve": points}


def summarize(config: StudyConfig, trials: list[Trial], measure: bool) -> Study:
    """Return all trials, finished or not, and what to print with them.

    Args:
        measure: the baselines that are not there yet.
    """
    notes = [_describe_tokenizer(config, name) for name in config.tokenizers]
    seen = "what that has seen, labels perhaps, goes into its results."
    taught = {name: options.teacher for name, options in config.tokenizers.items() if options.teacher != "pixels"}
    notes += [
        f"The tokenizer '{name}' uses a pre-trained teacher ({teacher}): {seen}" for name, teacher in taught.items()
    ]
    notes += [
        "'untrained ViT': the same ViT with random weights, frozen; where it is fine-tuned, trained from scratch.",
        "Operations are the student's, forward and backward; minutes are of training alone, on this machine.",
    ]
    for name, section in {"pretrain": config.pretrain, "finetune": config.finetune}.items():
        shared = section.model_dump(mode="json", exclude_unset=True)
        notes.append(f"{name}: " + (", ".join(f"{key} {value}" for key, value in shared.items()) or "all defaults"))
    results = []
    for trial in trials:
        state = try_read_state(trial_folder(config, trial))
        found = state.results if state and state.status == "finished" else {}
        results.append(replace(trial, status=state.status, reason=state.reason, **found) if state else trial)
    title = f"Study of {Path(config.images).name}: {', '.join(config.grid)}"
    baselines, command = _baselines(config, trials, measure), f"mapet study {config.out / CONFIG_FILE}"
    return Study(title, compared_factor(config), results, baselines, notes, command)


def _baselines(config: StudyConfig, trials: list[Trial], measure: bool) -> dict[str, dict[str, float]]:
    """Evaluate each model of the grid untrained, frozen and fine-tuned from scratch: means over the seeds, kept in run.json."""
    state = try_read_state(config.out)
    found: dict[str, dict[str, float]] = dict(state.results.get("baselines", {})) if state else {}
    for trial in trials:
        model = ", ".join(value for name, value in trial.factors.items() if name in ("model", "model_args"))
        name = f"untrained ViT {model}".strip()
        if measure and name not in found and (trial_folder(config, trial) / "pretrain" / "backbone").exists():
            log.info("--- %s, frozen and fine-tuned from scratch", name)
            options = trial_config(config, trial, 0)
            each = [evaluate(options, config.devices[0], seed, pretrained=False) for seed in config.seeds]
            found[name] = {key: fmean(scores[key] for scores in each) for key in each[0]}
            record(config.out, results={"baselines": found})
    return found


def _describe_tokenizer(config: StudyConfig, name: str) -> str:
    fitting, _ = tokenizer_configs(config, name)
    tokens = "no" if is_empty_dir(fitting.out) else f"{load_tokenizer(fitting.out, with_teacher=False).vocab_size:,}"
    size = f"{format_size(fitting.image_size)} px in patches of {fitting.patch_size}"
    return f"Tokenizer '{name}': teacher {fitting.teacher}, {size}, {tokens} tokens."
