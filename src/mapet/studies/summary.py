"""What came out of a study: baselines beside the cells, all of it handed to the report."""

import logging
import statistics
from pathlib import Path
from typing import Any

from mapet.config.study import StudyConfig
from mapet.errors import by
from mapet.files import read_json, write_json
from mapet.reports.study import write_report
from mapet.studies.grid import GridCell, cell_folder, compared, file_name
from mapet.studies.statistics import Cell, Study
from mapet.studies.tokenizers import fitting_config, tokenizer_folder
from mapet.studies.trials import cell_job, evaluate
from mapet.tokenizers.codebook import load_tokenizer

log = logging.getLogger("mapet")


def baselines(config: StudyConfig, cells: list[GridCell], measure: bool) -> dict[str, dict[str, float]]:
    """The same ViT untrained, frozen and fine-tuned from scratch: means over the seeds, for each model of the grid.

    Args:
        measure: those that are not there yet.
    """
    found = {}
    for cell in cells:
        model = ", ".join(value for name, value in cell.factors.items() if name in ("model", "model_args"))
        name, run = f"untrained ViT {model}".strip(), cell_folder(config, cell) / "pretrain"
        if name in found or not (run / "backbone").exists():
            continue
        file = config.out / "baselines" / f"{file_name(name)}.json"
        if not file.exists() and not measure:
            continue
        if not file.exists():
            log.info("--- %s, frozen and fine-tuned from scratch", name)
            job = cell_job(config, cell, 0)
            each = [evaluate(run, job, config.images, s, config.devices[0], pretrained=False) for s in config.seeds]
            write_json(file, {key: statistics.mean(scores[key] for scores in each) for key in each[0]})
        found[name] = read_json(file, "study baseline")
    return found


def write(config: StudyConfig, cells: list[GridCell], measure: bool) -> Path:
    """report.html, report.md and report.csv of all cells, done or not."""
    tokenizers: dict[str, Any] = config.tokenizers
    notes = [_in_words(config, name) for name in tokenizers]
    notes += [
        f"The tokenizer '{name}' uses a pre-trained teacher ({options.teacher}): what that has seen, labels perhaps, goes into its results."
        for name, options in tokenizers.items()
        if options.teacher != "pixels"
    ]
    notes.append(
        "'untrained ViT': the same ViT with random weights, frozen; where it is fine-tuned, trained from scratch."
    )
    notes.append("Operations are the student's, forward and backward; minutes are of training alone, on this machine.")
    for name, options in {"pretrain": config.pretrain, "finetune": config.finetune}.items():
        shared = options.model_dump(mode="json", exclude_unset=True)
        notes.append(f"{name}: " + (", ".join(f"{key} {value}" for key, value in shared.items()) or "all defaults"))
    finished = [_read(config, cell) for cell in cells]
    title = f"Study of {Path(config.images).name}: {', '.join(config.grid)}"
    command = f"mapet study {config.out / 'config.yaml'}"
    study = Study(title, compared(config), finished, baselines(config, cells, measure), notes, command)
    write_report(study, config.out / "report")
    done = sum(cell.status == "done" for cell in finished)
    log.info("%d of %d cells done; report in %s", done, len(cells), config.out / "report" / "report.html")
    return config.out / "report"


def _read(config: StudyConfig, cell: GridCell) -> Cell:
    folder = cell_folder(config, cell)
    status, reason, result = "not run", "", {}
    if (folder / "result.json").exists():
        status, result = "done", read_json(folder / "result.json", "study cell")
    elif (folder / "failure.json").exists():
        status, reason = "failed", read_json(folder / "failure.json", "study cell")["reason"]
    return Cell(cell.name, cell.factors, cell.seed, cell.budgets, status, reason, **result)


def _in_words(config: StudyConfig, name: str) -> str:
    """A tokenizer's sizes."""
    fitting, folder = fitting_config(config, name), tokenizer_folder(config, name) / "tokenizer"
    words = f"{load_tokenizer(folder, with_teacher=False).vocab_size:,}" if folder.exists() else "no"
    size = f"{by(fitting.image_size)} px in patches of {fitting.patch_size}"
    return f"Tokenizer '{name}': teacher {fitting.teacher}, {size}, {words} words."
