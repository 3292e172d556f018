"""Several classes an image: linear probes judged by mean average precision."""

from functools import partial

import numpy as np
import torch

from mapet.evaluation.average_precision import average_precisions, mean_average_precision
from mapet.evaluation.bench import Bench, Outcome
from mapet.evaluation.intervals import bootstrap
from mapet.evaluation.linear import linear_probes


def multi_label(bench: Bench) -> Outcome:
    """mAP of linear probes with a logistic loss for each class, plain and with batch norm."""
    assert bench.sets.boxes is not None
    train, test = bench.sets.boxes
    targets = torch.from_numpy(train.shown)[bench.train.index]
    truth = torch.from_numpy(test.shown)[bench.test.index]
    outcome = Outcome()
    probes = linear_probes(
        bench.train, targets, len(train.classes), bench.compute, bench.options.epochs, "several", bench.options.seed
    )
    for name, probe in probes.items():
        scores = probe.predict(bench.test)
        figure = bootstrap(partial(mean_average_precision, scores, truth), len(truth), choice=str(probe.choice))
        outcome.figures[f"multi-label, {name}: mAP"] = figure
        each = average_precisions(scores, truth)
        outcome.details[name] = {
            label: None if np.isnan(ap) else round(float(ap), 4) for label, ap in zip(train.classes, each, strict=True)
        }
    return outcome
