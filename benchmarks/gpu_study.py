"""MaPeT, PIM and MIM on the whole of CIFAR-10 on a GPU, at equal epochs, seed after seed: ends by itself after 9 minutes.

    python -m benchmarks gpu-study --json benchmark_results/gpu_study.json       # with the file of `python -m benchmarks gpu-data`

It needs PyTorch and timm; the JSON is written after every run. Images and tokens (k-means of 4 px patches) stay on the device. The
training is mapet's: model, loss, optimizer, schedule, gradient, color jitter as in the release; bfloat16, and compiled where mapet would.
Frozen features (mean of the patches after the final norm) are standardized, and scored by weighted 20-NN and by logistic regression.
mapet's linear probe needs scikit-learn, so it is not used here: C is of the same candidates and chosen by the same rule, the smallest
within one standard error of the best, but on a tenth of the training images. The untrained ViT of each seed is scored too.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_data
from benchmarks.core import Result, Row, save, seconds_left, time_limit, timed
from benchmarks.tables import Table
from mapet.data.dataset import Batch
from mapet.data.views import normalize
from mapet.device import ComputeContext
from mapet.models.backbone import create_vit, prepare_for_device
from mapet.models.objectives import get_objective
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.kmeans import KMeans, assign
from mapet.training.step import ForwardBackward, auto_compile, auto_micro_batch, create_optimizer, create_scheduler

OBJECTIVES = ("mapet", "pim", "mim")
PATCH, MASK_RATIO, JITTER, CLIP, WEIGHT_DECAY, MIN_LR = 4, 0.75, 0.4, 3.0, 0.05, 1e-5
FIT_IMAGES = 8000
"""Images whose patches k-means clusters."""
K, TEMPERATURE = 20, 0.07
C_GRID = tuple(10.0**exponent for exponent in range(-6, 9))
HELD_OUT = 10
"""One in this many training images is held out to choose C."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu_data.add_data(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--per-class", type=int, help="training images; default: all")
    parser.add_argument("--width", type=int, default=192, help="of the ViT, with a head for every 64")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seeds", type=int, default=5, help="at most, as many as there is time for")
    parser.add_argument("--minutes", type=float, default=9, help="until it ends, from the start; default: %(default)s")


def run(args: argparse.Namespace) -> Result:
    """Run an untrained ViT and each objective, seed by seed; a run that would exceed the time is not started."""
    compute = ComputeContext.from_options(args.device)
    rows: list[Row] = []
    result = Result(rows, f"CIFAR-10 of {args.data}", [])
    spent: dict[str, float] = {}  # objective -> seconds of its longest run
    with time_limit(args.minutes), gpu_data.opened(args.data) as file:
        train = load(file, "train", args.per_class, compute)
        test = load(file, "test", None, compute)
        tokens = tokenize(train[0], args.vocab_size)
        models = {name: make_model(name, args, compute) for name in OBJECTIVES}
        for seed in range(args.seeds):
            weights = initial_weights(args, seed)
            result.seeds.append(seed)
            for name in ("untrained", *OBJECTIVES):
                if seconds_left(args.minutes) < 1.1 * spent.get(name, 0.0):
                    return result
                model = models.get(name, models["mapet"])
                model.load_state_dict(weights)
                row: Row = {"objective": name, "seed": seed, "epochs": 0}
                started = time.monotonic()
                if name != "untrained":
                    row |= pretrain(model, train[0], tokens, args, seed, compute)
                seconds, scores = timed(lambda: evaluate(model, train, test))  # noqa: B023
                rows.append(row | scores | {"evaluation_seconds": seconds})
                spent[name] = max(spent.get(name, 0.0), time.monotonic() - started)
                print(rows[-1], flush=True)
                save(getattr(args, "json", None), "gpu_study", result)
    return result


