"""What came out of a study: its trials, and the same ViTs without pre-training beside them."""

import logging
from pathlib import Path
from statistics import fmean

from mapet.config.pipeline import StudyConfig
from mapet.errors import by
from mapet.files import is_free
from mapet.run_state import CONFIG_FILE, read_or_none, record
from mapet.studies.grid import Trial, compared_factor, trial_folder
from mapet.studies.statistics import Study, TrialResult
from mapet.studies.tokenizers import tokenizer_configs
from mapet.studies.trials import evaluate, trial_config
from mapet.tokenizers.tokenizer import load_tokenizer

log = logging.getLogger("mapet")


def summarize(config: StudyConfig, trials: list[Trial], measure: bool) -> Study:
    """Return all trials, finished or not, and what to print with them.

    Args:
        measure: the baselines that are not there yet.
    """
    notes = [_describe_tokenizer(config, name) for name in config.tokenizers]
    notes += [
        f"The tokenizer '{name}' uses a pre-trained teacher ({options.teacher}): what that has seen, labels perhaps, goes into its results."
        for name, options in config.tokenizers.items()
        if options.teacher != "pixels"
    ]
    notes.append(
        "'untrained ViT': the same ViT with random weights, frozen; where it is fine-tuned, trained from scratch."
    )
    notes.append("Operations are the student's, forward and backward; minutes are of training alone, on this machine.")
    for name, section in {"pretrain": config.pretrain, "finetune": config.finetune}.items():
        shared = section.model_dump(mode="json", exclude_unset=True)
        notes.append(f"{name}: " + (", ".join(f"{key} {value}" for key, value in shared.items()) or "all defaults"))
    return Study(
        title=f"Study of {Path(config.images).name}: {', '.join(config.grid)}",
        compare=compared_factor(config),
        trials=[_result(config, trial) for trial in trials],
        baselines=_baselines(config, trials, measure),
        notes=notes,
        command=f"mapet study {config.out / CONFIG_FILE}",
    )


def _baselines(config: StudyConfig, trials: list[Trial], measure: bool) -> dict[str, dict[str, float]]:
    """Evaluate each model of the grid untrained, frozen and fine-tuned from scratch: means over the seeds, kept in run.json."""
    state = read_or_none(config.out)
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


def _result(config: StudyConfig, trial: Trial) -> TrialResult:
    state = read_or_none(trial_folder(config, trial))
    status, reason = (state.status, state.reason) if state else ("not run", "")
    results = state.results if state and status == "finished" else {}
    return TrialResult(trial.name, trial.factors, trial.seed, trial.budgets, status, reason, **results)


def _describe_tokenizer(config: StudyConfig, name: str) -> str:
    fitting, _ = tokenizer_configs(config, name)
    tokens = "no" if is_free(fitting.out) else f"{load_tokenizer(fitting.out, with_teacher=False).vocab_size:,}"
    size = f"{by(fitting.image_size)} px in patches of {fitting.patch_size}"
    return f"Tokenizer '{name}': teacher {fitting.teacher}, {size}, {tokens} tokens."
