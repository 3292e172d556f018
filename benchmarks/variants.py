"""Changes of pre-training, one at a time: first weights, masks, queries, warm starts, sizes, learning rates and views.

    python -m benchmarks variants --plan
    python -m benchmarks variants --data FOLDER --out runs/objectives --names none mimetic --seeds 0 1 2 --json benchmarks/results/variants.json

Each run is one of `python -m benchmarks objectives` (same folders, probes and tables) with one change of `VARIANTS`; 'none' is shared with
it. First weights are changed here alone: the product has no options for them. What is done in `--out` is not done again, a run that was
stopped resumes, and `--json` is written after every run. One thread: OMP_NUM_THREADS=1.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mapet
from benchmarks import objectives
from benchmarks.core import Result, Row, cached, save
from benchmarks.objectives import OPTIONS, SETS, Run, fit_and_tokenize, image_list, make
from mapet.data.dataset import ViewDataset
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec, normalize
from mapet.models.backbone import create_vit
from mapet.run_state import RunState
from mapet.training.tasks import pretraining

POSITION_SCALE = 0.3
"""Amplitude of sine-cosine positions."""
QUERY_KEY, VALUE_PROJECTION = (0.7, 0.7), (0.4, -0.4)
"""Mimetic initialization (arXiv 2305.09828): factors of noise and of the identity in the products of query and key, and value and projection."""
WHITENING_EPS = 0.01
"""Added to the eigenvalues of the covariance of patches of normalized pixels before whitening."""
NUM_WHITENING_IMAGES = 1000
Images = Callable[[], Float[Tensor, "n C H W"]]
"""Reads training images as the ViT gets them, normalized."""


def sine_cosine_positions(vit: VisionTransformer, images: Images) -> None:
    """Set the positions of patches to sines and cosines (MAE's), that of the class token to 0; they are learned on."""
    table = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim, interleave_sin_cos=True)
    with torch.no_grad():
        vit.pos_embed[:, : vit.num_prefix_tokens] = 0
        vit.pos_embed[:, vit.num_prefix_tokens :] = POSITION_SCALE * table


def mimetic_attention(vit: VisionTransformer, images: Images) -> None:
    """Make the products of the attention's weights noise plus or minus the identity, as they are after training (arXiv 2305.09828).

    In each head W_q W_k' approximates 0.7 Z + 0.7 I as far as the rank of a head allows; over all heads W_v W_proj is 0.4 Z - 0.4 I; Z is
    normal of variance 1 / D. Products are factorized by their singular value decomposition.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    width = vit.embed_dim
    for block in vit.blocks:
        attention = block.attn
        with torch.no_grad():
            query, key, value = attention.qkv.weight.view(3, attention.num_heads, attention.head_dim, width)
            for head in range(attention.num_heads):
                left, right = factorize(*QUERY_KEY, width, generator)
                query[head] = left[:, : attention.head_dim].T
                key[head] = right[: attention.head_dim]
            left, right = factorize(*VALUE_PROJECTION, width, generator)
            value.copy_(left.T.view_as(value))
            attention.proj.weight.copy_(right.T)


def factorize(
    noise: float, identity: float, width: int, generator: torch.Generator
) -> tuple[Float[Tensor, "D D"], Float[Tensor, "D D"]]:
    """Return L, R with L R = noise Z + identity I, largest singular values first."""
    product = noise * torch.randn(width, width, generator=generator) / width**0.5 + identity * torch.eye(width)
    left, values, right = torch.linalg.svd(product)
    return left * values.sqrt(), values.sqrt()[:, None] * right


def whitened_patches(vit: VisionTransformer, images: Images) -> None:
    """Make the patch embedding a whitening (PCA) of the images' patches, rotated at random; its outputs keep their root mean square.

    Directions of the embedding beyond the number of pixels of a patch are 0; of fewer, the principal components of least variance are dropped.
    """
    projection = vit.patch_embed.proj
    pixels = images()
    with torch.no_grad():
        size = projection(pixels).square().mean().sqrt()
        patches = pixels.unfold(2, projection.kernel_size[0], projection.stride[0])
        patches = patches.unfold(3, projection.kernel_size[1], projection.stride[1])
        points = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2).double()
        variances, vectors = torch.linalg.eigh(torch.cov(points.T))
        rank = min(vit.embed_dim, points.shape[1])
        components = (vectors * (variances + WHITENING_EPS).rsqrt()).T[-rank:]
        rotation = torch.empty(vit.embed_dim, rank, dtype=torch.float64)
        nn.init.orthogonal_(rotation, generator=torch.Generator().manual_seed(torch.initial_seed()))
        weight = rotation @ components
        projection.weight.copy_(weight.view_as(projection.weight))
        projection.bias.copy_(-weight @ points.mean(0))
        scale = size / projection(pixels).square().mean().sqrt()
        projection.weight.mul_(scale)
        projection.bias.mul_(scale)


Initializer = Callable[[VisionTransformer, Images], None]


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        changes: options of `pretrain`.
        initializers: change the first weights, in order.
        first: objective that the first fraction of the epochs is trained with, and that fraction; then a run of its own starts from those weights.
        objectives: those that the change exists for.
    """

    changes: Row = field(default_factory=dict)
    initializers: tuple[Initializer, ...] = ()
    first: tuple[str, float] | None = None
    objectives: tuple[str, ...] = ("mapet", "pim", "mim")


