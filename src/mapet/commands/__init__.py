"""The commands of Python and of the command line: for each its config, its docstring (also the help text) and the function that does it.

A command imports that function's module when it runs, so that `mapet --help` does not wait for torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet.commands.command import AnyCommand, command, command_name
from mapet.config.data import PrepareConfig
from mapet.config.evaluation import (
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    PredictConfig,
    SearchConfig,
)
from mapet.config.pipeline import DemoConfig, RunConfig, StudyConfig
from mapet.config.pretraining import DebugStepConfig, PretrainConfig, ReportConfig
from mapet.config.tokenizers import FitTokenizerConfig, InspectTokenizerConfig, TokenizeConfig, TrainTokenizerConfig

if TYPE_CHECKING:
    from mapet.data.dataset_stats import DatasetStats
    from mapet.data.token_store import TokenStore
    from mapet.tokenizers.tokenizer import Tokenizer
    from mapet.training.checkpoint import StepReport


def _load(module: str) -> Any:
    """Import `mapet.MODULE`, with torch and all that it needs, when a command runs."""
    return import_module(f"mapet.{module}")


@command(DemoConfig)
def demo(config: DemoConfig) -> dict[str, dict[str, float]]:
    """Pre-train a small ViT on 1,437 real handwritten digits in a few minutes and test what it learned on 360 others.

    Example:
      mapet demo
      mapet demo --out /tmp/digits --seed 1
    """
    return _load("commands.pipeline").demo(config)


@command(RunConfig, distributed=True)
def run(config: RunConfig) -> Path:
    """Pre-train on a folder of images in a given time: tokenizer, tokens, pre-training, evaluation (if there are labels) and figures.

    What is not given is chosen for the images, this machine and the time. Returns the backbone's folder.

    Example:
      mapet run --images PHOTOS
      mapet run --images PHOTOS --out runs/photos --time 2h --teacher k-clip
      mapet run runs/photos/config.yaml --resume
    """
    return _load("commands.pipeline").run(config)


@command(StudyConfig)
def study(config: StudyConfig) -> Path:
    """Compare objectives, tokenizers, ratios, models: run a grid, evaluate each trial, report; returns the report's folder.

    Example:
      mapet study --images PHOTOS --test-images TEST --out study --tokenizers 'pixels={}' --grid 'objective=[mim, pim, mapet]'
      mapet study study.yaml
      mapet study study.yaml --devices cuda:0 cuda:1
      mapet study study.yaml --report-only
    """
    return _load("commands.pipeline").study(config)


@command(RunConfig, writes_out=False)
def check(config: RunConfig) -> "DatasetStats":
    """Read every image, report what is there and what is wrong, and show the plan of `run` with the same options: values, reasons, costs.

    Example:
      mapet check --images PHOTOS
      mapet check --images PHOTOS --time 2h --model vit_base_patch16_224
    """
    return _load("commands.planning").check(config)


@command(PrepareConfig)
def prepare(config: PrepareConfig) -> Path:
    """Resize every image once and pack them into a few files that are mapped into memory; returns the folder.

    It pays when images are much larger than the input and are read many times (an epoch is one reading), when they are
    many small files on a slow or shared disk, or when the resized ones fit into memory and the originals do not. For
    images near the input's size it gains little.

    Example:
      mapet prepare --images PHOTOS --out PREPARED --short-side 256
      mapet run --images PREPARED --out runs/photos
      mapet prepare --images SCANS --out PREPARED --channels 1 --value-range 0 4095   # 12 bits in files of 16
      mapet prepare --images hf:NAME:train --streaming --out PREPARED      # larger than this disk
    """
    return _load("commands.data").prepare(config)


@command(TrainTokenizerConfig, distributed=True)
def train_tokenizer(config: TrainTokenizerConfig) -> Path:
    """Train a VQ-KD tokenizer: a ViT and codes that reconstruct a teacher's features; returns its safetensors file.

    Example:
      mapet train-tokenizer --images PHOTOS --out runs/vqkd --teacher vqkd-clip
      mapet train-tokenizer runs/vqkd/config.yaml --resume
    """
    return _load("commands.training").train_tokenizer(config)


@command(FitTokenizerConfig, distributed=True)
def fit_tokenizer(config: FitTokenizerConfig) -> "Tokenizer":
    """Cluster a frozen teacher's patch features into a codebook of visual tokens.

    Example:
      mapet fit-tokenizer --images PHOTOS --out runs/tokenizer
      mapet fit-tokenizer --images PHOTOS --out runs/kclip --teacher k-clip
    """
    return _load("tokenizers.fitting").fit_tokenizer(config)


@command(TokenizeConfig, distributed=True)
def tokenize(config: TokenizeConfig) -> "TokenStore":
    """Store the visual tokens of every image, bound to the codebook and the list of images.

    Example:
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens --views random-crop --num-views 8
    """
    return _load("tokenizers.tokenization").tokenize(config)


@command(InspectTokenizerConfig)
def inspect_tokenizer(config: InspectTokenizerConfig) -> list[Path]:
    """Measure a tokenizer: use of its codes, stability, what tokens say of neighbors, positions and classes; with figures.

    Example:
      mapet inspect-tokenizer runs/photos/tokenizer --images PHOTOS --out runs/tokenizer-report
    """
    return _load("commands.reporting").inspect_tokenizer(config)


@command(PretrainConfig, distributed=True)
def pretrain(config: PretrainConfig) -> Path:
    """Pre-train a timm ViT by masked and permuted visual-token prediction (MaPeT); returns the folder of the exported backbone.

    Example:
      mapet pretrain --images PHOTOS --tokenizer runs/tokenizer --tokens runs/tokens --out runs/vit
      mapet pretrain runs/vit/config.yaml --resume
    """
    return _load("commands.training").pretrain(config)


@command(ReportConfig)
def report(config: ReportConfig) -> Path | None:
    """Write one HTML page of a run (curves, warnings, tokenizer, predictions step by step, figures), or of several.

    Example:
      mapet report runs/photos --out report.html
      mapet report runs/a runs/b runs/c --out comparison.html --no-figures
      mapet report runs/photos --serve
      mapet report runs/photos --figures-dir figures
    """
    return _load("commands.reporting").report(config)


@command(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Evaluate backbones side by side: probes, k-NN, few-shot, clusters, rank, robustness, dense tasks; return backbone -> metric -> value.

    Example:
      mapet evaluate --backbone runs/photos random:runs/photos --images labeled/train --test-images labeled/test --protocols logistic knn
      mapet evaluate --backbone runs/photos timm:vit_tiny_patch16_224 --images labeled/train --out evaluation
    """
    return _load("commands.backbones").evaluate(config)


