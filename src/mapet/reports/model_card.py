"""The model card of an export: where the weights come from, what trained them, how to use them, what was checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from mapet.config.evaluation import ExportConfig
from mapet.config.shared import format_teachers
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
    """How a backbone was trained, as far as the run.json of its training tells; a field is empty where it doesn't.

    Attributes:
        config: options of pre-training by name; of paths the last part alone.
        images: of pre-training: "number" of images, "hash" of their list, number of "unreadable" ones.
        tokenizer: description of the pre-training's tokenizer: "teacher", "vocab_size", "grid", "hash", ...
        metrics: "pre-training" (as in the run's report), "evaluation" and "fine-tuning", those that exist -> name -> value.
        finetuned: of each fine-tuning, in order: "backbone" that it started from, "from_scratch" (whether it took only the architecture
            of that backbone), "config" (its options), "images" ("number", "hash", and "classes": how many).
        classes: names of the classes of a fine-tuned model.
    """

    config: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    finetuned: Sequence[dict[str, Any]] = ()
    classes: Sequence[str] = ()


def read_provenance(source: str | Path) -> Provenance:
    """Read how a backbone was trained from the run.json of the run that trained it.

    Args:
        source: folder of `mapet pretrain`, `run`, `demo` or `finetune`, or the backbone folder in it.

    Returns:
        An empty `Provenance` if neither folder has a run.json of these commands, as for a model of timm or the Hugging Face hub.
    """
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
    """Collect how a backbone was pre-trained.

    Args:
        folder: of `mapet pretrain`; if it is in a folder of `mapet run`, the metrics include the evaluation by that run.
        state: content of the folder's run.json.
    """
    run = parent_run(folder)
    evaluation = RunState.read(run).results.get("evaluation") if run else None
    history = History.read(folder / "metrics.jsonl")
    metrics: dict[str, Any] = {"pre-training": summarize_metrics(history, with_probes=not evaluation)}
    if evaluation:
        metrics["evaluation"] = evaluation
    images = {}
    if state.hashes:  # else the run ended before it had listed its images
        images = {"number": state.counts.get("images", 0), "hash": state.hashes.get("images", "")}
        images["unreadable"] = state.counts.get("unreadable", 0)
    options = _strip_paths(with_store_views(state.config, state.results.get("views")))
    return Provenance(options, images, state.results.get("tokenizer", {}), metrics)


def finetuning_provenance(folder: Path, images: dict[str, Any]) -> Provenance:
    """Return the provenance of the model that `finetune` trains in a folder: that of its backbone, with this fine-tuning in `finetuned`.

    Trained from scratch, the model has nothing of the backbone but its architecture, and this fine-tuning alone.

    Args:
        folder: of `finetune`; its run.json has the options.
        images: "number", "hash" of the list and "classes" (how many) of the training images.
    """
    options = RunState.read(folder).config
    source, from_scratch = options["backbone"], options["from_scratch"]
    backbone = Provenance() if from_scratch else read_provenance(source)
    finetuning = {
        "backbone": _short_name(source),
        "from_scratch": from_scratch,
        "config": _strip_paths(options),
        "images": images,
    }
    return replace(backbone, finetuned=[*backbone.finetuned, finetuning])


def _short_name(source: str) -> str:
    """Return the name of a backbone for a model card: the last part of a folder's path; a 'timm:...' or other hub name unchanged."""
    return source if source.startswith(HUB_PREFIXES) else Path(source).name


def _strip_paths(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with every text that has a slash or backslash shortened to its last part.

    Such a text is a path of this machine, and a published model card must not show the folders of its author.
    """
    return {
        name: Path(value).name if isinstance(value, str) and ("/" in value or "\\" in value) else value
        for name, value in options.items()
    }


def render_model_card(
    config: ExportConfig, folders: Mapping[str, Path], vit: VisionTransformer, provenance: Provenance, checks: Mapping[str, float],
    checked_on: str, tolerance: float, library: str = "timm",
) -> str:  # fmt: skip
    """Render the Markdown of the model card of an exported ViT, with the front matter (YAML) of the Hugging Face hub.

    Args:
        config: options of `export`, of which `backbone`, `license` and the name of `out` are shown.
        folders: format ('timm', 'transformers', 'onnx', 'torch-export') -> its folder; the folder of 'timm' contains the others, and
            the card lists all its files with their sizes and hashes.
        vit: the exported model, for its architecture and input size.
        provenance: how it was trained.
        checks: way of loading -> largest difference of its outputs from the original's, divided by the root mean square of these.
        checked_on: images that the outputs were computed for, as text.
        tolerance: largest difference that the export allows.
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
    """List the teacher of a tokenizer; if that is itself a VQ-KD tokenizer or a backbone trained by mapet, its teacher follows, and so on.

    Args:
        tokenizer: the description of a tokenizer, with "teacher" and, for such a teacher, "teacher_metadata" ("learned_from" describes
            the teacher's own training); {} gives [].
    """
    teachers = []
    while tokenizer:
        names = tokenizer["teacher"]["teacher"]
        teachers.append(format_teachers(map(_short_name, [names] if isinstance(names, str) else names)))
        tokenizer = (tokenizer.get("teacher_metadata") or {}).get("learned_from") or {}
    return teachers
