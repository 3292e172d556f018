"""Options of `pretrain`, `report` and `debug-step`."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mapet.config import shared
from mapet.config.limits import LimitOptions
from mapet.errors import option


class PretrainOptions(shared.TrainerOptions, shared.EncoderOptions, shared.FeatureOptions):
    """Options of `pretrain` but for images, tokenizer, output folder and device; a section of `run` and `study`."""

    file_only: ClassVar[frozenset[str]] = shared.RARE_LOOP_OPTIONS
    objective: str = "mapet"
    """mapet; pim (permuted, as in XLNet: without the mask tokens that show the positions still to come); mim (masked, all at once); cae (context
    autoencoder); as ablations mapet_content_ignores_masks (only query tokens attend to the positions to come), mapet_single_stream,
    causal (pim in one stream)."""
    target: Literal["tokens", "pixels", "features"] = "tokens"
    """Prediction target of a patch: tokens; as controls pixels (normalized) or features (the teacher's, by cosine)."""
    mask_ratio: shared.Ratio = (0.75, 0.75)
    """Fraction of the patches to predict, above 0 to 1 (0.75: 147 of 196); two numbers: drawn between them at each step."""
    patch_order: Literal["random", "blockwise", "raster"] = "random"
    """Order in which patches are revealed and predicted: random; blockwise (masked patches form BEiT's blocks); raster."""
    separate_query_token: bool = False
    """Give query tokens a parameter of their own instead of the mask token's."""
    num_predict: PositiveInt | None = None
    """Masked patches of each image that are predicted in a step, drawn at random: faster steps, a noisier loss; auto: all."""
    init_from: shared.BackboneSource | None = None
    """Weights to start from: a run, a model folder of timm or Hugging Face, a weights file (MaPeT's released ones, MAE, DINO, timm, ...) or
    timm:NAME, adapted to this grid, patch and channels (for a new run; `resume` continues one); none: random weights."""

    epochs: float = Field(default=300, gt=0)
    """Number of training epochs, rounded to whole steps; with a fraction, as in 12.5, the last one ends early."""
    warmup_epochs: NonNegativeFloat | None = None
    """Epochs of linear learning-rate warmup, laid over the beginning of the schedule; auto: a thirtieth of `epochs` (10 of 300)."""
    batch_size: PositiveInt | None = None
    """Images per step, over all ranks; auto: the largest power of two up to 2048 that fits into memory and leaves 20 steps per epoch, but
    at least 16 if there are as many images."""
    lr: PositiveFloat | None = None
    """Peak learning rate; auto: 1.5e-3 * sqrt(batch / 2048)."""
    clip_grad: PositiveFloat | None = 3.0
    """Gradient-norm clipping threshold; none: no clipping."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Maximum drop-path rate (increases linearly with depth)."""
    layer_scale_init: PositiveFloat | None = 0.1
    """Initial value of LayerScale; none: no LayerScale."""
    color_jitter: NonNegativeFloat = 0.4
    """Strength s of color jitter of the student's view, not the teacher's: brightness, contrast and saturation are each multiplied by a factor
    drawn from max(0, 1 - s) to 1 + s; 0: off."""

    log_interval: PositiveInt | None = None
    """Largest number of steps between lines of metrics (an epoch is divided evenly); auto: 5 lines per epoch, at most 50 steps."""
    probe_every: NonNegativeInt | None = None
    """Epochs between probes of the frozen features, 0 for never; auto: 5 probes per run, if the images have labels."""
    probe_images: shared.Source | None = None
    """Labeled images for those probes; auto: `images`, if they are in class folders."""

    @property
    def varies_context(self) -> bool:
        """Return whether `mask_ratio` is a range, so that the number of context patches is drawn in each step."""
        return self.mask_ratio[0] < self.mask_ratio[1]

    def problems(self) -> Iterator[str]:
        """Yield a message for each option that is invalid or contradicts another one."""
        yield from super().problems()
        if not 0 < self.mask_ratio[0] <= self.mask_ratio[1] <= 1:
            ratios = " ".join(f"{ratio:g}" for ratio in dict.fromkeys(self.mask_ratio))
            yield f"{option('mask_ratio')} {ratios}: must be above 0 and at most 1, the smaller one first, e.g. 0.5 0.9"


class PretrainConfig(
    PretrainOptions, shared.ImageOptions, shared.GroupOptions, shared.ViewOptions, shared.TrainerConfig, shared.TrustTeacherOptions
):  # fmt: skip
    """Options of `pretrain`. Defaults are those of the released config (arXiv 2306.07346) unless the help says otherwise."""

    out: Path
    """New run folder."""
    tokenizer: Path
    """Folder written by `fit-tokenizer`."""
    tokens: Path | None = None
    """Token store written by `tokenize`, whose views are used; none: tokens are computed online, on fresh views."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each option that is invalid or contradicts another one."""
        yield from super().problems()
        if self.tokens is not None and "views" in self.model_fields_set and self.views != "center":
            yield f"{option('views')} is for tokens that are computed online, but {option('tokens')} has stored views: omit {option('views')}"


class ReportConfig(LimitOptions, shared.DeviceOptions, shared.TrustTeacherOptions):
    """Options of `report`."""

    positional: ClassVar[str | None] = "run"
    out_is_file: ClassVar[bool] = True
    run: list[Path] = Field(min_length=1, max_length=40)
    """Run folders of `mapet pretrain` or `mapet run`; several are compared, with shared axes."""
    out: Path | None = None
    """New HTML file, under 5 MB, that opens from disk and loads nothing from the network."""
    figures_dir: Path | None = None
    """New folder for the figures (PNG) and the step-through (JSON)."""
    serve: bool = False
    """Serve the page of one run to a browser on this machine, at port 6274 if that is free, and update it while the run trains, until
    Ctrl-C. The run's folder need not exist yet."""
    figures: bool = True
    """Compute figures and the step-through from the last checkpoint; otherwise those in the run's folder are shown."""
    images: shared.Source | None = None
    """Images for the figures; auto: those the run was trained on."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each option that is invalid or contradicts another one."""
        if self.serve and (self.out or self.figures_dir or len(self.run) > 1):
            yield f"{option('serve', True)} shows one run and writes nothing: omit {option('out')}, {option('figures_dir')} and other runs"
        if not self.serve and not self.out and not self.figures_dir:
            yield f"nothing to write: give {option('out')} FILE.html, {option('figures_dir')} FOLDER or {option('serve', True)}"
        if self.figures_dir and (not self.figures or len(self.run) > 1):
            yield f"{option('figures_dir')} computes the figures of one run, got {len(self.run)}: omit {option('figures', False)} and other runs"


class DebugStepConfig(LimitOptions, shared.DeviceOptions, shared.TrustTeacherOptions):
    """Options of `debug-step`."""

    positional: ClassVar[str | None] = "bundle"
    bundle: Path
    """Folder that a run wrote when it stopped: RUN/debug/step-*."""
    images: shared.Source | None = None
    """Images of the run, if they have moved; auto: those in the run's config."""
    precision: shared.Precision | None = None
    """Matmul precision; none: the run's."""
