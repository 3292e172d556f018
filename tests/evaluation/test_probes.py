"""Features of the probe during pre-training."""

import timm
import torch

from mapet.config.evaluation import EvaluateConfig
from mapet.data.sources import list_images
from mapet.device import ComputeContext
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.probes import extract_features


def test_features_of_probes_are_float32_however_the_model_is_trained(digits):
    """In bfloat16 an untrained ViT loses several points of the linear probe: its features vary little around their mean."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2
    )
    data = LabeledSet.from_images(list_images(digits / "test"))
    float32, bfloat16 = (ComputeContext(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16))
    result, expected = (extract_features(vit, data, compute).layer_features() for compute in (bfloat16, float32))
    assert torch.equal(result, expected)
    assert EvaluateConfig.model_fields["precision"].default == "float32"
