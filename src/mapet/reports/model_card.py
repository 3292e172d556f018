"""The model card of an export: where the weights come from, what trained them, how to use them, what was checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from mapet.config.evaluation import ExportConfig
from mapet.data.views import input_mean_std
from mapet.files import file_hash
from mapet.models.backbone import HUB_PREFIXES
from mapet.models.export_formats import FORMATS
from mapet.reports.metrics import History, summarize_metrics
from mapet.reports.render import render
from mapet.reports.run import with_store_views
from mapet.run_state import RunState, parent_run, pretrain_folder, try_read_state


@dataclass(frozen=True)
class Provenance:
    """What is known of how a backbone was trained; empty where no run.json tells.

    Attributes:
        recipe: options of pre-training, with the last part of paths alone.
        images: of pre-training: their "number", the "hash" of their list, and how many were "unreadable".
        tokenizer: the tokenizer's description.
        metrics: metrics by name of "pre-training" (those of its report), "evaluation" and "fine-tuning".
        tuned: of each fine-tuning in order: the "backbone" that it started from, "scratch" (it took only that one's
            architecture), "recipe" (its options), "images" ("number", "hash", "classes").
        classes: names of the classes of a fine-tuned model.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuned: Sequence[dict[str, Any]] = ()
    classes: Sequence[str] = ()


def read_provenance(source: str | Path) -> Provenance:
    """Read the provenance of a backbone (a run's folder, or the backbone folder in it) from the run.json beside it."""
    path = Path(source)
    for folder in (pretrain_folder(path), path.parent):
        state = try_read_state(folder)
        if state and state.command == "finetune":
            provenance = Provenance(**state.results.get("provenance", {}))
            metrics = {name: value for name, value in state.results.items() if name not in ("provenance", "classes")}
            metrics = provenance.metrics | {"fine-tuning": metrics}
            return replace(provenance, metrics=metrics, classes=state.results.get("classes", ()))
        if state and state.command == "pretrain":
            return _pretraining_provenance(folder, state)
    return Provenance()


def _pretraining_provenance(folder: Path, state: RunState) -> Provenance:
    """Collect the provenance of a pre-training from its folder and from the `mapet run` that it is part of."""
    metrics: dict[str, Any] = {"pre-training": summarize_metrics(History.read(folder / "metrics.jsonl"))}
    run = parent_run(folder)
    if run and (evaluation := RunState.read(run).results.get("evaluation")):
        metrics["evaluation"] = evaluation
    images = {}
    if state.hashes:  # else the run ended before it had listed its images
        images = {"number": state.counts.get("images", 0), "hash": state.hashes.get("images", "")}
        images["unreadable"] = state.counts.get("unreadable", 0)
    options = _strip_paths(with_store_views(state.config, state.results.get("views")))
    return Provenance(options, images, state.results.get("tokenizer", {}), metrics)


def finetuning_provenance(folder: Path, images: dict[str, Any]) -> Provenance:
    """Return the provenance of the model that `finetune` trains in a folder: its backbone's, and this fine-tuning.

    Args:
        images: "number", "hash" and "classes" (how many) of the training images.
    """
    options = RunState.read(folder).config
    source, scratch = options["backbone"], options["from_scratch"]
    backbone = Provenance() if scratch else read_provenance(source)
    step = {"backbone": _short_name(source), "scratch": scratch, "recipe": _strip_paths(options), "images": images}
    return replace(backbone, tuned=[*backbone.tuned, step])


def _short_name(source: str) -> str:
    """Return the name of a backbone: of a folder its last part, of a model of timm or a hub all of it."""
    return source if source.startswith(HUB_PREFIXES) else Path(source).name


def _strip_paths(options: dict[str, Any]) -> dict[str, Any]:
    """Shorten every path of the machine to its last part: a published card must not show folders of its author."""
    return {
        name: Path(value).name if isinstance(value, str) and ("/" in value or "\\" in value) else value
        for name, value in options.items()
    }


def render_model_card(
    config: ExportConfig, folders: Mapping[str, Path], vit: VisionTransformer, provenance: Provenance, checks: Mapping[str, float],
    checked_on: str, tolerance: float, library: str = "timm",
) -> str:  # fmt: skip
    """Render the Markdown of a model card, with the front matter of the Hugging Face hub.

    Args:
        folders: format -> its folder; that of "timm" holds the others, and the card lists its files with their hashes.
        checks: way of loading -> largest difference of its outputs from the original's, relative to their RMS.
        checked_on: what the outputs were computed on, as text.
        tolerance: largest difference allowed.
        library: `library_name` of the front matter.
    """
    mean, std = input_mean_std(vit.in_chans)
    folder = folders["timm"]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    packages = ["mapet", "torch", "timm", *(module for name in folders for module in FORMATS[name].requires)]
    return render(
        "model_card.md", config=config, source=_short_name(config.backbone), vit=vit, provenance=provenance, formats=list(folders),
        checks=checks, checked_on=checked_on, tolerance=tolerance, library=library, mean=mean, std=std,
        teachers=_list_teachers(provenance.tokenizer), versions={name: version(name) for name in packages if find_spec(name)},
        files=[(path.relative_to(folder), path.stat().st_size, file_hash(path)) for path in files],
    )  # fmt: skip


def _list_teachers(tokenizer: Mapping[str, Any]) -> list[str]:
    """List the teacher of a tokenizer; if that is a VQ-KD tokenizer trained by mapet, also its teacher, and so on."""
    teachers = []
    while tokenizer:
        teachers.append(tokenizer["teacher"]["teacher"])
        tokenizer = (tokenizer.get("teacher_metadata") or {}).get("learned_from") or {}
    return teachers
