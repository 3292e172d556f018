"""Commands made of others: the whole pipeline (`run`), the demo, and a study, a grid of pre-training runs that are compared."""

import logging
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mapet import commands, distributed
from mapet.commands.command import AnyCommand, command_name
from mapet.commands.planning import plan_run
from mapet.config.base import Config, build_config, diff_configs, merge_options, read_config, write_config
from mapet.config.evaluation import EvaluateConfig
from mapet.config.pipeline import DemoConfig, RunConfig, StudyConfig
from mapet.config.pretraining import PretrainConfig
from mapet.config.tokenizers import FitTokenizerConfig
from mapet.data.digits import write_digits
from mapet.data.sources import list_images
from mapet.errors import Interrupted, MapetError, option, shell_command, spell_in_section
from mapet.evaluation.datasets import LabeledSet, few_shot_split, load_train_test
from mapet.files import create_output_dir, is_empty_dir, read_json
from mapet.reports.metrics import History
from mapet.reports.page import REPORT_FILE, write_run_report
from mapet.reports.render import render_macro
from mapet.reports.study import write_report
from mapet.reports.verdict import format_rows, summarize_comparisons, summarize_loss
from mapet.run_state import CONFIG_FILE, RunState, can_start_in, elapsed_seconds, record, try_read_state
from mapet.signals import RESUME_HINT
from mapet.studies import trials as trial_runs
from mapet.studies.statistics import Trial
from mapet.training.metrics import format_duration
from mapet.training.plan import MAX_EVALUATION_FRACTION, MIN_EVALUATED
from mapet.training.run_folder import STARTING_NEW_RUN, check_trackers_installed, restart_hint
from mapet.training.tasks.pretraining import check_model_config

log = logging.getLogger("mapet")
SHARED_OPTIONS = ("images", "seed", "device", "max_unreadable", "group_by", "limits")
"""Options of `run` that it hands to every stage which has them."""
MIN_CONTROL_MINUTES, MAX_OVERRUN = 0.1, 0.1
"""For controls where no time is left; and the fraction of the time that a run takes longer rather than skip controls of its verdict."""
MIN_EPOCHS = 0.01
"""Epochs of a run whose time is nearly over before it trains: `epochs` must be above 0."""
NUM_DEMO_TRAIN = 1437
"""The first 1,437 of the 1,797 digits; the other 360 were written by other people."""
DEMO_CONFIG: dict[str, Any] = {
    "evaluation_images": NUM_DEMO_TRAIN,
    "fit_tokenizer": {"image_size": 8, "patch_size": 2, "channels": 1, "teacher": "pixels", "vocab_size": 64},
    "tokenize": {"views": "center"},
    "pretrain": {
        "objective": "mapet", "schedule": "cosine", "probe_every": None, "model_args": {"embed_dim": 64, "depth": 4, "num_heads": 4},
        "epochs": 25, "batch_size": 32, "lr": 2e-3, "drop_path": 0.0,
        "layer_scale_init": None, "color_jitter": 0.0,
    },
}  # fmt: skip
DEMO_FINETUNE_CONFIG: dict[str, Any] = {
    "labels_per_class": 10, "views": "center", "epochs": 100, "batch_size": 32, "lr": 2e-3, "drop_path": 0.0
}  # fmt: skip


class Stage(NamedTuple):
    """A command of the pipeline with its config.

    Attributes:
        command: of mapet.
        config: its config.
        started: whether it has written something; until then its options may change.
        done: whether it is finished, or has nothing to do.
    """

    command: AnyCommand
    config: Config
    started: bool
    done: bool