def load(file: Path, part: str, per_class: int | None, compute: ComputeContext) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels on the device."""
    images, labels = gpu_data.load_cifar10(file, part, per_class)
    return compute.to(torch.from_numpy(images)), compute.to(torch.from_numpy(labels))


def tokenize(images: Tensor, vocab_size: int) -> Tensor:
    """(n, 64) token ids: the nearest of the centroids of patches."""
    patches = torch.cat(
        [F.pixel_unshuffle(part.float() / 255, PATCH).flatten(2).transpose(1, 2) for part in images.split(5000)]
    )
    fit = patches[:: -(-len(patches) // FIT_IMAGES)].flatten(0, 1)
    centroids = KMeans(vocab_size).fit(fit).centroids.to(images.device)
    return torch.cat([assign(part.flatten(0, 1), centroids)[0].view(len(part), -1) for part in patches.split(5000)])


def make_model(objective: str, args: argparse.Namespace, compute: ComputeContext) -> ViTForPreTraining:
    """On the device, and compiled where a run of mapet would be; it serves all seeds."""
    size = {"embed_dim": args.width, "depth": args.depth, "num_heads": max(1, args.width // 64)}
    vit = create_vit("vit_tiny_patch16_224", (32, 32), PATCH, model_args=size)
    num_patches = vit.patch_embed.num_patches
    num_context = num_patches - round(MASK_RATIO * num_patches)
    model = prepare_for_device(ViTForPreTraining(vit, args.vocab_size, get_objective(objective), num_context), compute)
    if auto_compile(None, compute, args.epochs * (50_000 // args.batch)):
        model.compile()
    return model


def initial_weights(args: argparse.Namespace, seed: int) -> dict[str, Tensor]:
    """Return the initial weights, the same for all objectives."""
    torch.manual_seed(seed)
    return make_model("mapet", args, ComputeContext.from_options("cpu", "float32")).state_dict()


def pretrain(
    model: ViTForPreTraining,
    images: Tensor,
    tokens: Tensor,
    args: argparse.Namespace,
    seed: int,
    compute: ComputeContext,
) -> Row:
    """Train the model in place; order, jitter and permutations depend on the seed, the same for all objectives."""
    batch_size = min(args.batch, len(images))
    steps_per_epoch = len(images) // batch_size
    optimizer = create_optimizer(model, "adamw", args.lr, WEIGHT_DECAY)
    total = args.epochs * steps_per_epoch
    schedule = create_scheduler(optimizer, total, total // 30, MIN_LR)
    forward_backward = ForwardBackward(model, compute, auto_micro_batch(model, batch_size, compute))
    generator = torch.Generator(images.device).manual_seed(seed)
    losses: list[Tensor] = []

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=images.device)

    def train() -> None:
        for step in range(total):
            if step % steps_per_epoch == 0:
                order = uniform(len(images)).argsort()
                losses.clear()
            index = order[step % steps_per_epoch * batch_size :][:batch_size]
            jitter = 1 + JITTER * (2 * uniform(len(index), 3) - 1)
            permutation = uniform(len(index), tokens.shape[1]).argsort(1)
            pixels = normalize(images[index], 3, jitter)
            schedule.step_update(step)
            outputs = forward_backward(Batch(index, pixels, targets=tokens[index], permutation=permutation))
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.extend(output.loss for output in outputs)

    seconds, _ = timed(train)
    return {"epochs": args.epochs, "seconds": seconds, "images_per_second": total * batch_size / seconds,
            "loss": float(torch.stack(losses).sum()) / steps_per_epoch}  # fmt: skip


# ---- frozen features


@torch.no_grad()
def features(model: ViTForPreTraining, images: Tensor) -> Tensor:
    """(n, D) float32: mean of the patches after the final norm."""
    vit = model.vit.eval()
    parts = []
    for part in images.split(2000):
        parts.append(vit.forward_features(normalize(part, 3))[:, vit.num_prefix_tokens :].mean(1))
    return torch.cat(parts)


def evaluate(model: ViTForPreTraining, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Row:
    """Accuracies on the test images, and the C that was chosen."""
    x, y = features(model, train[0]), train[1]
    test_x, test_y = features(model, test[0]), test[1]
    mean, std = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    scaled, test_scaled = (x - mean) / std, (test_x - mean) / std
    held_out = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device) < -(-len(x) // HELD_OUT)
    accuracies = [accuracy(logistic(scaled[~held_out], y[~held_out], C), scaled[held_out], y[held_out]) for C in C_GRID]
    best = max(accuracies)
    error = math.sqrt(best * (1 - best) / int(held_out.sum()))
    chosen = next(C for C, value in zip(C_GRID, accuracies, strict=True) if value >= best - error)
    knn = (knn_votes(scaled, y, test_scaled).argmax(1) == test_y).double().mean()
    linear = accuracy(logistic(scaled, y, chosen), test_scaled, test_y)
    return {"knn": float(knn), "linear": linear, "C": chosen}


def knn_votes(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """(queries, classes) votes of the 20 nearest by cosine, weighted by exp(cosine / 0.07)."""
    x, num_classes = F.normalize(x, dim=1), int(y.max()) + 1
    votes = []
    for part in F.normalize(queries, dim=1).split(2000):
        similarity, nearest = (part @ x.T).topk(min(K, len(x)), dim=1)
        weights = (similarity / TEMPERATURE).exp()
        votes.append(torch.zeros(len(part), num_classes, device=x.device).scatter_add_(1, y[nearest], weights))
    return torch.cat(votes)


def logistic(x: Tensor, y: Tensor, C: float) -> tuple[Tensor, Tensor]:
    """Weight and bias that minimize C times the sum of cross-entropies plus half the squared norm of the weight, by L-BFGS."""
    weight = torch.zeros(int(y.max()) + 1, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(len(weight), device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() / (2 * C * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def accuracy(fit: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    return float((F.linear(x, *fit).argmax(1) == y).double().mean())


def by_objective(rows: list[Row]) -> list[Row]:
    """Means over seeds, and standard errors where there are two or more."""
    summary = []
    for name in ("untrained", *OBJECTIVES):
        runs = [row for row in rows if row["objective"] == name]
        if runs:
            line: Row = {"objective": name, "runs": len(runs), "epochs": runs[0]["epochs"]}
            for key in ("linear", "knn", "seconds"):
                values = [row[key] for row in runs if key in row]
                error = f" (SE {statistics.stdev(values) / len(values) ** 0.5:.3g})" if len(values) > 1 else ""
                line[key] = f"{statistics.fmean(values):.3f}{error}" if values else None
            summary.append(line)
    return summary


SMOKE = ["--device", "cpu", "--data", "random", "--width", "32", "--depth", "2", "--vocab-size", "16", "--epochs", "1", "--batch",
         "16", "--seeds", "1"]  # fmt: skip
TABLES = {
    "main": Table({
        "objective": "{objective}", "epochs": "{epochs}", "seeds": "{runs}", "linear probe": "{linear}", "k-NN": "{knn}", "s a run": "{seconds}",
    }, rows=by_objective),
}  # fmt: skip
