"""The released model's own numbers: logits, loss and every gradient, in float64, to 1e-6 relative.

`golden/*.safetensors` were computed in float64 with the authors' released MaPeT model in eval mode and stored as float32.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mapet.models.backbone import create_vit
from mapet.models.objectives import MAPET
from mapet.models.pretraining import ViTForPreTraining
from tests.conftest import make_batch

GOLDEN = Path(__file__).parent / "golden"


def golden_pretrainer(name: str) -> tuple[ViTForPreTraining, dict[str, torch.Tensor]]:
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    side, patch = int(meta["img_size"]), int(meta["patch_size"])
    args = {"embed_dim": int(meta["embed_dim"]), "depth": int(meta["depth"]), "num_heads": int(meta["num_heads"])}
    if float(meta["layer_scale_init"]):
        args["init_values"] = float(meta["layer_scale_init"])
    vit = create_vit("vit_tiny_patch16_224", (side, side), patch, model_args=args)
    model = ViTForPreTraining(vit, int(meta["vocab_size"]), MAPET, int(meta["num_context"])).double().eval()
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    own = {key: key if key.split(".")[0] in ("mask_token", "head") else f"vit.{key}" for key in weights}
    model.load_state_dict({own[key]: value.double() for key, value in weights.items()}, strict=True)
    return model, tensors


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.detach() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("name", ["mapet_a", "mapet_b"])
@pytest.mark.parametrize("fused", [True, False])
def test_reproduces_released_model(name: str, fused: bool) -> None:
    model, golden = golden_pretrainer(name)
    for block in model.vit.blocks:
        block.attn.fused_attn = fused
    images, permutation = golden["images"].double(), golden["permutation"]
    batch = make_batch(images, golden["tokens"], permutation)
    logits, loss = model.predict(batch), model(batch).loss
    loss.backward()
    assert relative_error(logits, golden["logits"]) < 1e-6
    assert relative_error(loss, golden["loss"][0]) < 1e-6
    names = {key.removeprefix("vit."): parameter for key, parameter in model.named_parameters()}
    gradients = {key.removeprefix("grads/"): value for key, value in golden.items() if key.startswith("grads/")}
    assert gradients.keys() == names.keys()
    for key, gradient in gradients.items():
        assert relative_error(names[key].grad, gradient) < 1e-6, key
