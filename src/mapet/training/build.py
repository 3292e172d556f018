"""From a config, or a run folder, to the model."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from mapet.config.base import build, read_recipe
from mapet.config.fit_tokenizer import FitTokenizerConfig
from mapet.config.pretrain import PretrainConfig
from mapet.models.backbone import create_vit, init_from
from mapet.models.cae import ContextAutoencoder
from mapet.models.objectives import CAE, get_objective, num_context_from_ratio
from mapet.models.pretraining import ViTForPreTraining
from mapet.run_state import check_is_pretraining, pretrain_folder, resolve_run_path
from mapet.tokenizers.codebook import Tokenizer, load_tokenizer
from mapet.training.checkpoint import check_fingerprints, load_checkpoint, read_trainer_state


class LoadedRun(NamedTuple):
    """What a pre-training run folder holds; `model` has its newest weights."""

    config: PretrainConfig
    tokenizer: Tokenizer
    model: ViTForPreTraining

    def to(self, device: torch.device) -> "LoadedRun":
        """Tokenizer and model on the device."""
        return LoadedRun(self.config, self.tokenizer.to(device), self.model.to(device))


def load_run(folder: Path, with_teacher: bool = False, allow: str | None = None) -> LoadedRun:
    """Read a run folder of `pretrain`, or of `run`.

    Raises:
        MapetError: it isn't one, its tokenizer is gone or another one, or it has no usable checkpoint.
    """
    check_is_pretraining(folder)
    folder = pretrain_folder(folder)
    recipe = read_recipe(folder / "config.yaml")
    found = {option: resolve_run_path(folder, recipe, option) for option in ("images", "tokenizer")}
    config = build(PretrainConfig, recipe | found, folder / "config.yaml")
    tokenizer = load_tokenizer(config.tokenizer, with_teacher, allow)
    check_fingerprints(read_trainer_state(folder / "checkpoints"), {"tokenizer_hash": tokenizer.hash}, folder)
    model = build_model(config, tokenizer)
    load_checkpoint(folder / "checkpoints", model)
    return LoadedRun(config, tokenizer, model.eval())


class TokenizerSpec(NamedTuple):
    """What a model must fit, of a tokenizer that there is or will be.

    Attributes:
        image_size: height and width that it was fitted for, pixels.
        vocab_size, feature_size: V and F.
    """

    tokenizer: Path
    image_size: tuple[int, int]
    patch_size: int
    channels: int
    vocab_size: int
    feature_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> ViTForPreTraining:
    """The ViT and its token head, with the weights that `seed` or `init_from` give."""
    teacher = tokenizer.description["teacher"]
    sizes = tokenizer.student_size, teacher["patch_size"], teacher["channels"]
    feature_size = tokenizer.description["feature_size"]
    return build_model_from_spec(config, TokenizerSpec(config.tokenizer, *sizes, tokenizer.vocab_size, feature_size))


def build_model_from_spec(config: PretrainConfig, spec: TokenizerSpec) -> ViTForPreTraining:
    """`build_model`, for words that there may not be yet.

    Raises:
        MapetError: unknown model or objective, sizes that don't fit, weights that can't be started from.
    """
    torch.manual_seed(config.seed)
    args = {"init_values": config.layer_scale_init} if config.layer_scale_init else {}
    vit = create_vit(
        config.model,
        spec.image_size,
        spec.patch_size,
        spec.channels,
        args | config.model_args,
        config.drop_path,
    )
    num_patches, objective = vit.patch_embed.num_patches, get_objective(config.objective)
    common: dict[str, Any] = {
        "num_context": num_context_from_ratio(config.mask_ratio[1], num_patches),  # of a sampled ratio, the fewest
        "num_predict": config.num_predict,
        "target": config.target,
        "separate_query_token": config.separate_query_token,
    }
    values = {
        "tokens": spec.vocab_size,
        "pixels": vit.in_chans * spec.patch_size**2,
        "features": spec.feature_size,
    }[config.target]
    model = (
        ContextAutoencoder(vit, values, **common)
        if objective is CAE
        else ViTForPreTraining(vit, values, objective, **common)
    )
    if config.init_from:
        init_from(vit, config.init_from)
    return model


def check_model_config(config: PretrainConfig, fitting: FitTokenizerConfig) -> None:
    """Raises MapetError as `build_model_from_spec` does, for a tokenizer that `fit-tokenizer` is to make with the config `fitting`."""
    sizes = fitting.image_size, fitting.patch_size, fitting.channels
    build_model_from_spec(config, TokenizerSpec(config.tokenizer, *sizes, fitting.vocab_size or 2, 1))
