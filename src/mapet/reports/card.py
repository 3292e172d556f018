"""The model card of an export: where the weights come from, what they leaned on, how to use them, what was checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from timm.models.vision_transformer import VisionTransformer

from mapet.files import file_hash
from mapet.models.adapt import input_mean_std
from mapet.models.export_formats import FORMATS
from mapet.models.pretrained import HUB_PREFIXES
from mapet.reports.history import History
from mapet.reports.run import figures, number, with_views
from mapet.run_state import RunState, parent_run, pretrain_folder, read_or_none

LABEL_FREE = "pixels"
COLOURS = {1: " Images in colour are turned grey.", 3: " Grey images have their one channel three times."}
"""Channels -> what is done with pictures of another number."""
LIBRARIES = ("mapet", "torch", "timm")
USE = {
    "timm": 'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or mapet.load_backbone("FOLDER")',
    "transformers": 'model = transformers.AutoModel.from_pretrained("FOLDER/transformers")',
    "onnx": 'session = onnxruntime.InferenceSession("FOLDER/onnx/model.onnx")  # pixel_values -> features',
    "torch-export": 'module = torch.export.load("FOLDER/torch-export/model.pt2").module()',
}


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
        state = read_or_none(folder)
        if state and state.command == "finetune":
            metrics = {key: value for key, value in state.results.items() if key not in ("provenance", "classes")}
            before = Origin(**state.results.get("provenance", {}))
            metrics = before.metrics | {"fine-tuning": metrics}
            return replace(before, metrics=metrics, classes=state.results.get("classes", ()))
        if state and state.command == "pretrain":
            return _origin_of_run(folder, state)
    return Origin()


def _origin_of_run(folder: Path, state: RunState) -> Origin:
    metrics = {"pre-training": figures(History.read(folder / "metrics.jsonl"))}
    run = parent_run(folder)
    if run and (found := RunState.read(run).results.get("evaluation")):
        metrics["evaluation"] = found
    images = {"number": state.counts.get("images", 0), "hash": state.hashes.get("images", "")}
    images |= {"unreadable": state.counts.get("unreadable", 0)}
    recipe = _without_paths(with_views(state.config, state.results.get("views")))
    return Origin(recipe, images if state.hashes else {}, state.results.get("tokenizer", {}), metrics)


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
    name: str,
    folder: Path,
    source: str,
    vit: VisionTransformer,
    origin: Origin,
    formats: Sequence[str],
    checks: dict[str, float],
    checked_on: str,
    tolerance: float,
    license: str,
    classes: list[str],
    library: str = "timm",
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        folder: the export, whose files are hashed.
        checks: way of loading -> largest relative difference of its outputs.
        library: the `library_name` of the front matter.
    """
    task = "image-classification" if vit.num_classes else "image-feature-extraction"
    front = {
        "license": license,
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["mapet", "vision", "vit", *formats],
    }
    used = [*LIBRARIES, *(module for name in formats for module in FORMATS[name].requires)]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n# {name}",
        _what(vit, origin, classes),
        _use(vit, formats),
        _data(origin),
        *map(_tuning, origin.tuned),
        _teacher(source, origin),
        _metrics(origin),
        _checks(checks, checked_on, tolerance),
        "## Recipe\n\n"
        + (
            _block("yaml", yaml.safe_dump(origin.recipe, sort_keys=False, allow_unicode=True))
            if origin.recipe
            else "Not known."
        ),
        _files(folder),
        "## Versions\n\n" + ", ".join(f"{name} {found}" for name in used if (found := _version(name))),
    ]
    return "\n\n".join(parts) + "\n"


def _what(vit: VisionTransformer, origin: Origin, classes: list[str]) -> str:
    height, width = vit.patch_embed.img_size
    blocks, heads = len(vit.blocks), vit.blocks[0].attn.num_heads
    objective = origin.recipe.get("objective")
    learned = (
        f", pre-trained by masked and permuted visual-token prediction (objective `{objective}`)" if objective else ""
    )
    if origin.tuned:
        learned += ", trained on labels"
    text = (
        f"A Vision Transformer of width {vit.embed_dim}, depth {blocks}, {heads} heads, for {vit.in_chans}-channel images of "
        f"{height} x {width} px (height x width) in patches of {vit.patch_embed.patch_size[0]} px{learned}. Made with mapet."
    )
    return text + (f"\n\nClasses: {', '.join(classes)}." if classes else "")


def _use(vit: VisionTransformer, formats: Sequence[str]) -> str:
    mean, std = input_mean_std(vit.in_chans)
    height, width = vit.patch_embed.img_size
    shape = "the largest centred square" if height == width else f"the largest centred box of shape {height} : {width}"
    lines = [USE[name] for name in formats]
    text = (
        f"**Preprocessing**: {shape} of the image, resized to {height} x {width} px (bicubic, antialiased), divided by 255, less "
        f"the mean {_row(mean)}, divided by the standard deviation {_row(std)}."
    )
    if vit.in_chans in COLOURS:
        text += COLOURS[vit.in_chans]
    if "transformers" in formats and height != width:
        text += " The image processor of `transformers/` squeezes the whole image instead: crop it to the shape first."
    return f"## Use\n\n{_block('python', chr(10).join(lines))}\n\n{text}"


