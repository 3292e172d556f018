"""Stage: a grid of pre-training runs, each evaluated alike, and the report that compares them."""

import itertools
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from mapet.errors import Interrupted, MapetError, did_you_mean
from mapet.recipe import Config, build, section, stage, to_yaml
from mapet.stages.finetune import FinetuneConfig, finetune
from mapet.stages.fit_tokenizer import fit_tokenizer
from mapet.stages.options import usable_cores
from mapet.stages.pretrain import PretrainConfig, pretrain
from mapet.stages.run import SET_HERE, FitTokenizerOptions, PretrainOptions, TokenizeOptions
from mapet.stages.tokenize import tokenize

if TYPE_CHECKING:
    from mapet.report.comparison import Cell

log = logging.getLogger("mapet")
FinetuneOptions = section(FinetuneConfig, SET_HERE | {"scratch", "labels_per_class", "label_share"})
EPOCHS, COMPUTE = "equal epochs", "equal compute"


class StudyConfig(Config):
    """Options of `study`, usually a YAML file."""

    images: Path
    """Folder of images in class folders, or text file of paths: to pre-train on (without labels) and to train probes on."""
    test_images: Path
    """Labelled images to test on."""
    out: Path
    """Folder of the study; what is done in it already is not done again."""
    other_test_images: dict[str, Path] = Field(default_factory=dict)
    """Further test sets of the same classes (out of distribution): name=folder."""
    tokenizers: dict[str, FitTokenizerOptions] = Field(default_factory=dict)  # type: ignore[valid-type]
    """name -> options of `fit-tokenizer`."""
    tokenize: TokenizeOptions = TokenizeOptions()  # type: ignore[valid-type]
    pretrain: PretrainOptions = PretrainOptions()  # type: ignore[valid-type]
    finetune: FinetuneOptions = FinetuneOptions()  # type: ignore[valid-type]
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]]
    """What is varied: an option of `pretrain`, or `tokenizer`, with a list of values; or any name, with name -> options."""
    seeds: list[NonNegativeInt] = Field([0, 1, 2])
    """Each cell is run with each: weights, order, views and permutations are those of the seed."""
    compare: str = "objective"
    """The varied name whose values are compared in pairs, all else being equal."""
    equal_compute: bool = True
    """Run cheaper values also for more epochs, until they cost as many operations as the dearest."""
    labels_per_class: list[PositiveInt] = Field([10])
    """Fine-tune on so many labels of each class."""
    full_finetune: bool = False
    """Fine-tune on all labels as well."""
    devices: list[str] = Field(["auto"])
    """One process for each: auto, cuda:0, cuda:1, ...; cpu cpu: two that share the cores (faster, for small models)."""
    report_only: bool = False
    """Run nothing: write the report of what is done."""


@dataclass(frozen=True)
class Spec:
    """One cell: what to run.

    Attributes:
        factors: the grid's name -> the value's.
        options: of `pretrain`.
        budgets: the comparisons it takes part in.
    """

    factors: dict[str, str]
    seed: int
    tokenizer: str
    options: dict[str, Any]
    budgets: tuple[str, ...] = (EPOCHS,)
    flops_per_image: float = 0.0

    @property
    def name(self) -> str:
        words = [*(value for _, value in sorted(self.factors.items())), f"seed {self.seed}"]
        return ", ".join([*words, *([] if EPOCHS in self.budgets else [f"{self.options['epochs']} epochs"])])

    @property
    def folder(self) -> str:
        return file_name(self.name)


def file_name(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)


@stage
def study(config: StudyConfig) -> Path:
    """Compare objectives, tokenizers, ratios, models: run a grid, evaluate each cell, report; returns the report's folder.

    Example:
      mapet study study.yaml
      mapet study study.yaml --devices cuda:0 cuda:1
      mapet study study.yaml --report-only
    """
    from mapet.data.image_list import scan
    from mapet.evaluation.features import train_and_test
    from mapet.files import atomic

    cells = grid_cells(config)
    for name, folder in {"test_images": config.test_images, **config.other_test_images}.items():
        log.debug("%s: %d classes", name, len(train_and_test(config.images, folder)[0].classes))  # fail before work
    num_images = len(scan(config.images))
    with atomic(config.out / "study.yaml") as temporary:
        temporary.write_text(f"# mapet study {config.out / 'study.yaml'}\n{to_yaml(config)}", encoding="utf-8")
    broken = {} if config.report_only else make_tokenizers(config, {cell.tokenizer for cell in cells})
    cells = with_budgets(config, cells, set(broken))
    stopped = None if config.report_only else run_cells(config, cells, broken, num_images)
    baselines = {} if config.report_only or stopped else measure_baselines(config, cells)
    report = write(config, cells, baselines)
    if stopped:
        done = sum((cell_folder(config, cell) / "result.json").exists() for cell in cells)
        raise Interrupted(
            f"stopped by {stopped}: {done} of {len(cells)} cells are done, the others saved. Go on with the same command"
        )
    return report


