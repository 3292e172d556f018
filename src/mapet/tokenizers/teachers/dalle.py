"""The encoder of OpenAI's discrete VAE (Ramesh et al. 2021, arXiv:2102.12092), whose 8192 logits a patch are the visual
tokens of BEiT (Bao et al. 2022). The architecture and the names of its parameters are those of the published weights."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mapet.errors import MapetError, option
from mapet.weights import describe_mismatch, read_weights

GROUPS = 4
BLOCKS = 2  # of a group
REDUCTION = 8
"""Pixels of the image to one of the grid, each way: the 14 x 14 patches of a 224-px student are 112 px here."""


class DalleEncoder(nn.Module):
    """(B, 3, h, w) in [0, 1] -> (B, V, h / 8, w / 8) logits, in the precision of the images. h, w: multiples of 8.

    Its parameters are zeros until weights are loaded.

    Attributes:
        num_logits: size of the vocabulary.
    """

    image_size: tuple[int, int]

    def __init__(self, width: int = 256, vocab_size: int = 8192) -> None:
        super().__init__()
        self.num_logits = vocab_size
        self.metadata = {
            "mean": [-0.125] * 3,
            "std": [1.25] * 3,
        }  # of the input of `forward`, as other teachers give it
        self.blocks = nn.Sequential(OrderedDict(input=_Conv(3, width, 7)))
        channels = width
        for group in range(GROUPS):
            blocks = nn.Sequential()
            for block in range(BLOCKS):
                blocks.add_module(f"block_{block + 1}", _Block(channels, width << group))
                channels = width << group
            if group < GROUPS - 1:
                blocks.add_module("pool", nn.MaxPool2d(2))
            self.blocks.add_module(f"group_{group + 1}", blocks)
        output = OrderedDict(relu=nn.ReLU(), conv=_Conv(channels, vocab_size, 1))
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B V h/8 w/8"]:
        return self.blocks(0.8 * images + 0.1)  # the logit-Laplace loss keeps pixels away from 0 and 1


class _Block(nn.Module):
    """A residual bottleneck that acts before its convolutions, scaled down by the square of the depth."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.id_path = _Conv(channels, out, 1) if channels != out else nn.Identity()
        inner = out // 4
        self.res_path = nn.Sequential()
        for number, size in enumerate([(channels, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, out, 1)], 1):
            self.res_path.add_module(f"relu_{number}", nn.ReLU())
            self.res_path.add_module(f"conv_{number}", _Conv(*size))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B out h w"]:
        return self.id_path(x) + self.res_path(x) / (GROUPS * BLOCKS) ** 2


class _Conv(nn.Module):
    """A convolution that keeps the size, with the published names of its weight and bias."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(out, channels, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(out))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B out h w"]:
        return F.conv2d(x, self.w.to(x.dtype), self.b.to(x.dtype), padding="same")


def build(checkpoint: str | None, teacher_size: tuple[int, int] | None, grid: tuple[int, int]) -> DalleEncoder:
    """Return the encoder with OpenAI's weights.

    Args:
        checkpoint: the published encoder.pkl, or a state dict of the same names (torch or safetensors).

    Raises:
        MapetError: no checkpoint, one that can't be read (see `read_weights`), or of something else.
    """
    if checkpoint is None:
        raise MapetError(
            f"the dVAE teacher needs the encoder that OpenAI published with DALL-E: {option('teacher_checkpoint')} encoder.pkl"
        )
    weights, encoder = read_weights(checkpoint), DalleEncoder()
    if mismatch := describe_mismatch(weights, encoder.state_dict()):
        raise MapetError(f"{checkpoint} is not the encoder of OpenAI's dVAE (encoder.pkl): {mismatch}")
    encoder.load_state_dict(weights)
    encoder.image_size = teacher_size or (REDUCTION * grid[0], REDUCTION * grid[1])
    return encoder