@command(FinetuneConfig)
def finetune(config: FinetuneConfig) -> float:
    """Fine-tune a backbone on labeled images; returns (and prints) top-1 accuracy on the test images.

    Example:
      mapet finetune --backbone runs/photos --images labeled/train --test-images labeled/test --views random-crop --out tuned
      mapet finetune --backbone runs/photos --images labeled/train --labels-per-class 10 --num-seeds 5
      mapet finetune --backbone runs/photos --images labeled/train --labels-per-class 10 --num-seeds 5 --from-scratch
      mapet finetune tuned/config.yaml --resume
    """
    return _load("commands.training").finetune(config)


@command(EmbedConfig)
def embed(config: EmbedConfig) -> Path:
    """Write features of every image by a frozen backbone, with ids, as NumPy or Parquet files; an interrupted job can be resumed.

    Example:
      mapet embed --backbone runs/photos --images PHOTOS --out features
      mapet embed --backbone timm:vit_small_patch16_224.augreg_in21k --images PHOTOS --out features --format parquet --pool cls
      mapet embed --backbone runs/photos --images PHOTOS --out features --resume
    """
    return _load("evaluation.embeddings").embed(config)


@command(PredictConfig)
def predict(config: PredictConfig) -> Path:
    """Write labels and probabilities of every image by a fine-tuned model, as a CSV or Parquet file; an interrupted job can be resumed.

    Probabilities are calibrated on the held-out images of the fine-tuning; if they were too few, the names of columns say so.

    Example:
      mapet predict --backbone tuned --images PHOTOS --out predictions.csv
      mapet predict --backbone tuned --images PHOTOS --out predictions.parquet --resume
    """
    return _load("evaluation.predictions").predict(config)


@command(SearchConfig)
def search(config: SearchConfig) -> Path:
    """Find nearest images of each image or a query, exact and near duplicates, and outliers, by a backbone: a page and CSV files.

    Example:
      mapet search --backbone runs/photos --images PHOTOS --out similar
      mapet search --backbone runs/photos --images PHOTOS --features similar/features --query PHOTO.jpg --out found
    """
    return _load("commands.search").search(config)


@command(ExportConfig)
def export(config: ExportConfig) -> Path:
    """Export a backbone for timm, Transformers, ONNX or torch.export; every file is loaded again and compared on real images.

    Example:
      mapet export --backbone runs/photos --out backbone
      mapet export --backbone runs/photos --out backbone --format transformers onnx torch-export --image-size 160 320
      mapet export --backbone vit_standard_small_patch16_224.tar --out mapet-small --images PHOTOS
    """
    return _load("commands.backbones").export(config)


@command(DebugStepConfig)
def debug_step(config: DebugStepConfig) -> "list[StepReport]":
    """Compute again the steps that stopped a run: which images, which module, which gradients are NaN or Inf.

    Example:
      mapet debug-step runs/vit/debug/step-00001200
      mapet debug-step runs/vit/debug/step-00001200 --precision float32
    """
    return _load("commands.training").debug_step(config)


GROUPS: dict[str, tuple[AnyCommand, ...]] = {
    "Pipeline": (demo, run, study),
    "Data": (check, prepare),
    "Tokenizer": (train_tokenizer, fit_tokenizer, tokenize, inspect_tokenizer),
    "Pre-training": (pretrain, report),
    "Evaluation": (evaluate, finetune),
    "Deployment": (predict, search, embed, export),
}
"""Heading -> commands, as `mapet --help` lists them; `debug-step`, for a crash, is not among them."""
COMMANDS = {command_name(function): function for group in [*GROUPS.values(), (debug_step,)] for function in group}