def run(config: RunConfig) -> Path:
    """Plan, run all stages that are not done, then write the run's report; return the folder of the exported backbone.

    Args:
        config: options of `mapet run`.

    Returns:
        The folder of the exported backbone.

    Raises:
        Interrupted: a signal stopped a stage; the message has the command that resumes.
        MapetError: a stage cannot run, or `time` is too short. What can be checked is checked before the first stage starts.
    """
    with spell_in_section("pretrain", RunConfig.model_fields):
        check_trackers_installed(config.pretrain.track)
    config = _complete_config(config)
    stages = _list_stages(config)
    if distributed.rank() == 0:
        _check_later_stages(config, stages)
        _write_or_check_config(config, stages)
    distributed.barrier()  # no rank writes before all have listed the stages from what is there
    RESUME_HINT[0] = resume = shell_command("run", config.out / CONFIG_FILE, "--resume")
    for stage in stages:
        if stage.done:
            continue
        log.info("--- %s", command_name(stage.command))
        if stage.command is commands.evaluate and distributed.rank() == 0:
            # An interrupted evaluation has left this folder; it is repeated.
            shutil.rmtree(config.out / "evaluation", ignore_errors=True)
        try:
            with spell_in_section(stage.command.__name__, RunConfig.model_fields):
                result = stage.command(_fit_to_time(config, stage))
        except (Interrupted, KeyboardInterrupt) as error:  # the latter where a stage has nothing to save
            raise Interrupted(getattr(error, "what", "interrupted"), resume) from None
        if stage.command is commands.evaluate and result:  # None on other ranks
            record(config.out, results={"evaluation": _summarize_evaluation(config, result)})
    if distributed.rank() == 0:
        _record_verdict(config.out)
    write_run_report(config.out)
    backbone = config.out / "pretrain" / "backbone"
    log.info("report in one page: %s", config.out / REPORT_FILE)
    log.info("took %s", format_duration(elapsed_seconds(config.out)))
    log.info(
        "done: backbone in %s; load it with mapet.load(%r) or timm.create_model('local-dir:%s', pretrained=True)",
        backbone, str(config.out), backbone,
    )  # fmt: skip
    return backbone


def _complete_config(config: RunConfig) -> RunConfig:
    """Return the config with the options that are not given: where a run has started those of its config.yaml, else those of a plan.

    The plan is logged, and recorded in run.json. A collective call: rank 0 plans.
    """
    path = config.out / CONFIG_FILE
    if not can_start_in(config.out, "run"):
        if not path.exists():
            create_output_dir(config.out)  # raises: the folder holds something else
        return build_config(RunConfig, merge_options(read_config(path), config.model_dump(exclude_unset=True)), path)
    planned = None
    if distributed.rank() == 0:
        plan, planned = plan_run(config, elapsed_seconds(config.out))
        record(config.out, results={"plan": {**asdict(plan), "reserve": plan.reserve}})
    return distributed.all_gather_object(planned)[0] or config


def _fit_to_time(config: RunConfig, stage: Stage) -> Config:
    """Return the config of a stage, of a run whose epochs are not given fitted to the time that is left of the user's, as measured so far.

    The time since the start of the run counts, also that of earlier sessions. Pre-training gets epochs and minutes; what comes after it is
    reserved as planned. The evaluation gets as many images as the time allows if the machine is as much slower than planned as it was in
    pre-training, and a time after which controls are skipped.
    """
    is_timed = "epochs" not in config.pretrain.model_fields_set and config.pretrain.schedule == "constant"
    if not is_timed or stage.started or stage.command not in (commands.pretrain, commands.evaluate):
        return stage.config
    plan, seconds_left = RunState.read(config.out).results["plan"], 60 * config.time - elapsed_seconds(config.out)
    costs = plan["costs"]
    if isinstance(stage.config, EvaluateConfig):
        trained = try_read_state(config.out / "pretrain")
        epochs = read_config(config.out / "pretrain" / CONFIG_FILE)["epochs"]
        slower = max(1.0, trained.seconds / costs["pretrain"] * plan["epochs"] / epochs if trained else 1.0)
        part = min(1.0, (seconds_left / slower - costs["report"]) / costs["evaluate"])
        count = max(MIN_EVALUATED, round(part * (stage.config.max_images or plan["evaluation_images"])))
        late = seconds_left + MAX_OVERRUN * 60 * config.time - slower * costs["report"]
        limit = min(stage.config.max_control_minutes or math.inf, late / 60)
        count, limit = distributed.all_gather_object((count, max(limit, MIN_CONTROL_MINUTES)))[0]
        return stage.config.model_copy(update={"max_images": count, "max_control_minutes": limit})
    assert isinstance(stage.config, PretrainConfig)
    seconds = max(1.0, seconds_left - plan["reserve"])
    left = torch.tensor([seconds, plan["epochs"] * seconds / costs["pretrain"]], dtype=torch.float64)
    seconds, epochs = distributed.broadcast(left).tolist()
    return stage.config.model_copy(
        update={"epochs": max(epochs, stage.config.warmup_epochs or MIN_EPOCHS), "max_minutes": seconds / 60}
    )


