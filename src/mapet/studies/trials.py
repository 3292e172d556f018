"""Running a study's cells, each in a process of its own, and evaluating them all alike."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mapet.commands.finetune import finetune
from mapet.commands.pretrain import pretrain
from mapet.config.base import build, differences
from mapet.config.finetune import FinetuneOptions
from mapet.config.pretrain import PretrainConfig
from mapet.config.shared import usable_cores
from mapet.config.study import StudyConfig
from mapet.errors import Interrupted, MapetError, option
from mapet.files import check_format, read_json, write_json
from mapet.studies.grid import GridCell, cell_folder, pretrain_config

log = logging.getLogger("mapet")
FORMAT = 1
COMPARED = ("num_images", "test_images", "ood_images", "labels_per_class")
PLACES = frozenset({"images", "out", "tokenizer", "tokens", "device", "workers", "trust_teacher", "track"})
"""Options that may differ when a cell goes on: the study may have moved, and trackers are only told."""


def run_cells(config: StudyConfig, cells: list[GridCell], broken: dict[str, str], num_images: int) -> str | None:
    """Each in a process of its own, one at a time on each device; returns the signal that stopped it, if one did."""
    from tqdm import tqdm

    from mapet.signals import stop_signals

    waiting = []
    for cell in cells:
        folder, job = cell_folder(config, cell), cell_job(config, cell, num_images)
        refuse_other_cell(folder, job)
        (folder / "failure.json").unlink(missing_ok=True)
        if cell.tokenizer in broken:
            write_json(folder / "failure.json", {"reason": f"tokenizer {cell.tokenizer}: {broken[cell.tokenizer]}"})
        elif not (folder / "result.json").exists():
            write_json(folder / "cell.json", job)
            waiting.append(cell)
    log.info("%d cells, %d of them to run, log of each in its folder in %s", len(cells), len(waiting), config.out)
    running: dict[int, tuple[GridCell, subprocess.Popen[bytes]]] = {}  # by number of the device
    threads = max(1, usable_cores() // len(config.devices))
    with (
        stop_signals("stopping: the running cells are saved") as stop,
        tqdm(total=len(waiting), desc="study", unit="cell", disable=None, dynamic_ncols=True) as bar,
    ):
        while (waiting and not stop.signal_name) or running:
            for number, device in enumerate(config.devices):
                if number not in running and waiting and not stop.signal_name:
                    cell = waiting.pop(0)
                    running[number] = cell, _start(cell_folder(config, cell), device, threads)
                    bar.set_postfix_str("; ".join(c.name for c, _ in running.values()))
            time.sleep(0.2)
            if stop.signal_name:
                for _, process in running.values():
                    process.send_signal(signal.SIGTERM)
                for _, process in running.values():
                    process.wait()
            for number, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[number]
                    bar.update()
                    _note_end(config, cell, process.returncode)
    return stop.signal_name or None


def cell_job(config: StudyConfig, cell: GridCell, num_images: int) -> dict[str, Any]:
    """Everything `run_cell` needs to know, as JSON."""
    return {
        "format": FORMAT,
        "pretrain": pretrain_config(config, cell).model_dump(mode="json", exclude_unset=True),
        "finetune": config.finetune.model_dump(mode="json", exclude_unset=True),
        "test_images": config.test_images,
        "ood_images": config.ood_images,
        "labels_per_class": [*config.labels_per_class, *([None] if config.finetune_all_labels else [])],
        "flops_per_epoch": cell.flops_per_image * num_images,
        "num_images": num_images,
    }


def refuse_other_cell(folder: Path, job: dict[str, Any]) -> None:
    """A cell that was begun goes on as it was, or not at all; `job` is what it is to be now.

    Raises:
        MapetError: its options are others.
    """
    if not (folder / "pretrain").exists():
        return
    old = read_json(folder / "cell.json", "study cell")
    check_format(old.get("format", 1), FORMAT, "study cell", folder)
    changed = differences(build(PretrainConfig, old["pretrain"]), build(PretrainConfig, job["pretrain"]), PLACES)
    judged = (folder / "result.json").exists()  # how it is judged may change until it is
    for part in COMPARED if judged else ("num_images",):
        changed += [f"{part}: {old.get(part)} -> {job[part]}"] if old.get(part) != job[part] else []
    if judged:
        changed += differences(build(FinetuneOptions, old["finetune"]), build(FinetuneOptions, job["finetune"]), PLACES)
    if changed:
        raise MapetError(
            f"{folder} was run with other options ({'; '.join(changed)}): use the same, or a new {option('out')}"
        )


def _start(folder: Path, device: str, threads: int) -> subprocess.Popen[bytes]:
    """`run_cell` in a new session: Ctrl-C reaches the study alone, which asks each process once to save."""
    code = "import sys; from mapet.studies.trials import run_cell; sys.exit(run_cell(*sys.argv[1:]))"
    with (folder / "log.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), device],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},  # scikit-learn's threads too, or they fight
        )  # fmt: skip


def _note_end(config: StudyConfig, cell: GridCell, status: int) -> None:
    folder = cell_folder(config, cell)
    if (folder / "result.json").exists():
        scores = read_json(folder / "result.json", "study cell")["scores"]
        log.info("%s: %s", cell.name, ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    elif status != Interrupted.exit_code:
        if not (folder / "failure.json").exists():
            by = f"signal {-status}" if status < 0 else f"exit status {status}"
            write_json(folder / "failure.json", {"reason": f"its process ended with {by}; see {folder / 'log.txt'}"})
        log.warning("%s failed: %s", cell.name, read_json(folder / "failure.json", "study cell")["reason"])


def run_cell(folder_name: str, device: str) -> int:
    """Pre-train, evaluate, write result.json, or failure.json with the reason; the exit status of its process."""
    import fcntl
    import traceback

    folder = Path(folder_name)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of a study that was killed, this cell may be running still
            if (folder / "result.json").exists():
                return 0
            job = read_json(folder / "cell.json", "study cell")
            config = build(PretrainConfig, job["pretrain"] | {"device": device})
            if not (config.out / "backbone").exists():
                pretrain(config.model_copy(update={"resume": (config.out / "config.yaml").exists()}))
            scores = evaluate(config.out, job, config.images, config.seed, device)
            write_json(folder / "result.json", {"scores": scores, "epochs": config.epochs, **curve(config.out, job)})
        except (Interrupted, KeyboardInterrupt):
            return Interrupted.exit_code
        except Exception as error:  # the others go on: the report says which failed and why
            traceback.print_exc()
            reason = str(error) if isinstance(error, MapetError) else f"{type(error).__name__}: {error}"
            write_json(folder / "failure.json", {"reason": " ".join(reason.split())})
            return 1
    return 0


def evaluate(
    run: Path, job: dict[str, Any], images: str, seed: int, device: str, pretrained: bool = True
) -> dict[str, float]:
    """Evaluate frozen features by linear probe and k-NN on every test set, and fine-tuning."""
    from mapet.device import Compute
    from mapet.evaluation.backbone_wrapper import RANDOM, BackboneWrapper
    from mapet.evaluation.feature_cache import CacheConfig, FeatureCache
    from mapet.evaluation.features import train_and_test
    from mapet.evaluation.probes import probe_accuracy

    backbone, cache = f"{'' if pretrained else RANDOM}{run}", CacheConfig(progress=False)
    wrapper = BackboneWrapper.load(backbone, Compute.choose(device), seed)
    scores: dict[str, float] = {}
    fit = None
    for name, folder in {"": job["test_images"], **job["ood_images"]}.items():
        train, test = train_and_test(images, folder)
        fit = fit or FeatureCache.extract(wrapper, train, cache)
        found = probe_accuracy(fit, FeatureCache.extract(wrapper, test, cache))
        scores |= {f"{metric} on {name}" if name else metric: value for metric, value in found.items()}
    for labels in job["labels_per_class"]:
        name = f"finetune, {f'{labels} labels a class' if labels else 'all labels'}"
        scores[name] = finetune(
            backbone=run, images=images, test_images=job["test_images"], labels_per_class=labels, seed=seed,
            device=device, from_scratch=not pretrained, **job["finetune"],
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
        named = {"loss": "loss", "probe/logistic": "logistic", "probe/knn": "knn"}
        points.append(point | {short: metrics[name] for name, short in named.items() if name in metrics})
    return {"flops": epoch * job["flops_per_epoch"], "seconds": seconds, "curve": points}