VARIANTS = {
    "none": Variant(),
    "sine-cosine": Variant(initializers=(sine_cosine_positions,)),
    "mimetic": Variant(initializers=(mimetic_attention,)),
    "mimetic + sine-cosine": Variant(initializers=(mimetic_attention, sine_cosine_positions)),
    "whitened patches": Variant(initializers=(whitened_patches,)),
    "mask ratio 0.4 to 0.95": Variant({"mask_ratio": (0.4, 0.95)}),
    "content ignores masks": Variant({"objective": "mapet_content_ignores_masks"}, objectives=("mapet",)),
    "24 predicted": Variant({"num_predict": 24}),
    "12 predicted": Variant({"num_predict": 12}),
    "6 predicted": Variant({"num_predict": 6}),
    "first 40 % mim": Variant(first=("mim", 0.4), objectives=("mapet", "pim")),
    "first 40 % pim": Variant(first=("pim", 0.4), objectives=("mapet",)),
    "first 80 % mapet": Variant(first=("mapet", 0.8), objectives=("pim",)),
    "half lr": Variant({"lr": OPTIONS["lr"] / 2}),
    "double lr": Variant({"lr": OPTIONS["lr"] * 2}),
    "wider": Variant({"model_args": {"embed_dim": 144, "depth": 4, "num_heads": 3}}),
    "deeper": Variant({"model_args": {"embed_dim": 96, "depth": 8, "num_heads": 3}}),
    "half batch": Variant({"batch_size": 64}),
    "crops and flips": Variant({"tokens": None, "views": "random-crop"}),
}
"""Name of a change -> the change. 'first 80 % mapet' drops MaPeT's mask tokens in the last fifth of the epochs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the archives")
    parser.add_argument("--out", type=Path, help="runs; what is done there is not done again")
    parser.add_argument("--names", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--objectives", nargs="+", default=["mapet", "pim", "mim"])
    parser.add_argument("--set", choices=SETS, default="CIFAR-10")
    parser.add_argument("--tokenizer", choices=objectives.TOKENIZERS, default="hog")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plan", action="store_true", help="list runs and minutes, make none")


def run(args: argparse.Namespace) -> Result:
    """Make the chosen runs, seed by seed; with `--plan` none are made and the rows have the minutes that are expected."""
    runs = [
        Run(args.set, args.tokenizer, objective, args.epochs, seed, "" if name == "none" else name, VARIANTS[name].changes)
        for seed in args.seeds
        for name in args.names
        for objective in args.objectives
        if objective in VARIANTS[name].objectives
    ]  # fmt: skip
    if args.plan:
        print(f"{len(runs)} runs, {sum(run.minutes for run in runs) / 60:.1f} hours of one thread")
        return Result([{"run": run.name, "minutes": run.minutes} for run in runs], "none: a plan")
    result = Result([], f"{args.set} of {args.data}", args.seeds)
    for run in runs:
        work = partial(make_variant, run, args.data, args.out)
        result.rows.append(cached(args.out / "rows" / f"{run.name}.json", work))
        save(args.json, args.name, result)
    return result


def make_variant(run: Run, data: Path, out: Path) -> Row:
    """Pre-train and score a run with its change; return what `objectives.make` returns."""
    variant, spec = VARIANTS[run.variant or "none"], SETS[run.images]
    train = image_list(spec, data, out, "train")
    with initialized(variant.initializers, train):
        if variant.first is None:
            return make(run, data, out)
        objective, fraction = variant.first
        folder = out / run.images
        first = folder / f"{run.name}, first part"
        if not (first / "backbone").exists():
            options = fit_and_tokenize(spec, run.tokenizer, train, folder) | OPTIONS | spec.pretrain
            options |= {"objective": objective, "epochs": fraction * run.epochs, "seed": run.seed}
            mapet.pretrain(images=train, out=first, resume=(first / "config.yaml").exists(), **options)
        changes = {"epochs": (1 - fraction) * run.epochs, "init_from": str(first)}
        row = make(replace(run, changes=changes), data, out)
        return row | {"seconds": row["seconds"] + RunState.read(first).seconds}


@contextmanager
def initialized(initializers: tuple[Initializer, ...], train: Path) -> Iterator[None]:
    """Let `mapet.pretrain` change the first weights of its ViTs in this context.

    Args:
        initializers: called in order with each new ViT.
        train: the images that they may read.
    """

    def create(*args: Any, **options: Any) -> VisionTransformer:
        vit = create_vit(*args, **options)
        for initialize in initializers:
            initialize(vit, partial(read_images, vit, train))
        return vit

    vars(pretraining)["create_vit"] = create
    try:
        yield
    finally:
        vars(pretraining)["create_vit"] = create_vit


def read_images(vit: VisionTransformer, train: Path) -> Float[Tensor, "n C H W"]:
    """Return evenly spaced training images as a ViT gets them: center crops, normalized."""
    images, size = list_images(train), vit.patch_embed.img_size
    dataset = ViewDataset(images, ViewSpec(image_size=size), vit.in_chans, size)
    step = max(1, len(images) // NUM_WHITENING_IMAGES)
    batch = dataset.batch([(0, index) for index in range(0, len(images), step)][:NUM_WHITENING_IMAGES])
    assert batch.images is not None
    return normalize(batch.images, vit.in_chans)


SMOKE = ["--plan"]
TABLES = objectives.TABLES