def _data(origin: Origin) -> str:
    if origin.tuned and origin.tuned[0]["scratch"]:
        return "## Training data\n\nThat of the fine-tuning alone."
    if not origin.images:
        reason = ": the list of images is not where the run had it" if origin.recipe else ""
        return f"## Training data\n\nNot known{reason}."
    unreadable = (
        f", {origin.images['unreadable']} of them unreadable and left out" if origin.images.get("unreadable") else ""
    )
    return (
        f"## Training data\n\n{origin.images['number']:,} images without labels{unreadable}; the sha256 of the list of their names "
        f"and sizes is `{origin.images['hash']}`."
    )


def _tuning(tuning: dict[str, Any]) -> str:
    start = "random weights of the architecture of" if tuning["scratch"] else "the backbone"
    images = tuning["images"]
    return (
        f"## Fine-tuning\n\nFrom {start} `{tuning['backbone']}`, on {images['number']:,} labelled images of {images['classes']} "
        f"classes; the sha256 of the list of their names and sizes is `{images['hash']}`.\n\n"
        + _block("yaml", yaml.safe_dump(tuning["recipe"], sort_keys=False, allow_unicode=True))
    )


def _teacher(source: str, origin: Origin) -> str:
    heading = "## Tokenizer and supervision\n\n"
    first = origin.tuned[0] if origin.tuned else None
    if first and first["scratch"]:
        return f"{heading}None but the labels of the fine-tuning: it began with random weights."
    if not origin.tokenizer:
        what = (
            f"The weights of the backbone `{first['backbone']}` were"
            if first
            else f"These weights were converted from `{_name(source)}`,"
        )
        return (
            f"{heading}{what} not trained by a run that mapet knows. What they were trained with, labels included, is to be had from "
            "their authors."
        )
    tokenizer = origin.tokenizer
    lineage = _lineage(tokenizer)
    teacher = lineage[0]
    kind = tokenizer.get("quantizer", {}).get("kind", "k-means")
    text = (
        f"{tokenizer['vocab_size']:,} visual words ({kind}) of the features of the teacher `{teacher}`, {tokenizer['grid'][0]} x "
        f"{tokenizer['grid'][1]} a view; hash of the tokenizer `{tokenizer['hash']}`"
    )
    if tokenizer.get("weights_hash"):
        text += f", of the teacher's weights `{tokenizer['weights_hash']}`"
    for known in lineage[1:]:
        text += f", itself trained by mapet to keep the features of `{known}`"
    text += ". "
    if lineage[-1] == LABEL_FREE:
        subject = "The teacher is the pixels themselves" if len(lineage) == 1 else "That began with pixels"
        text += f"{subject}: **no labels and no pre-trained network** were used for the words."
    else:
        text += (
            "**The teacher is a network with a past**: what it has seen, labels and captions included, is inherited, and these "
            "weights are not learned from the images alone."
        )
    if start := origin.recipe.get("init_from"):
        text += f" Pre-training started from the weights `{start}`, and inherits from them too."
    return heading + text


def _lineage(tokenizer: Mapping[str, Any]) -> list[str]:
    """The teacher; if that is a VQ-KD tokenizer of ours, its teacher, and so on."""
    found = [tokenizer["teacher"]["teacher"]]
    about = tokenizer.get("teacher_metadata") or {}
    while learned := about.get("learned_from"):
        found.append(learned["teacher"]["teacher"])
        about = learned.get("teacher_metadata") or {}
    return found


def _metrics(origin: Origin) -> str:
    if not origin.metrics:
        return "## Metrics\n\nNone are known."
    lines = [
        f"| {what} | {key} | {_number(value)} |"
        for what, values in origin.metrics.items()
        for key, value in _flat(values)
        if isinstance(value, (int, float, str))
    ]
    return "## Metrics\n\n| of | what | value |\n|---|---|---|\n" + "\n".join(lines)


def _checks(checks: dict[str, float], checked_on: str, tolerance: float) -> str:
    rows = "\n".join(f"| {way} | {difference:.1e} |" for way, difference in checks.items())
    return (
        "## Checked\n\nThe files were loaded as their libraries do, and gave the outputs of the original for "
        f"{checked_on}: largest difference, divided by the root mean square of the output (allowed: {tolerance:.0e}).\n\n"
        f"| loaded by | largest relative difference |\n|---|---|\n{rows}"
    )


def _files(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    rows = "\n".join(
        f"| `{path.relative_to(folder)}` | {path.stat().st_size:,} | `{file_hash(path)}` |" for path in files
    )
    return f"## Files\n\n| file | bytes | sha256 |\n|---|---|---|\n{rows}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}, ") if isinstance(value, Mapping) else [(prefix + key, value)]
    return found


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else number(value)


def _row(values: tuple[float, ...]) -> str:
    return f"{values[0]:g} (every channel)" if len(set(values)) == 1 else f"({', '.join(f'{v:g}' for v in values)})"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
