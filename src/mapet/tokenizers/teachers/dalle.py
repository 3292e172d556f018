"""The encoder of OpenAI's discrete VAE (Ramesh et al. 2021, arXiv:2102.12092): the largest of its 8192 logits per patch is the
visual token of BEiT (Bao et al. 2022). The architecture and the names of its parameters are those of the published weights."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mapet.config.shared import Size
from mapet.errors import MapetError, option
from mapet.weights import describe_mismatch, read_weights

GROUPS = 4
BLOCKS_PER_GROUP = 2
DOWNSAMPLING = 8
"""Pixels of the image per row and column of the grid: the 14 x 14 patches of a 224-px student need images of 112 px."""


class DalleEncoder(nn.Module):
    """The encoder of the dVAE: 4 groups of residual blocks, with 2 x 2 max pooling between them; its output are logits of codes.

    Its parameters are zeros until weights are loaded.

    Attributes:
        num_logits: V, size of the vocabulary.
        image_size: (h, w) of its images, pixels; `build` sets it.
        metadata: mean and std that are equivalent to the scaling in `forward`.
    """

    image_size: tuple[int, int]

    def __init__(self, width: int = 256, vocab_size: int = 8192) -> None:
        """Build the encoder, with the published names of its parts: blocks.input, blocks.group_1.block_1, ..., blocks.output.

        Args:
            width: channels of the first group; each further group has twice as many.
            vocab_size: V, number of logits.
        """
        super().__init__()
        self.num_logits = vocab_size
        self.metadata = {"mean": [-0.125] * 3, "std": [1.25] * 3}  # (x + 0.125) / 1.25 = 0.8 x + 0.1
        self.blocks = nn.Sequential(OrderedDict(input=_Conv(3, width, 7)))
        in_channels = width
        for group in range(GROUPS):
            out_channels = width * 2**group
            blocks = nn.Sequential()
            for block in range(BLOCKS_PER_GROUP):
                blocks.add_module(f"block_{block + 1}", _Block(in_channels, out_channels))
                in_channels = out_channels
            if group < GROUPS - 1:
                blocks.add_module("pool", nn.MaxPool2d(2))
            self.blocks.add_module(f"group_{group + 1}", blocks)
        output = OrderedDict(relu=nn.ReLU(), conv=_Conv(in_channels, vocab_size, 1))
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B V h/8 w/8"]:
        """Return the logits of each code for images in [0, 1], whose sides are multiples of 8, in the dtype of the images."""
        return self.blocks(0.8 * images + 0.1)  # the logit-Laplace loss keeps pixels away from 0 and 1


class _Block(nn.Module):
    """A pre-activation bottleneck block, whose residual branch is divided by the square of the number of blocks."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Build the identity path and the four convolutions of the residual path, with their published names."""
        super().__init__()
        self.id_path = _Conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        inner = out_channels // 4
        sizes = [(in_channels, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, out_channels, 1)]
        self.res_path = nn.Sequential()
        for index, size in enumerate(sizes, 1):
            self.res_path.add_module(f"relu_{index}", nn.ReLU())
            self.res_path.add_module(f"conv_{index}", _Conv(*size))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return self.id_path(x) + self.res_path(x) / (GROUPS * BLOCKS_PER_GROUP) ** 2


class _Conv(nn.Module):
    """A 2-D convolution with padding "same", whose weight and bias have the published names `w` and `b`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return F.conv2d(x, self.w.to(x.dtype), self.b.to(x.dtype), padding="same")


def build(checkpoint: str | None, teacher_size: Size | None, grid: tuple[int, int]) -> DalleEncoder:
    """Return the encoder with OpenAI's weights.

    Args:
        checkpoint: the published encoder.pkl, or a state dict of the same names (torch or safetensors).
        teacher_size: (h, w) of its images, pixels; None: 8 pixels for each row and column of `grid`.
        grid: (rows, columns) of the student's patches.

    Raises:
        MapetError: there is no checkpoint, it cannot be read (see `read_weights`), or it is of something else.
    """
    if checkpoint is None:
        raise MapetError(
            f"teacher 'dalle' needs OpenAI's published weights: give {option('teacher_checkpoint')} encoder.pkl"
        )
    weights, encoder = read_weights(checkpoint), DalleEncoder()
    if mismatch := describe_mismatch(weights, encoder.state_dict()):
        raise MapetError(f"{checkpoint} is not the encoder of OpenAI's dVAE (encoder.pkl): {mismatch}")
    encoder.load_state_dict(weights)
    encoder.image_size = teacher_size or (DOWNSAMPLING * grid[0], DOWNSAMPLING * grid[1])
    return encoder
