"""The tokenizer: a teacher and the quantizer that names its features. On disk: safetensors and JSON."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mapet.config.shared import is_own_code
from mapet.errors import MapetError
from mapet.files import atomic, canonical_hash, check_format, read_sealed, write_sealed, write_tensors
from mapet.tokenizers.quantizers import Quantizer
from mapet.tokenizers.teachers import Teacher, make_teacher

CODEBOOK = "codebook.safetensors"
DESCRIPTION = "tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class Health:
    """Is this codebook any good? Measured on the patches it was fitted to.

    Attributes:
        used_codes: codes that at least one patch has.
        dead_codes: codes that none has.
        perplexity: exp of the entropy of code usage; K when all are equally common, 1 when one takes all.
        commonest_share: share of patches that have the commonest code; what always guessing it would score.
        quantization_error: mean squared distance to the centroid, divided by that to one global mean (0: exact, 1:
            useless); None where there are no centroids.
        patches: how many patches it was measured on.
    """

    used_codes: int
    dead_codes: int
    perplexity: float
    commonest_share: float
    quantization_error: float | None
    patches: int

    @classmethod
    def measure(cls, counts: Int[Tensor, " K"], error: float | None = None) -> "Health":
        share = counts.double() / counts.sum()
        used = share[share > 0]
        return cls(
            used_codes=len(used),
            dead_codes=len(counts) - len(used),
            perplexity=float((-(used * used.log()).sum()).exp()),
            commonest_share=float(share.max()),
            quantization_error=error,
            patches=int(counts.sum()),
        )

    def __str__(self) -> str:
        total = self.used_codes + self.dead_codes
        error = (
            ""
            if self.quantization_error is None
            else f"quantization error {self.quantization_error:.3f} of the global mean's, "
        )
        return (
            f"{self.used_codes} of {total} codes used ({self.dead_codes} dead), perplexity {self.perplexity:.1f}, "
            f"commonest code {self.commonest_share:.1%} of patches, {error}over {self.patches:,} patches"
        )


class Tokenizer(nn.Module):
    """uint8 views -> visual words: the teacher's feature of each patch, named by the quantizer (k-CLIP in the paper).

    Attributes:
        teacher: None when loaded for its description alone.
        description: everything `tokenizer.json` holds.
    """

    def __init__(self, teacher: Teacher | None, quantizer: Quantizer, description: dict[str, Any]) -> None:
        super().__init__()
        self.teacher = teacher
        self.quantizer = quantizer
        self.description = description

    @property
    def centroids(self) -> Float[Tensor, "K d"] | None:
        """What words stand for, in the quantizer's space; None where they have no centroids."""
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
        """Token ids of views rendered at `teacher.image_size`."""
        assert self.teacher is not None, "loaded without its teacher"
        return self.name_features(self.teacher(images))

    def name_features(self, features: Float[Tensor, "B F rows columns"]) -> Int[Tensor, "B rows columns"]:
        """The word of each feature."""
        flat = features.permute(0, 2, 3, 1)
        return self.quantizer(flat.flatten(0, 2)).view(flat.shape[:3])


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe(teacher: Teacher, quantizer: Quantizer, health: Health, fitting: dict[str, Any]) -> dict[str, Any]:
    """The content of `tokenizer.json`. Its hash is that of what decides words; the rest tells."""
    content = _hash(quantizer.state_dict())
    identity = {"teacher": teacher.settings, "weights_hash": teacher.weights_hash, "quantizer_hash": content}
    identity["teacher"] = {key: value for key, value in teacher.settings.items() if key != "checkpoint"}
    identity["quantizer"] = quantizer.settings
    return {
        "format": FORMAT,
        "hash": canonical_hash(identity),
        "teacher": teacher.settings,
        "teacher_image_size": list(teacher.image_size),
        "teacher_grid": list(teacher.own_grid or teacher.grid),
        "interpolation": None if teacher.own_grid in (None, teacher.grid) else "bilinear, antialiased",
        "about_teacher": teacher.about,
        "weights_hash": teacher.weights_hash,
        "quantizer": quantizer.settings,
        "quantizer_hash": content,
        "grid": list(teacher.grid),
        "vocab_size": quantizer.vocab_size,
        "feature_size": quantizer.num_features,
        "fitting": fitting,
        "health": asdict(health),
    }


def save_tokenizer(tokenizer: Tokenizer, usage: Int[Tensor, " K"], folder: Path) -> None:
    """Write `codebook.safetensors` (the quantizer's tensors, usage) and `tokenizer.json`, both or neither, as a new folder."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_tensors(temporary / CODEBOOK, tokenizer.quantizer.state_dict() | {"usage": usage})
        write_sealed(temporary / DESCRIPTION, tokenizer.description)


def load_tokenizer(
    folder: Path, with_teacher: bool = True, allow: str | None = None, checkpoint: str | None = None
) -> Tokenizer:
    """Read a tokenizer.

    Args:
        with_teacher: also make the teacher, which `forward` needs.
        allow: the 'package.module:function' that may be imported. A codebook from elsewhere could name any function,
            so a person's own encoder runs only if its name is given again.
        checkpoint: the teacher's weights, if they are no longer where they were.

    Raises:
        MapetError: not a tokenizer, damaged, its teacher is not to be had or has other weights than it was fitted with.
    """
    description = read_sealed(folder / DESCRIPTION, "tokenizer")
    try:
        check_format(description["format"], FORMAT, "tokenizer", folder)
        tensors = load_file(folder / CODEBOOK)
        del tensors["usage"]
        if _hash(tensors) != description["quantizer_hash"]:
            raise ValueError("the codebook is not the one that tokenizer.json describes")
        quantizer = Quantizer(description["quantizer"], tensors)
        settings = dict(description["teacher"])
        name = settings["teacher"]
        _ = description["hash"], description["grid"], description["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MapetError(f"{folder}: damaged tokenizer ({error}); fit it again") from None
    if not with_teacher:
        return Tokenizer(None, quantizer, description)
    if is_own_code(name) and name != allow:
        raise MapetError(f"the tokenizer {folder} runs your own code '{name}'; to allow it, say --teacher {name}")
    if checkpoint:
        settings["checkpoint"] = checkpoint
    elif settings.get("checkpoint") and not Path(settings["checkpoint"]).exists():
        raise MapetError(
            f"the weights file of teacher '{name}' in {folder}, {settings['checkpoint']}, is not there; say where it is: "
            "--teacher-checkpoint FILE"
        )
    try:
        teacher = make_teacher(**settings)
    except TypeError as error:
        raise MapetError(f"{folder / DESCRIPTION}: unknown teacher setting ({error})") from None
    if teacher.weights_hash != description["weights_hash"]:
        raise MapetError(
            f"teacher '{name}' has other weights (sha256 {teacher.weights_hash[:12]}) than the codebook in {folder} was fitted "
            f"with ({description['weights_hash'][:12]}): its tokens would be wrong. Give the right --teacher-checkpoint or fit again"
        )
    return Tokenizer(teacher, quantizer, description)