# ---- the grid


def grid_cells(config: StudyConfig) -> list[Spec]:
    """Every combination, with every seed, at equal epochs.

    Raises:
        MapetError: an empty or doubled value, an unknown name, options that `pretrain` refuses.
    """
    known = [*PretrainOptions.model_fields, "tokenizer"]
    if not config.grid:
        raise MapetError("the grid is empty: give at least one name with values, e.g. objective: [mim, pim, mapet]")
    if not config.tokenizers:
        raise MapetError("no tokenizers: give at least one, e.g. tokenizers: {pixels: {image_size: 32, patch_size: 4}}")
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in config.grid.items():
        if isinstance(values, list) and name not in known:
            raise MapetError(
                f"grid: '{name}' is no option of `pretrain`{did_you_mean(name, known)}; options that vary together are "
                f"written {name}: {{NAME: {{option: value}}}}"
            )
        axis = values if isinstance(values, dict) else {_word(value): {name: value} for value in values}
        if not axis or len(axis) < len(values):
            raise MapetError(f"grid: '{name}' has {'no values' if not axis else f'a value twice: {values}'}")
        axes[name] = axis
    if config.compare not in axes:
        raise MapetError(f"compare: '{config.compare}' is not varied{did_you_mean(config.compare, axes)}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise MapetError(f"seeds: {config.seeds} has {'none' if not config.seeds else 'one twice'}")
    shared = config.pretrain.model_dump(exclude_unset=True)  # type: ignore[attr-defined]
    seen: dict[str, Spec] = {}
    for names in itertools.product(*axes.values()):
        factors = dict(zip(axes, names, strict=True))
        options = dict(shared)
        for axis_name, value in factors.items():
            options |= axes[axis_name][value]
        tokenizer = str(options.pop("tokenizer", next(iter(config.tokenizers))))
        if tokenizer not in config.tokenizers:
            raise MapetError(f"grid: no tokenizer '{tokenizer}'{did_you_mean(tokenizer, config.tokenizers)}")
        options.setdefault("epochs", PretrainConfig.model_fields["epochs"].default)
        try:
            resolved = build(PretrainOptions, options).model_dump_json() + tokenizer
        except MapetError as error:
            raise MapetError(f"grid, {factors}: {error}") from None
        if resolved in seen:
            raise MapetError(f"grid: {factors} and {seen[resolved].factors} are the same cell")
        seen[resolved] = Spec(factors, 0, tokenizer, options)
    return [replace(cell, seed=seed) for seed in config.seeds for cell in seen.values()]  # all of one seed first


def _word(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)


def with_budgets(config: StudyConfig, cells: list[Spec], broken: set[str]) -> list[Spec]:
    """The cells with their cost, and those that are run longer to cost as much as the dearest of their comparison."""
    costs: dict[tuple[str, ...], float] = {}

    def cost(cell: Spec) -> float:
        key = tuple(cell.factors.values())
        if key not in costs:
            costs[key] = 0.0 if cell.tokenizer in broken else flops_per_image(pretrain_config(config, cell))
        return costs[key]

    cells = [replace(cell, flops_per_image=cost(cell)) for cell in cells]
    if not config.equal_compute:
        return cells
    found = []
    for cell in cells:
        rivals = [c for c in cells if _without(c.factors, config.compare) == _without(cell.factors, config.compare)]
        most = max(c.flops_per_image * c.options["epochs"] for c in rivals)
        epochs = round(most / cell.flops_per_image) if cell.flops_per_image else cell.options["epochs"]
        if epochs == cell.options["epochs"]:
            found.append(replace(cell, budgets=(EPOCHS, COMPUTE)))
        else:
            longer = replace(cell, options=cell.options | {"epochs": epochs}, budgets=(COMPUTE,))
            found += [cell, longer]
    return found


def _without(factors: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in factors.items() if key != name}


def pretrain_config(config: StudyConfig, cell: Spec) -> PretrainConfig:
    from mapet.tokenizer.teacher import is_own_code

    tokenizer = config.out / "tokenizers" / cell.tokenizer
    teacher = getattr(config.tokenizers[cell.tokenizer], "teacher")  # noqa: B009 (a made-up class)
    given = {
        "images": config.images,
        "out": cell_folder(config, cell) / "pretrain",
        "tokenizer": tokenizer / "tokenizer",
        "tokens": tokenizer / "tokens",
        "teacher": teacher if is_own_code(teacher) else None,
        "seed": cell.seed,
    }
    return build(PretrainConfig, cell.options | given)


def cell_folder(config: StudyConfig, cell: Spec) -> Path:
    return config.out / "cells" / cell.folder


def flops_per_image(config: PretrainConfig) -> float:
    """Operations of the student's forward and backward pass for one image, counted by PyTorch as they are computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mapet.model.objective import num_context_of
    from mapet.tokenizer.codebook import load_tokenizer
    from mapet.training.build import build_model

    model = build_model(config, load_tokenizer(config.tokenizer, with_teacher=False)).to("meta").train()
    low, high = config.predict_ratio or (None, None)
    contexts = [model.num_context]
    if low is not None and high is not None and low != high:
        contexts = [num_context_of(low + (high - low) * (i + 0.5) / 8, model.num_patches) for i in range(8)]
    meta = {"device": "meta"}
    images = torch.empty(1, model.vit.in_chans, *model.vit.patch_embed.img_size, **meta)
    permutation = torch.zeros(1, model.num_patches, dtype=torch.int64, **meta)
    targets = permutation
    if model.target != "tokens":
        targets = torch.empty(1, model.num_patches, model.head.out_features, **meta)
    with FlopCounterMode(display=False) as counter:
        for c in contexts:
            model(images, targets, permutation, c).loss.backward()
    return counter.get_total_flops() / len(contexts)


# ---- running it


def make_tokenizers(config: StudyConfig, names: set[str]) -> dict[str, str]:
    """Fit and store the tokens of each; name -> reason for those that could not be made."""
    from mapet.tokenizer.teacher import is_own_code

    broken = {}
    for name in sorted(names):
        folder, options = config.out / "tokenizers" / name, config.tokenizers[name].model_dump(exclude_unset=True)  # type: ignore[attr-defined]
        shared: dict[str, Any] = {"images": config.images, "device": config.devices[0]}
        teacher = options.get("teacher", "pixels")
        try:
            if not (folder / "tokenizer").exists():
                log.info("--- tokenizer %s", name)
                fit_tokenizer(**shared, **options, out=folder / "tokenizer")
            tokens = config.tokenize.model_dump(exclude_unset=True)  # type: ignore[attr-defined]
            own = {"teacher": teacher} if is_own_code(teacher) else {}
            tokenize(**shared, **tokens, **own, tokenizer=folder / "tokenizer", out=folder / "tokens", resume=True)
        except MapetError as error:
            broken[name] = str(error)
            log.warning("tokenizer %s: %s", name, error)
    return broken


def run_cells(config: StudyConfig, cells: list[Spec], broken: dict[str, str], num_images: int) -> str | None:
    """Each in a process of its own, one at a time on each device; returns the signal that stopped it, if one did."""
    from tqdm import tqdm

    from mapet.files import write_json
    from mapet.training.loop import stop_signals

    waiting = []
    for cell in cells:
        folder, job = cell_folder(config, cell), _job(config, cell, num_images)
        _refuse_other(folder, job)
        (folder / "failure.json").unlink(missing_ok=True)
        if cell.tokenizer in broken:
            write_json(folder / "failure.json", {"reason": f"tokenizer {cell.tokenizer}: {broken[cell.tokenizer]}"})
        elif not (folder / "result.json").exists():
            write_json(folder / "cell.json", job)
            waiting.append(cell)
    log.info("%d cells, %d of them to run, log of each in its folder in %s", len(cells), len(waiting), config.out)
    running: dict[int, tuple[Spec, subprocess.Popen[bytes]]] = {}  # by number of the device
    threads = max(1, usable_cores() // len(config.devices))
    with (
        stop_signals("stopping: the running cells are saved") as stop,
        tqdm(total=len(waiting), desc="study", unit="cell", disable=None, dynamic_ncols=True) as bar,
    ):
        while (waiting and not stop.asked) or running:
            for number, device in enumerate(config.devices):
                if number not in running and waiting and not stop.asked:
                    cell = waiting.pop(0)
                    running[number] = cell, _start(cell_folder(config, cell), device, threads)
                    bar.set_postfix_str("; ".join(c.name for c, _ in running.values()))
            time.sleep(0.2)
            if stop.asked:
                for _, process in running.values():
                    process.send_signal(signal.SIGTERM)
                for _, process in running.values():
                    process.wait()
            for number, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[number]
                    bar.update()
                    _note_end(config, cell, process.returncode)
    return stop.asked or None


def _job(config: StudyConfig, cell: Spec, num_images: int) -> dict[str, Any]:
    """Everything `run_cell` needs to know, as JSON."""
    return {
        "pretrain": pretrain_config(config, cell).model_dump(mode="json", exclude_unset=True),
        "finetune": config.finetune.model_dump(mode="json", exclude_unset=True),  # type: ignore[attr-defined]
        "test_images": str(config.test_images),
        "other_test_images": {name: str(path) for name, path in config.other_test_images.items()},
        "labels_per_class": [*config.labels_per_class, *([None] if config.full_finetune else [])],
        "flops_per_epoch": cell.flops_per_image * num_images,
        "num_images": num_images,
    }


def _refuse_other(folder: Path, job: dict[str, Any]) -> None:
    from mapet.files import read_json

    if not (folder / "pretrain").exists():
        return
    old = read_json(folder / "cell.json", "study cell")
    changed = [
        f"{part}: {old.get(part)} -> {job[part]}"
        if not isinstance(job[part], dict)
        else ", ".join(
            f"{key}: {old[part].get(key)} -> {job[part].get(key)}"
            for key in sorted({*old[part], *job[part]})
            if old[part].get(key) != job[part].get(key)
        )
        for part in job
        if old.get(part) != job[part]
    ]
    if changed:
        raise MapetError(f"{folder} was run with other options ({'; '.join(changed)}): use the same, or a new --out")


def _start(folder: Path, device: str, threads: int) -> subprocess.Popen[bytes]:
    """`run_cell` in a new session: Ctrl-C reaches the study alone, which asks each process once to save."""
    code = "import sys; from mapet.stages.study import run_cell; sys.exit(run_cell(*sys.argv[1:]))"
    with (folder / "log.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), device, str(threads)],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _note_end(config: StudyConfig, cell: Spec, status: int) -> None:
    from mapet.files import read_json, write_json

    folder = cell_folder(config, cell)
    if (folder / "result.json").exists():
        scores = read_json(folder / "result.json", "study cell")["scores"]
        log.info("%s: %s", cell.name, ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    elif status != Interrupted.exit_code:
        if not (folder / "failure.json").exists():
            by = f"signal {-status}" if status < 0 else f"exit status {status}"
            write_json(folder / "failure.json", {"reason": f"its process ended with {by}; see {folder / 'log.txt'}"})
        log.warning("%s failed: %s", cell.name, read_json(folder / "failure.json", "study cell")["reason"])


def run_cell(folder_name: str, device: str, threads: str) -> int:
    """Pre-train, evaluate, write result.json, or failure.json with the reason; the exit status of its process."""
    import fcntl
    import traceback

    import torch

    from mapet.files import read_json, write_json

    torch.set_num_threads(int(threads))
    folder = Path(folder_name)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            job = read_json(folder / "cell.json", "study cell")
            config = build(PretrainConfig, job["pretrain"] | {"device": device})
            if not (config.out / "backbone").exists():
                pretrain(config.model_copy(update={"resume": (config.out / "config.yaml").exists()}))
            scores = evaluate(config.out, job, config.images, config.seed, device)
            write_json(folder / "result.json", {"scores": scores, "epochs": config.epochs, **curve(config.out, job)})
        except BlockingIOError:
            print(f"{folder}: another process is running this cell", file=sys.stderr)
            return 1
        except (Interrupted, KeyboardInterrupt):
            return Interrupted.exit_code
        except Exception as error:  # the others go on: the report says which failed and why
            traceback.print_exc()
            reason = str(error) if isinstance(error, MapetError) else f"{type(error).__name__}: {error}"
            write_json(folder / "failure.json", {"reason": " ".join(reason.split())})
            return 1
    return 0


def evaluate(
    run: Path, job: dict[str, Any], images: Path, seed: int, device: str, pretrained: bool = True
) -> dict[str, float]:
    """Frozen features judged by linear probe and k-NN on every test set, and fine-tuning."""
    import torch

    from mapet.compute import Compute
    from mapet.evaluation.classifiers import knn_accuracy, linear_accuracy
    from mapet.evaluation.features import extract_features, train_and_test
    from mapet.model.backbone import load_backbone, on_device

    compute = Compute.choose(device)
    torch.manual_seed(seed)
    vit = on_device(load_backbone(run, pretrained=pretrained), compute)
    scores, fit = {}, None
    for name, folder in {"": job["test_images"], **job["other_test_images"]}.items():
        train, test = train_and_test(images, Path(folder))
        fit = fit or extract_features(vit, train, compute, show=False)
        check = extract_features(vit, test, compute, show=False)
        on = f" on {name}" if name else ""
        scores[f"linear probe{on}"], scores[f"k-NN{on}"] = linear_accuracy(*fit, *check), knn_accuracy(*fit, *check)
    for labels in job["labels_per_class"]:
        name = f"fine-tuned, {f'{labels} labels a class' if labels else 'all labels'}"
        scores[name] = finetune(
            backbone=run, images=images, test_images=Path(job["test_images"]), labels_per_class=labels, seed=seed,
            device=device, scratch=not pretrained, **job["finetune"],
        )  # fmt: skip
    return scores


def curve(run: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Cost and learning curve of a finished run, from its metrics; seconds count training alone."""
    import json

    points, seconds, epoch = [], 0.0, 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "loss" in metrics:
            seconds += (metrics["epoch"] - epoch) * job["num_images"] / metrics["images_per_second"]
            epoch = metrics["epoch"]
        point = {"epoch": epoch, "flops": epoch * job["flops_per_epoch"], "seconds": seconds}
        named = {"loss": "loss", "probe/linear": "linear", "probe/knn": "knn"}
        points.append(point | {short: metrics[name] for name, short in named.items() if name in metrics})
    return {"flops": epoch * job["flops_per_epoch"], "seconds": seconds, "curve": points}


def measure_baselines(config: StudyConfig, cells: list[Spec]) -> dict[str, dict[str, float]]:
    """The same ViT untrained, frozen and fine-tuned from scratch: means over the seeds, for each model of the grid."""
    import statistics

    from mapet.files import read_json, write_json

    found = {}
    for cell in cells:
        model = ", ".join(value for name, value in cell.factors.items() if name in ("model", "model_args"))
        name, run = f"untrained ViT {model}".strip(), cell_folder(config, cell) / "pretrain"
        if name in found or not (run / "backbone").exists():
            continue
        file = config.out / "baselines" / f"{file_name(name)}.json"
        if not file.exists():
            log.info("--- %s, frozen and fine-tuned from scratch", name)
            job = _job(config, cell, 0)
            each = [evaluate(run, job, config.images, s, config.devices[0], pretrained=False) for s in config.seeds]
            write_json(file, {key: statistics.mean(scores[key] for scores in each) for key in each[0]})
        found[name] = read_json(file, "study baseline")
    return found


# ---- the report


def write(config: StudyConfig, cells: list[Spec], baselines: dict[str, dict[str, float]]) -> Path:
    """report.html, report.md and report.csv of all cells, done or not."""
    from mapet.report.comparison import Study
    from mapet.report.study import write_report

    leaning = [name for name, options in config.tokenizers.items() if getattr(options, "teacher") != "pixels"]  # noqa: B009
    notes = [
        f"The tokenizer '{name}' uses a pre-trained teacher ({config.tokenizers[name].teacher}): "  # type: ignore[attr-defined]
        "what that has seen, labels perhaps, goes into its results."
        for name in leaning
    ]
    notes.append("Operations are the student's, forward and backward; minutes are of training alone, on this machine.")
    for name, options in {"pretrain": config.pretrain, "finetune": config.finetune}.items():
        shared = options.model_dump(mode="json", exclude_unset=True)  # type: ignore[attr-defined]
        notes.append(f"{name}: " + (", ".join(f"{key} {value}" for key, value in shared.items()) or "all defaults"))
    finished = [_read(config, cell) for cell in cells]
    title = f"Study of {config.images.name}: {', '.join(config.grid)}"
    command = f"mapet study {config.out / 'study.yaml'}"
    write_report(Study(title, config.compare, finished, baselines, notes, command), config.out / "report")
    done = sum(cell.status == "done" for cell in finished)
    log.info("%d of %d cells done; report in %s", done, len(cells), config.out / "report" / "report.html")
    return config.out / "report"


def _read(config: StudyConfig, cell: Spec) -> "Cell":
    from mapet.files import read_json
    from mapet.report.comparison import Cell

    folder = cell_folder(config, cell)
    status, reason, result = "not run", "", {}
    if (folder / "result.json").exists():
        status, result = "done", read_json(folder / "result.json", "study cell")
    elif (folder / "failure.json").exists():
        status, reason = "failed", read_json(folder / "failure.json", "study cell")["reason"]
    return Cell(cell.name, cell.factors, cell.seed, cell.budgets, status, reason, **result)