def _record_verdict(out: Path) -> None:
    """Log the verdict of a run, and record it in run.json, from the evaluation there, or without one from the metrics of pre-training."""
    evaluation = RunState.read(out).results.get("evaluation")
    if evaluation:
        num_images = RunState.read(out / "pretrain").counts["images"]
        verdict = summarize_comparisons(evaluation["comparisons"], evaluation["data"]["test_images"], num_images)
    else:
        verdict = summarize_loss(History.read(out / "pretrain" / "metrics.jsonl"))
    for line in ["", *format_rows(verdict.table), verdict.sentence, verdict.advice.replace("RUN", str(out)), ""]:
        log.info("%s", line)
    record(out, results={"verdict": verdict._asdict()})


def _summarize_evaluation(config: RunConfig, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what run.json of a `run` and its report have of the evaluation, by names without the paths of this machine.

    Args:
        config: of the command `run`.
        scores: what `evaluate` returned: of the untrained network, the backbone, the backbone of `init_from` if there is one, and the
            controls, in this order.

    Returns:
        "untrained" and "pretrained", metric -> value; "controls", name -> metric -> value; "verdicts" (against the best control) and
        "comparisons" (of the backbone against each other one), the fields of each `Verdict`; "data"; and "features", their pooling and
        layers.
    """
    evaluated = RunState.read(config.out / "evaluation")
    _, test = load_train_test(config.images, config.test_images, config, config.group_by)
    test = test.sample(evaluated.config["max_images"] or len(test))
    untrained, pretrained, *controls = scores
    names = {untrained: "untrained", pretrained: "pretrained"}
    names |= {name: name.removesuffix(f" of {pretrained}") for name in controls}
    results = evaluated.results

    def rename(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return verdicts on the backbone, with the names of this summary."""
        on_backbone = [each for each in verdicts if each["backbone"] == pretrained]
        return [{**each, **{key: names[each[key]] for key in ("backbone", "control")}} for each in on_backbone]

    return {
        "untrained": scores[untrained],
        "pretrained": scores[pretrained],
        "controls": {names[name]: scores[name] for name in controls},
        "verdicts": rename(results["verdicts"]),
        "comparisons": rename(results["comparisons"]),
        "data": {"majority_accuracy": test.majority_accuracy, "test_images": len(test.labels)},
        "features": config.pretrain.features_description,
    }


def _list_stages(config: RunConfig) -> list[Stage]:
    """Return the five stages of `run` in their order: fit_tokenizer, tokenize, pretrain, evaluate, report.

    All configs are built before any stage runs, so that contradicting options are refused early. A stage counts as done if the folder
    that it writes last is not empty: `tokenizer`, `pretrain/backbone`, `figures`. `evaluate` is done if run.json has its results, or
    if the images have no labels, which is logged. `tokenize` is never done here: it resumes, and checks a finished store by itself.

    Args:
        config: of the command `run`, completed by the plan.

    Raises:
        MapetError: an option of a stage is invalid or contradicts another one.
    """
    tokenizer, tokens, pretrained = (config.out / name for name in ("tokenizer", "tokens", "pretrain"))
    backbone, figures = pretrained / "backbone", config.out / "figures"
    is_fitted, is_tokenized, is_trained, has_figures = (
        not is_empty_dir(path) for path in (tokenizer, tokens, backbone, figures)
    )
    is_training = (pretrained / CONFIG_FILE).exists()
    # The epochs of a run that keeps to a time are those of its last correction.
    started = read_config(pretrained / CONFIG_FILE) if is_training else {}
    steps = {name: started[name] for name in ("epochs", "max_minutes") if started.get("max_minutes") is not None}
    state = try_read_state(config.out)
    is_evaluated = state is not None and "evaluation" in state.results
    has_labels = config.test_images is not None or list_images(config.images, config).classes() is not None
    if not has_labels:
        reason = f"no labels (two class folders or more), and there are no {option('test_images')}"
        log.info("--- not evaluated: %s has %s", config.images, reason)

    others = [config.pretrain.init_from] if config.pretrain.init_from else []

    def stage(command: AnyCommand, started: bool, done: bool, **options: Any) -> Stage:
        """Return a stage whose config has the options of its section of `run`, the shared options, and `options`; later ones win.

        Args:
            command: of the stage; `evaluate` and `report` have no section.
            started, done: attributes of the `Stage`.
            options: fields of the command's config.
        """
        shared = {name: getattr(config, name) for name in SHARED_OPTIONS if name in command.config_type.model_fields}
        section = getattr(config, command.__name__, None)
        in_section = section.model_dump(exclude_unset=True) if section else {}
        with spell_in_section(command.__name__, RunConfig.model_fields):
            return Stage(command, build_config(command.config_type, in_section | shared | options), started, done)

    return [
        stage(commands.fit_tokenizer, is_fitted, is_fitted, out=tokenizer, resume=True, **dict(config.read_options)),
        stage(commands.tokenize, is_tokenized, False, out=tokens, tokenizer=tokenizer, resume=True),
        stage(commands.pretrain, is_training, is_trained, out=pretrained, tokenizer=tokenizer, tokens=tokens, resume=is_training, **steps),
        stage(
            commands.evaluate, is_evaluated, is_evaluated or not has_labels, backbone=[f"random:{backbone}", str(backbone), *others],
            test_images=config.test_images, protocols=["logistic", "knn"], pool=config.pretrain.pool, layers=config.pretrain.layers,
            out=config.out / "evaluation", max_images=config.evaluation_images,
            max_control_minutes=MAX_EVALUATION_FRACTION * config.time,
        ),
        stage(commands.report, has_figures, has_figures, run=[pretrained], figures_dir=figures),
    ]  # fmt: skip


def _check_later_stages(config: RunConfig, stages: list[Stage]) -> None:
    """Check, before the first stage runs, what `pretrain` and `evaluate` would refuse after hours; skip stages that have started.

    Args:
        config: of the command `run`.
        stages: from `_list_stages`.

    Raises:
        MapetError: an unknown model or objective, sizes of tokenizer and model that don't fit, `probe_images` or `test_images`
            without labels, or classes of `test_images` that are not those of `images`.
    """
    fitting, _, pretraining, evaluation, _ = stages
    assert isinstance(fitting.config, FitTokenizerConfig) and isinstance(pretraining.config, PretrainConfig)
    if not pretraining.started:
        with spell_in_section("pretrain", RunConfig.model_fields):
            check_model_config(pretraining.config, fitting.config)
        if config.pretrain.probe_images is not None:
            LabeledSet.from_images(list_images(config.pretrain.probe_images))
    if config.test_images is not None and not evaluation.started:
        try:
            load_train_test(config.images, config.test_images, config, config.group_by)
        except MapetError as error:
            raise MapetError(
                f"{error}. {option('test_images')} test a probe that is trained on the labels of {option('images')}: "
                "label both sets, or omit the test images"
            ) from None


def _write_or_check_config(config: RunConfig, stages: list[Stage]) -> None:
    """Write config.yaml into the folder `config.out`; if a run has started there, first check that its options are the same.

    These options may differ from the earlier config.yaml, which is then replaced: `resume`, `device`, `max_unreadable`, `limits`, `out` (the folder
    may have been moved), the sections of stages that have not started, `test_images` until `evaluate` has started, and the path of
    `images` if the hash of its images is the one that the fitted tokenizer recorded. In a new folder `resume` only logs a warning.

    Args:
        config: of the command `run`.
        stages: from `_list_stages`; only `command` and `started` are used.

    Raises:
        MapetError: other options differ; the folder holds something else; or, in a new folder, the images can't be listed.
    """
    path = config.out / CONFIG_FILE
    # Without epochs the time decides.
    exclude = {} if "epochs" in config.pretrain.model_fields_set else {"pretrain": {"epochs"}}
    if can_start_in(config.out, "run"):
        if config.resume:
            log.warning(STARTING_NEW_RUN, config.out)
        return write_config(config, path, exclude)
    old = build_config(RunConfig, read_config(path), path)
    mutable = {"resume", "device", "max_unreadable", "limits", "out"}
    mutable |= {stage.command.__name__ for stage in stages if not stage.started}
    if "evaluate" in mutable:
        mutable.add("test_images")
    description = config.out / "tokenizer" / "visual_tokenizer.json"
    if old.images != config.images and description.is_file():
        old_hash = read_json(description, "tokenizer")["fit_config"].get("images_hash")
        if old_hash == list_images(config.images, config).hash:
            mutable.add("images")
    if changed := diff_configs(old, config, frozenset(mutable)):
        with spell_in_section("pretrain", RunConfig.model_fields):
            restart = restart_hint(config.out)
        raise MapetError(
            f"{config.out} was started with another config ({'; '.join(changed)}). To resume it as it was: "
            f"{shell_command('run', path, '--resume')}; to start {restart}"
        )
    write_config(config, path, exclude)


def demo(config: DemoConfig) -> dict[str, dict[str, float]]:
    """Run the pipeline on scikit-learn's digits, and compare its backbone with random weights and with raw pixels.

    Args:
        config: options of `mapet demo`.

    Returns:
        "untrained" and "pretrained" -> "logistic", "knn" and "finetune" -> accuracy (0..1) on 360 digits; "raw pixels" has no "finetune".

    Raises:
        Interrupted: a signal stopped it; the message has the command that resumes.
    """
    if not (config.resume and config.out.exists()):
        create_output_dir(config.out)
    started = time.monotonic()
    train, test = write_digits(config.out / "digits", NUM_DEMO_TRAIN)
    shared = {"images": train, "test_images": test, "seed": config.seed}
    try:
        backbone = commands.run(**shared, out=config.out / "run", resume=config.resume, **DEMO_CONFIG)
    except Interrupted as error:
        raise Interrupted(error.what, shell_command("demo", "--out", config.out, "--resume")) from None
    results = RunState.read(config.out / "run").results["evaluation"]
    log.info("--- finetune, 10 labels a class")
    for name in ("untrained", "pretrained"):
        results[name]["finetune"] = commands.finetune(
            **shared, **DEMO_FINETUNE_CONFIG, backbone=backbone, from_scratch=name == "untrained"
        )
    record(config.out, results=results)
    table = {"raw pixels": results["controls"]["raw pixels"]} | {
        name: results[name] for name in ("untrained", "pretrained")
    }
    rows = {"logistic": "linear probe", "knn": "k-NN", "finetune": "fine-tuned, 10 labels a class"}
    log.info("\n%-32s%12s%12s%12s", "accuracy on 360 unseen digits", *table)
    for metric, title in rows.items():
        cells = [f"{scores[metric]:.3f}" if metric in scores else "" for scores in table.values()]
        log.info("%-32s%12s%12s%12s", title, *cells)
    log.info("%-32s%12.3f", "(always guessing one digit)", results["data"]["majority_accuracy"])
    log.info(
        "the demo shows that everything works, not that pre-training pays: on digits of 8 px raw pixels are ahead\n"
    )
    log.info("figures in %s; %.0f s in all", config.out / "run" / "figures", time.monotonic() - started)
    return table


def study(config: StudyConfig) -> Path:
    """Fit tokenizers, run and evaluate each trial that is not finished, and write the report; return the report's folder.

    Args:
        config: options of `mapet study`.

    Returns:
        The report's folder.

    Raises:
        Interrupted: a signal stopped it; the report has the finished trials (while tokenizers are made, no report is written).
        MapetError: options that a trial would refuse. A trial that fails later does not stop the others.
    """
    trials = trial_runs.grid_trials(config)
    num_images = len(list_images(config.images))
    _check_study(config, trials, num_images)
    write_config(config, config.out / CONFIG_FILE)
    broken, stop_signal = {}, ""
    if not config.report_only:
        for line in trial_runs.describe_plan(config, trials, num_images):
            log.info("%s", line)
        broken = trial_runs.make_tokenizers(config, {trial.tokenizer for trial in trials})
    trials = trial_runs.add_equal_compute(config, trials)  # the tokenizers are there now, so that all costs are known
    if not config.report_only:
        stop_signal = trial_runs.run_trials(config, trials, broken, num_images)
    evaluate_baselines = not config.report_only and not stop_signal
    sections = {"pretrain": config.pretrain, "finetune": config.finetune}
    section_options = {name: section.model_dump(mode="json", exclude_unset=True) for name, section in sections.items()}
    notes = (
        render_macro("study_notes.md", "notes", trial_runs.read_tokenizers(config), section_options)
        .strip()
        .splitlines()
    )
    report = config.out / "report"
    write_report(trial_runs.collect_results(config, trials, notes, evaluate_baselines), report)
    num_finished = sum(trial_runs.is_finished(trial_runs.trial_folder(config, trial)) for trial in trials)
    finished = f"{num_finished} of {len(trials)} trials are finished"
    log.info("%s; report in %s", finished, report / "report.html")
    if stop_signal:
        raise Interrupted(f"stopped by {stop_signal}: {finished}, running ones are saved", "the same command")
    return report


def _check_study(config: StudyConfig, trials: list[Trial], num_images: int) -> None:
    """Check, before anything is written, what a trial would refuse after hours.

    Args:
        config: options of `mapet study`.
        trials: of the grid, without those for equal compute.
        num_images: training images.

    Raises:
        MapetError: a tokenizer or a trial that was started with other options; no such model or objective, sizes that don't fit,
            other classes in a test set, fewer labels than `labels_per_class`.
    """
    fitting = {name: trial_runs.tokenizer_configs(config, name)[0] for name in config.tokenizers}
    train, _ = load_train_test(config.images, config.test_images)
    for folder in config.ood_images.values():
        load_train_test(config.images, folder)
    for amount in config.labels_per_class:
        try:
            few_shot_split(train, 1 if amount == "all" else amount, seed=0)
        except MapetError as error:
            raise MapetError(f"{option('labels_per_class')}: {error}", field="labels_per_class", value=amount) from None
    for trial in trial_runs.add_equal_compute(config, trials):
        trial_folder = trial_runs.trial_folder(config, trial)
        trial_runs.check_same_trial(trial_folder, trial_runs.trial_config(config, trial, num_images))
    if config.report_only:
        return
    for trial in trials:  # those of one seed: the others differ in nothing that is checked
        if trial.seed == config.seeds[0] and not (trial_runs.trial_folder(config, trial) / "pretrain").exists():
            try:
                check_model_config(trial_runs.pretrain_config(config, trial), fitting[trial.tokenizer])
            except MapetError as error:
                raise MapetError(f"grid, trial {trial.name}: {error}") from None
