"""FLOPs of a pre-training step, counted on the meta device."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from mapet.config.pretraining import PretrainConfig
from mapet.data.dataset import Batch
from mapet.models.objectives import num_context_from_ratio
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.tokenizer import load_tokenizer
from mapet.training.tasks.pretraining import build_model


def flops_per_image(config: PretrainConfig) -> float:
    """Return the FLOPs of forward and backward pass of the model for one image, counted by PyTorch on the meta device.

    Matrix products, convolutions and attention count, each multiplication with its addition as two. The teacher, which computes tokens,
    and the optimizer are not counted. If the mask ratio is a range, the result is the mean over 8 evenly spaced ratios.

    Args:
        config: of a pre-training run; its `tokenizer` folder must exist, as it tells image size and number of tokens.

    Raises:
        MapetError: the tokenizer cannot be read, or the model cannot be built for it.
    """
    model = build_model(config, load_tokenizer(config.tokenizer, with_teacher=False)).to("meta").train()
    contexts = [model.num_context]
    if config.varies_context:
        low, high = config.mask_ratio
        contexts = [num_context_from_ratio(low + (high - low) * (i + 0.5) / 8, model.num_patches) for i in range(8)]
    return training_flops(model, contexts)


def training_flops(model: ViTForPreTraining, contexts: list[int]) -> float:
    """Count the FLOPs of a forward and backward pass for one image.

    Args:
        model: on the meta device, in training mode, so that no memory and time are spent.
        contexts: numbers of context patches (those that are not masked) of one pass each, at least one.

    Returns:
        The mean over these passes.
    """
    images = torch.empty(1, model.vit.in_chans, *model.vit.patch_embed.img_size)
    permutation = torch.zeros(1, model.num_patches, dtype=torch.int64)
    targets = permutation if model.target == "tokens" else torch.empty(1, model.num_patches, model.head.out_features)
    with FlopCounterMode(display=False) as counter:
        for c in contexts:
            indices = model.sample_target_indices(c, seed=[0])
            batch = Batch(permutation[:, 0], images, None, targets, permutation, num_context=c, target_indices=indices)
            model(batch.to(torch.device("meta"))).loss.backward()
    return counter.get_total_flops() / len(contexts)
