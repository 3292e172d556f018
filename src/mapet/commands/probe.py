"""Stage: how good are a backbone's frozen features?"""

import logging

from mapet.commands.command import command
from mapet.config.probe import ProbeConfig

log = logging.getLogger("mapet")


@command(ProbeConfig)
def probe(config: ProbeConfig) -> dict[str, dict[str, float]]:
    """Linear probe and weighted k-NN (k = 20) on frozen features, against the same ViT untrained.

    Example:
      mapet probe --backbone runs/photos --images labelled/train --test-images labelled/test
    """
    import torch

    from mapet.device import Compute
    from mapet.evaluation.classifiers import knn_accuracy, linear_accuracy
    from mapet.evaluation.features import extract_features, train_and_test
    from mapet.files import write_json
    from mapet.models.backbone import load_backbone, prepare_for_device

    compute = Compute.choose(config.device, config.precision)
    train, test = train_and_test(config.images, config.test_images)
    results = {}
    for name in ["untrained", "pretrained"] if config.untrained else ["pretrained"]:
        torch.manual_seed(config.seed)
        vit = load_backbone(config.backbone, pretrained=name == "pretrained", **config.model_args)
        vit = prepare_for_device(vit, compute)
        fit, check = (
            extract_features(vit, data, compute, config.pool, config.batch_size, config.num_workers)
            for data in (train, test)
        )
        results[name] = {"linear": linear_accuracy(*fit, *check), "knn": knn_accuracy(*fit, *check)}
        log.info("%-10s linear probe %.3f   k-NN %.3f", name, results[name]["linear"], results[name]["knn"])
    chance = float(torch.bincount(check[1]).max() / len(check[1]))
    log.info(
        "%s training and %s test images, %d classes; commonest class %.3f",
        f"{len(fit[1]):,}",
        f"{len(check[1]):,}",
        len(train.classes),
        chance,
    )
    results["data"] = {"majority_accuracy": chance, "train_images": len(fit[1]), "test_images": len(check[1])}
    if config.out:
        write_json(config.out, results)
    return results
