"""The protocols of `mapet evaluate`: one table of functions, each from a backbone and data to figures."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mapet.data.views import ViewSpec
from mapet.evaluation.attentive import TokenBank, attentive_logits, attentive_probe
from mapet.evaluation.bench import SHOWN, Bench, Outcome
from mapet.evaluation.classifiers import knn_votes, linear_accuracy
from mapet.evaluation.features import centred_batches
from mapet.evaluation.intervals import Figure, over_seeds
from mapet.evaluation.shifts import corruptions, other_sets, resolution
from mapet.evaluation.splits import few_labels, name_of
from mapet.evaluation.tasks.detection import detection
from mapet.evaluation.tasks.multilabel import multi_label
from mapet.evaluation.tasks.segmentation import segmentation
from mapet.evaluation.unlabelled import agreement, clusters, diagnostics

MOST_RANK, MOST_CLUSTER, MOST_VIEWS = 25_600, 50_000, 1000
"""Images for the rank (the RankMe paper's number), for k-means, for other views of the same images."""
QUERIES = 10
"""Rows of the panel of neighbours."""


def knn(bench: Bench) -> Outcome:
    """Weighted k-NN of the last layer's features."""
    outcome, k = Outcome(), min(bench.options.k, len(bench.train))
    similarity, rows = (part[:, :k] for part in bench.test_neighbours)
    votes = knn_votes(similarity, bench.train.labels[rows], bench.num_classes)
    outcome.classify(f"k-NN, k {k}", votes.argmax(1), bench.test.labels, bench.classes, "")
    return outcome


def linear(bench: Bench) -> Outcome:
    """Linear probes, plain and with batch norm, over layers and learning rates."""
    outcome = Outcome()
    for name, probe in bench.probes.items():
        predicted = probe.predict(bench.test).argmax(1)
        outcome.classify(name, predicted, bench.test.labels, bench.classes, str(probe.choice))
        outcome.details[name] = {
            "layer": probe.choice.layer, "lr": probe.choice.lr,
            "held_out_by_layer": {str(layer): score for layer, score in probe.held_out.items()},
        }  # fmt: skip
    return outcome


def attentive(bench: Bench) -> Outcome:
    """Attentive probe of the last layer's patch tokens."""
    outcome = Outcome()
    train, test = (TokenBank(bench.encoder, data, bench.place) for data in (bench.sets.train, bench.sets.test))
    labels = torch.from_numpy(bench.sets.train.labels)
    probe, lr = attentive_probe(
        train, labels, bench.num_classes, bench.compute, bench.options.attentive_epochs, bench.options.seed
    )
    index, logits = attentive_logits(probe, test, bench.compute)
    truth = torch.from_numpy(bench.sets.test.labels)[index]
    outcome.classify("attentive", logits.argmax(1), truth, bench.classes, f"lr {lr:g}")
    return outcome


def few_label(bench: Bench) -> Outcome:
    """Logistic regression on the last layer's features with few labels, over several fixed splits."""
    outcome = Outcome()
    train, test = bench.train, bench.test
    mean_square = [torch.zeros(train.last.stop - train.last.start) for _ in range(2)]
    for _, block in train.layer_blocks():  # all training images, whose labels are not looked at
        mean_square[0] += block.sum(0) / len(train)
        mean_square[1] += block.square().sum(0) / len(train)
    mean = mean_square[0]
    deviation = (mean_square[1] - mean.square()).clamp_min(1e-12).sqrt()
    check = (test.of_layer() - mean) / deviation
    row_of = torch.full((len(bench.sets.train.labels),), -1)
    row_of[train.index] = torch.arange(len(train))
    for amount in bench.options.few_labels:
        scores = []
        for seed in range(bench.options.seeds):
            rows = row_of[torch.from_numpy(few_labels(bench.sets.train, amount, seed))]
            rows = rows[rows >= 0]  # that could be read
            fit = (train.of_layer(rows) - mean) / deviation
            each = len(rows) / bench.num_classes
            scores.append(
                linear_accuracy(
                    fit, train.labels[rows], check, test.labels, strength=None if each >= 10 else 0.1, scaled=True
                )
            )
        outcome.figures[f"few labels, {name_of(amount)}"] = over_seeds(scores)
        outcome.details[name_of(amount)] = scores
    return outcome


def cluster(bench: Bench) -> Outcome:
    """k-means of the test features with as many clusters as classes: accuracy after matching, NMI, ARI."""
    outcome = Outcome()
    features, labels = bench.test.of_layer()[:MOST_CLUSTER], bench.test.labels[:MOST_CLUSTER].numpy()
    found = [agreement(clusters(features, bench.num_classes, seed), labels) for seed in range(bench.options.seeds)]
    for name in found[0]:
        outcome.figures[f"clusters, {name}"] = over_seeds(
            [one[name] for one in found], least=-0.5 if name == "ARI" else 0.0
        )
    return outcome


BETTER = {"RankMe": ", higher is better", "effective rank": ", higher is better"} | dict.fromkeys(
    ("dead dimensions", "mean cosine", "uniformity", "alignment"), ", lower is better"
)
"""Of measures without labels; the spread is best near 1. They tell whether features collapsed, not what they are good for."""


def rank(bench: Bench) -> Outcome:
    """Rank, spread and collapse of the last layer's features; no labels."""
    features = bench.train.of_layer(torch.arange(min(MOST_RANK, len(bench.train))))
    few = bench.train.index[:MOST_VIEWS].numpy()
    spec = ViewSpec(kind="random-crop", image_size=bench.encoder.image_size)
    images = bench.sets.train.images.subset(few)
    batches = [
        [(0, i) for i in part] for part in np.array_split(np.arange(len(few)), -(-len(few) // bench.place.batch_size))
    ]
    views, index = [], []
    for rows, pixels in centred_batches(
        images, bench.encoder.image_size, bench.encoder.channels, batches, bench.place.workers, "views", spec=spec
    ):
        views.append(bench.encoder.pooled(pixels, [max(bench.layers)], bench.options.pool)[0].cpu())
        index.append(rows)
    found = diagnostics(features)
    found["alignment"] = diagnostics(features[torch.cat(index)], torch.cat(views))["alignment"]
    of = f"{len(features):,} images"
    return Outcome({name: Figure(value, of=f"{of}{BETTER.get(name, '')}") for name, value in found.items()})


def neighbours(bench: Bench) -> Outcome:
    """The nearest training images of some test images, for a picture."""
    chosen = np.argsort(bench.sets.test.images.subset(bench.test.index.numpy()).keys())[:QUERIES]
    similarity, rows = (part[chosen, :SHOWN] for part in bench.test_neighbours)
    return Outcome(
        details={
            "queries": bench.test.index[chosen].tolist(),
            "nearest": bench.train.index[rows].tolist(),
            "similarity": [[round(value, 4) for value in row] for row in similarity.tolist()],
        }
    )


@dataclass(frozen=True)
class Protocol:
    """A row of the table.

    Attributes:
        needs: 'labels', 'images', 'others', 'masks', 'annotations': what data it can't do without.
        costly: only run when asked for.
    """

    run: Callable[[Bench], Outcome]
    needs: str
    costly: bool = False


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(knn, "labels"),
    "linear": Protocol(linear, "labels"),
    "attentive": Protocol(attentive, "labels"),
    "few-label": Protocol(few_label, "labels"),
    "cluster": Protocol(cluster, "labels"),
    "rank": Protocol(rank, "images"),
    "neighbours": Protocol(neighbours, "images"),
    "ood": Protocol(other_sets, "others"),
    "corruptions": Protocol(corruptions, "labels", costly=True),
    "resolution": Protocol(resolution, "labels", costly=True),
    "multi-label": Protocol(multi_label, "annotations"),
    "segmentation": Protocol(segmentation, "masks"),
    "detection": Protocol(detection, "annotations", costly=True),
}
