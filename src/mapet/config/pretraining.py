"""Options of `pretrain`, `report` and `debug-step`."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mapet.config import shared
from mapet.errors import option


class PretrainOptions(shared.TrainerOptions, shared.EncoderOptions):
    """Options of `pretrain` that say how to train, not on what and where to; a section of `run` and `study`."""

    objective: str = "mapet"
    """mapet; pim (permuted, no mask columns); mim (masked, all at once); cae (context autoencoder); as ablations
    mapet_content_ignores_masks (only what predicts sees the positions to come), mapet_single_stream, causal (pim in one stream)."""
    target: Literal["tokens", "pixels", "features"] = "tokens"
    """What is predicted of a patch: tokens; as controls its pixels (normalized), or features (the teacher's, by cosine)."""
    mask_ratio: shared.Ratio = (0.75, 0.75)
    """Fraction of the patches to predict, above 0 to 1 (0.75: 147 of 196); two numbers: drawn between them each step."""
    patch_order: Literal["random", "blockwise", "raster"] = "random"
    """In which patches are given and predicted: random; blockwise (what is hidden are rectangles, as in BEiT); raster."""
    separate_query_token: bool = False
    """Give query tokens a parameter of their own instead of the mask token's."""
    num_predict: PositiveInt | None = None
    """Predict only so many of the hidden patches, others each step: faster steps, a noisier loss; automatic: all."""
    init_from: shared.BackboneSource | None = None
    """Start from the weights of a run, a model folder of timm or Hugging Face, a weights file (MaPeT's released ones, MAE, DINO,
    timm, ...) or timm:NAME, adapted to this grid, patch and channels (a new run; to go on with one, --resume)."""

    epochs: PositiveInt = 300
    """Passes over the images."""
    warmup_epochs: NonNegativeFloat | None = None
    """Passes with a rising learning rate; automatic: one thirtieth (10 of 300)."""
    batch_size: PositiveInt | None = None
    """Images a step; automatic: the largest power of two up to 2048 that memory holds and leaves 20 steps an epoch, but 16 at
    least if there are so many images."""
    lr: PositiveFloat | None = None
    """Peak learning rate; automatic: 1.5e-3 * sqrt(batch / 2048)."""
    clip_grad: PositiveFloat | None = 3.0
    """Largest norm of the gradient."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the last block."""
    layer_scale_init: PositiveFloat | None = 0.1
    """LayerScale's first value; none leaves it out."""
    color_jitter: NonNegativeFloat = 0.4
    """Strength of brightness, contrast and saturation jitter (the student's view only)."""

    log_interval: PositiveInt | None = None
    """Steps between lines of metrics, at most: an epoch is cut evenly; automatic: 5 lines an epoch, at most 50 steps."""
    probe_every: NonNegativeInt | None = None
    """Epochs between probes of the frozen features, 0 for never; automatic: 5 times a run, if the images have labels."""
    probe_images: shared.Source | None = None
    """Labeled images for those probes; automatic: `images`, if they lie in class folders."""

    @property
    def varies_context(self) -> bool:
        """Whether the share of predicted patches is drawn anew for each step."""
        return self.mask_ratio[0] < self.mask_ratio[1]

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        if not 0 < self.mask_ratio[0] <= self.mask_ratio[1] <= 1:
            given = " ".join(f"{share:g}" for share in dict.fromkeys(self.mask_ratio))
            yield f"{option('mask_ratio')} {given}: above 0 to 1, the smaller first, e.g. 0.5 0.9"


class PretrainConfig(
    PretrainOptions, shared.ImageOptions, shared.ViewOptions, shared.TrainerConfig, shared.TrustTeacherOptions
):
    """Options of `pretrain`. Defaults are the released recipe's (arXiv 2306.07346) unless they say otherwise."""

    out: Path
    """New run folder."""
    tokenizer: Path
    """Folder made by `fit-tokenizer`."""
    tokens: Path | None = None
    """Store made by `tokenize`, whose views are used; without one the teacher runs in the loop on fresh views."""

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        yield from super().problems()
        if self.tokens is not None and "views" in self.model_fields_set and self.views != "center":
            yield f"{option('views')} is for tokens made in the loop; with {option('tokens')} the store says which views there are"


class ReportConfig(shared.DeviceOptions, shared.TrustTeacherOptions):
    """Options of `report`."""

    positional: ClassVar[str | None] = "run"
    out_is_file: ClassVar[bool] = True
    run: list[Path] = Field(min_length=1, max_length=40)
    """Run folders of `pretrain` or `run`; several are compared, with shared axes."""
    out: Path | None = None
    """New HTML file, under 5 MB; it opens from disk and connects to nothing."""
    figures_dir: Path | None = None
    """New folder for the figures (PNG) and the step-through (JSON) as files."""
    serve: bool = False
    """Show the page of one run in a browser on this machine, at port 6274 if that is free, and update it while the run trains; Ctrl-C
    ends it. The run's folder need not exist yet."""
    figures: bool = True
    """Compute figures and the step-through from the newest weights; otherwise those in the run's folder are shown."""
    images: shared.Source | None = None
    """Images for the figures; automatic: those the run was trained on."""

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        if self.serve and (self.out or self.figures_dir or len(self.run) > 1):
            yield f"{option('serve', True)} shows one run and writes nothing: leave out {option('out')} and {option('figures_dir')}"
        if not self.serve and not self.out and not self.figures_dir:
            yield f"give {option('out')} FILE.html, {option('figures_dir')} FOLDER or {option('serve', True)}"
        if self.figures_dir and (not self.figures or len(self.run) > 1):
            yield f"{option('figures_dir')} takes the figures of one run: leave out {option('figures', False)} and other runs"


class DebugStepConfig(shared.DeviceOptions, shared.TrustTeacherOptions):
    """Options of `debug-step`."""

    positional: ClassVar[str | None] = "bundle"
    bundle: Path
    """Folder that a run left when it stopped: RUN/debug/step-*."""
    images: shared.Source | None = None
    """Where the images are now; automatic: where they were."""
    precision: shared.Precision | None = None
    """Precision to try it in; automatic: the run's."""
