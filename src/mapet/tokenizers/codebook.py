"""The tokenizer: a teacher and the quantizer that names its features. On disk: safetensors and JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mapet.config.shared import is_own_code
from mapet.errors import MapetError, option
from mapet.files import atomic, canonical_hash, check_format, read_sealed, write_sealed, write_tensors
from mapet.tokenizers.quantizers import Quantizer
from mapet.tokenizers.teacher import Teacher, make_teacher
from mapet.weights import hash_weights

CODEBOOK = "codebook.safetensors"
DESCRIPTION = "visual_tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class CodebookStats:
    """Use of a codebook by the patches it was fitted to.

    Attributes:
        num_used_codes: codes that at least one patch has.
        num_dead_codes: codes that none has.
        perplexity: exp of the entropy of code usage; K when all are equally frequent, 1 when one takes all.
        top_code_fraction: fraction of patches that have the most frequent code: the majority baseline of predicting tokens.
        quantization_error: mean squared distance to the centroid, divided by that to one global mean (0: exact, 1:
            useless); None where there are no centroids.
        num_patches: how many patches it was measured on.
    """

    num_used_codes: int
    num_dead_codes: int
    perplexity: float
    top_code_fraction: float
    quantization_error: float | None
    num_patches: int

    @classmethod
    def from_counts(cls, counts: Int[Tensor, " K"], quantization_error: float | None = None) -> "CodebookStats":
        """Compute them from the number of patches that have each code."""
        fractions = counts.double() / counts.sum()
        used = int((counts > 0).sum())
        perplexity = float(torch.special.entr(fractions).sum().exp())
        top = float(fractions.max())
        return cls(used, len(counts) - used, perplexity, top, quantization_error, int(counts.sum()))

    def __str__(self) -> str:
        error = self.quantization_error
        return (
            f"{self.num_used_codes} of {self.num_used_codes + self.num_dead_codes} codes used ({self.num_dead_codes} dead), "
            f"perplexity {self.perplexity:.1f}, most frequent code {self.top_code_fraction:.1%} of patches, "
            f"{'' if error is None else f'quantization error {error:.3f} of the global mean, '}over {self.num_patches:,} patches"
        )


class Tokenizer(nn.Module):
    """uint8 views -> token ids: the teacher's feature of each patch, quantized (k-CLIP in the paper).

    Attributes:
        teacher: None when loaded for its description alone.
        description: everything `visual_tokenizer.json` holds.
    """

    def __init__(self, teacher: Teacher | None, quantizer: Quantizer, description: dict[str, Any]) -> None:
        super().__init__()
        self.teacher, self.quantizer, self.description = teacher, quantizer, description

    @property
    def centroids(self) -> Float[Tensor, "K d"] | None:
        """Codes in the quantizer's space; None where it has no centroids."""
        return self.quantizer.centroids

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.description["grid"]
        return rows, columns

    @property
    def student_size(self) -> tuple[int, int]:
        height, width = self.description["teacher"]["student_size"]
        return height, width

    @property
    def hash(self) -> str:
        """Identity of the codebook: quantizer, teacher and its weights."""
        return str(self.description["hash"])

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "B C h w"]) -> Int[Tensor, "B rows columns"]:
        """Compute the token ids of views rendered at `teacher.image_size`."""
        assert self.teacher is not None, "loaded without its teacher"
        return self.quantize(self.teacher(images))

    def quantize(self, features: Float[Tensor, "B F rows columns"]) -> Int[Tensor, "B rows columns"]:
        """Return the token id of each feature."""
        flat = features.permute(0, 2, 3, 1)
        return self.quantizer(flat.flatten(0, 2)).view(flat.shape[:3])


def describe(
    teacher: Teacher, quantizer: Quantizer, stats: CodebookStats, fit_config: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of `visual_tokenizer.json`; its hash is over what decides tokens."""
    quantizer_hash = hash_weights(quantizer.state_dict())
    identity = {
        "teacher": {key: value for key, value in teacher.settings.items() if key != "checkpoint"},
        "weights_hash": teacher.weights_hash,
        "quantizer": quantizer.settings,
        "quantizer_hash": quantizer_hash,
    }
    interpolated = teacher.native_grid not in (None, teacher.grid)
    return {
        **identity,
        "format_version": FORMAT,
        "hash": canonical_hash(identity),
        "teacher": teacher.settings,
        "teacher_image_size": list(teacher.image_size),
        "teacher_grid": list(teacher.native_grid or teacher.grid),
        "interpolation": "bilinear, antialiased" if interpolated else None,
        "teacher_metadata": teacher.metadata,
        "grid": list(teacher.grid),
        "vocab_size": quantizer.vocab_size,
        "feature_size": quantizer.num_features,
        "fit_config": fit_config,
        "codebook_stats": asdict(stats),
    }


def save_tokenizer(tokenizer: Tokenizer, usage: Int[Tensor, " K"], folder: Path) -> None:
    """Write the quantizer's tensors, the usage of codes and the description, all or nothing, as a new folder."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_tensors(temporary / CODEBOOK, tokenizer.quantizer.state_dict() | {"usage": usage})
        write_sealed(temporary / DESCRIPTION, tokenizer.description)


def load_tokenizer(folder: Path, with_teacher: bool = True, trusted_teacher: str | None = None) -> Tokenizer:
    """Read a tokenizer. A weights file of its teacher is taken from where it was, else from the tokenizer's folder.

    Args:
        with_teacher: also make the teacher, which `forward` needs.
        trusted_teacher: the 'package.module:function' that may be imported. A codebook from elsewhere could name any function,
            so a custom encoder runs only if its name is given again.

    Raises:
        MapetError: not a tokenizer, damaged, its teacher is not to be had or has other weights than it was fitted with.
    """
    description = read_sealed(folder / DESCRIPTION, "tokenizer")
    try:
        check_format(description["format_version"], FORMAT, "tokenizer", folder)
        tensors = load_file(folder / CODEBOOK)
        del tensors["usage"]
        if hash_weights(tensors) != description["quantizer_hash"]:
            raise ValueError(f"the codebook is not the one that {DESCRIPTION} describes")
        quantizer = Quantizer(description["quantizer"], tensors)
        settings = dict(description["teacher"])
        name = settings["teacher"]
        _ = description["hash"], description["grid"], description["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MapetError(f"{folder}: damaged tokenizer ({error}); fit it again") from None
    if not with_teacher:
        return Tokenizer(None, quantizer, description)
    if is_own_code(name) and name != trusted_teacher:
        raise MapetError(
            f"the tokenizer {folder} runs your own code '{name}'; to allow it, say {option('teacher')} {name}"
        )
    if (checkpoint := settings.get("checkpoint")) and not Path(checkpoint).exists():
        settings["checkpoint"] = str(folder / Path(checkpoint).name)
        if not Path(settings["checkpoint"]).exists():
            raise MapetError(
                f"the weights file of teacher '{name}' in {folder}, {checkpoint}, is not there: put it, or a link to it, into {folder}"
            )
    try:
        teacher = make_teacher(**settings)
    except TypeError as error:
        raise MapetError(f"{folder / DESCRIPTION}: unknown teacher setting ({error})") from None
    if teacher.weights_hash != description["weights_hash"]:
        raise MapetError(
            f"teacher '{name}' has other weights (sha256 {teacher.weights_hash[:12]}) than the codebook in {folder} was fitted "
            f"with ({description['weights_hash'][:12]}): its tokens would be wrong. Put the right weights file there or fit again"
        )
    return Tokenizer(teacher, quantizer, description)
