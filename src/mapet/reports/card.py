"""The model card of an export: where the weights come from, what they leaned on, how to use them, what was checked."""

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
from mapet.reports.metrics import History, figures
from mapet.reports.render import render
from mapet.reports.run import with_views
from mapet.run_state import RunState, parent_run, pretrain_folder, try_read_state


@dataclass(frozen=True)
class Origin:
    """What the run.json of a run, or its absence, tells of a backbone.

    Attributes:
        recipe: of pre-training, without paths of the machine.
        images: their number, the hash of their list, and how many were unreadable; {} where no run is known.
        tokenizer: the tokenizer's description.
        metrics: of pre-training (as its report has them), probe and fine-tuning, each under its name.
        tuned: of each fine-tuning since: the backbone's name, whether it gave its architecture alone (scratch), the recipe, the
            images (number, hash, classes).
        classes: of a fine-tuned model.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuned: Sequence[dict[str, Any]] = ()
    classes: Sequence[str] = ()


def origin_of(source: str | Path) -> Origin:
    """Read the run.json around a backbone. Nothing that is missing is an error: a card says what is known."""
    path = Path(source)
    for folder in (pretrain_folder(path), path.parent):  # the backbone's own folder lies in that of its run
        state = try_read_state(folder)
        if state and state.command == "finetune":
            before = Origin(**state.results.get("provenance", {}))
            tuned = {name: value for name, value in state.results.items() if name not in ("provenance", "classes")}
            metrics = before.metrics | {"fine-tuning": tuned}
            return replace(before, metrics=metrics, classes=state.results.get("classes", ()))
        if state and state.command == "pretrain":
            metrics = {"pre-training": figures(History.read(folder / "metrics.jsonl"))}
            if (run := parent_run(folder)) and (found := RunState.read(run).results.get("evaluation")):
                metrics["evaluation"] = found
            images = {"number": state.counts.get("images", 0), "hash": state.hashes.get("images", "")}
            images |= {"unreadable": state.counts.get("unreadable", 0)}
            recipe = _without_paths(with_views(state.config, state.results.get("views")))
            return Origin(recipe, images if state.hashes else {}, state.results.get("tokenizer", {}), metrics)
    return Origin()


def origin_of_tuned(folder: Path, images: dict[str, Any]) -> Origin:
    """Of the model that `finetune` makes in a folder from these images, and of the backbone that it starts from."""
    recipe = RunState.read(folder).config
    source, scratch = recipe["backbone"], recipe["from_scratch"]
    before = Origin() if scratch else origin_of(source)
    step = {"backbone": _name(source), "scratch": scratch, "recipe": _without_paths(recipe), "images": images}
    return replace(before, tuned=[*before.tuned, step])


def _name(source: str) -> str:
    return source if source.startswith(HUB_PREFIXES) else Path(source).name


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Folders of the machine that trained are nobody else's business: their last part alone."""
    return {
        key: Path(value).name if isinstance(value, str) and ("/" in value or "\\" in value) else value
        for key, value in recipe.items()
    }


def model_card(
    config: ExportConfig,
    folders: Mapping[str, Path],
    vit: VisionTransformer,
    origin: Origin,
    checks: Mapping[str, float],
    checked_on: str,
    tolerance: float,
    library: str = "timm",
) -> str:
    """Render Markdown with the front matter of the Hugging Face hub.

    Args:
        folders: of each format; that of timm holds the others, and its files are hashed.
        checks: way of loading -> largest relative difference of its outputs.
        library: the `library_name` of the front matter.
    """
    mean, std = input_mean_std(vit.in_chans)
    folder = folders["timm"]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    used = ["mapet", "torch", "timm", *(module for name in folders for module in FORMATS[name].requires)]
    return render(
        "model_card.md", config=config, source=_name(config.backbone), vit=vit, origin=origin, formats=list(folders), checks=checks,
        checked_on=checked_on, tolerance=tolerance, library=library, mean=mean, std=std, lineage=_lineage(origin.tokenizer),
        versions={name: version(name) for name in used if find_spec(name)},
        files=[(path.relative_to(folder), path.stat().st_size, file_hash(path)) for path in files],
    )  # fmt: skip


def _lineage(tokenizer: Mapping[str, Any]) -> list[str]:
    """List the teacher; if that is a VQ-KD tokenizer trained by mapet, its teacher, and so on."""
    found = []
    while tokenizer:
        found.append(tokenizer["teacher"]["teacher"])
        tokenizer = (tokenizer.get("teacher_metadata") or {}).get("learned_from") or {}
    return found
