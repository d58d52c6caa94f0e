"""What all native models share: the ragged switch, and how they are saved and opened."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention
from .attention_variants import FULL, check_variant
from .blocks import Block
from .int8 import WAYS, use_int8
from .kernel import Kernel, shared_parameters
from .performer import Performer
from .ragged import RaggedMixin

# fields that only our configs have
ATTENTION_FIELDS = ("attention", "cross_attention", "encoder_attention", "decoder_attention")
ZOO_FIELDS = (*ATTENTION_FIELDS, "attention_kwargs", "block", "int8")


class LoadRenaming(WeightRenaming):
    """A renaming for old checkpoints that is not undone when the model is saved."""

    __slots__ = ()

    def reverse_transform(self):
        return self.copy(["(?!)"], ["(?!)"])


# `gamma` and `beta` of TensorFlow-era checkpoints. transformers renames them too, but after our own maps, which by then
# have moved the norms away from the name it looks for.
OLD_NORM_NAMES = [
    LoadRenaming("LayerNorm.gamma", "LayerNorm.weight"),
    LoadRenaming("LayerNorm.beta", "LayerNorm.bias"),
]


def register_key_map(class_names: list[str], key_map: list) -> None:
    """Declares how official weight names become ours, under each class that is the root of a load."""
    for name in class_names:
        # overwrite: a process may import this code twice, as the package and as a model's own copy
        register_checkpoint_conversion_mapping(name, key_map, overwrite=True)


def is_standard(config: PreTrainedConfig) -> bool:
    """Whether the official class computes the same: full attention, and the family's own blocks and weights."""
    fields = (getattr(config, name, None) for name in ATTENTION_FIELDS)
    names = [name for field in fields if field is not None for name in ([field] if isinstance(field, str) else field)]
    return all(name == FULL for name in names) and has_official_names(config)


def has_official_names(config: PreTrainedConfig) -> bool:
    """Whether weights have the shapes of the official ones, and so their names in files."""
    return not getattr(config, "block", None) and not getattr(config, "int8", None)


def check_heads(config: PreTrainedConfig, width: str, heads: str) -> None:
    """Raises ValueError unless the heads, by the names of both fields, share the width evenly."""
    if getattr(config, width) % getattr(config, heads):
        raise ValueError(f"{width} {getattr(config, width)} is not a multiple of {heads} {getattr(config, heads)}.")


def check_decoder(config: PreTrainedConfig) -> None:
    """Raises ValueError for cross-attention in an encoder."""
    if config.add_cross_attention and not config.is_decoder:
        raise ValueError("add_cross_attention is for a decoder: set is_decoder too.")


@strict
class VariantConfig(PreTrainedConfig):
    """The fields that our configs add to the official ones, and how they open official directories.

    Goes before the official class in the bases of a config, and takes its `model_type` with `zoo_` before it.
    """

    attention: str | list[str] = FULL
    attention_kwargs: dict | None = None
    # of a decoder that reads an encoder
    cross_attention: str = FULL
    # what is not as in the family's own block: `spec.OPTIONS`
    block: dict | None = None
    # weights of 8 bits, not for training: how their inputs are rounded, one of `int8.WAYS`
    int8: str | None = None

    # where the family's own block has its norms
    own_norm_place: ClassVar[str] = "post"
    # whether self-attention is causal whatever the config says
    always_causal: ClassVar[bool] = False

    def __post_init__(self, **kwargs):
        self.attention_kwargs = self.attention_kwargs or {}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        check_variant(self)
        if self.int8 is not None and self.int8 not in WAYS:
            raise ValueError(f"int8: one of {', '.join(WAYS)}, not {self.int8!r}.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        official = cls.model_type.removeprefix("zoo_")
        found = fields.get("model_type", official)
        if found not in (official, cls.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}; {cls.__name__} opens "
                f"{official!r} and {cls.model_type!r}."
            )
        # the official type would stay on the instance, and no key map of ours be found under it
        return {**fields, "model_type": cls.model_type}, unused


RECORDED_BY_ENCODERS = {
    "hidden_states": Block,
    "attentions": OutputRecorder(Attention, layer_name=".self_attn", index=1),
}


class ZooPreTrainedModel(RaggedMixin, PreTrainedModel):
    """Base of every native model.

    Subclasses set `official_config_class` and `auto_map`, the Auto classes of a family by the names of its files.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]
    _can_record_outputs = {
        **RECORDED_BY_ENCODERS,
        "cross_attentions": OutputRecorder(Attention, layer_name=".cross_attn", index=1),
    }
    config_class: type[PreTrainedConfig]
    official_config_class: type[PreTrainedConfig]
    auto_map: dict[str, str]
    # what a method of peft adapts unless it is told otherwise
    peft_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "lora": ("q_proj", "v_proj"),
        "ia3": ("k_proj", "v_proj", "fc2"),
    }
    # of an encoder family: what its heads stand on, made from (config, add_pooling_layer)
    encoder_class: ClassVar[Callable[..., PreTrainedModel]]

    def __init__(self, config, *args, **kwargs):
        # from_pretrained sets what it is given on a config that has been validated without it
        check_variant(config)
        super().__init__(config, *args, **kwargs)

    def _initialize_weights(self, module, is_custom_code: bool = False):
        # transformers skips every module without parameters of its own in code that is not its own, and with it what
        # a block sets in its layers; `initialization`, which ours uses, leaves loaded parameters alone anyway
        # weights of 8 bits are those of another model, or of a file
        if not self.config.int8:
            super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "is_output_bias_owner", False):
            init.zeros_(module.bias)
        if isinstance(module, Kernel):
            module.initialise()

    def post_init(self):
        scales = use_int8(self, self.config.int8 == "smooth") if self.config.int8 else {}
        # read where weights are saved
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **shared_parameters(self), **scales}
        super().post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        # these do not hang on tie_word_embeddings
        return {**super().get_expanded_tied_weights_keys(all_submodels=all_submodels), **shared_parameters(self)}

    def redraw_features(self) -> None:
        """New random features for every layer that has some, from torch's default generator (performer)."""
        for module in self.modules():
            if isinstance(module, Performer):
                module.redraw_features()

    @staticmethod
    def create_masks_for_generate(config, attention_mask, **kwargs):
        """What `generate` hands to a forward pass over a static cache: a variant makes its masks there, by layer."""
        if is_standard(config):
            return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)
        return attention_mask

    def official_config(self) -> PreTrainedConfig:
        """The config with which the official class computes the same. Raises ValueError for a variant."""
        if not is_standard(self.config):
            of_block = f" and block {self.config.block!r}" if self.config.block else ""
            of_block += " and weights of 8 bits" if self.config.int8 else ""
            raise ValueError(
                f"A model with attention {self.config.attention!r}{of_block} has no official form: the official class "
                "would open its weights and compute something else. Save it with its own code instead."
            )
        fields = self.config.to_dict()
        for name in (*ZOO_FIELDS, "auto_map", "model_type"):
            fields.pop(name, None)
        config = self.official_config_class.from_dict(fields)
        config.architectures = [type(self).__name__.removeprefix("Zoo")]
        return config

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process: bool = True, *, official: bool = False, **kwargs
    ):
        """Saves weights under the official names, with this code (`trust_remote_code=True` opens it anywhere).

        official: with the official config instead, so that any tool opens it without this code. Raises ValueError for
        a variant, which has no official form.
        """
        official_config = self.official_config() if official else None
        if not official and (not has_official_names(self.config) or getattr(self, "hf_quantizer", None) is not None):
            # our own names: the official ones stand for the official shapes, which other blocks have not; and quantised
            # weights are bytes, which no map transposes
            kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(self.auto_map)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        if official_config is not None:
            official_config.dtype = self.config.dtype
            official_config.save_pretrained(save_directory)
        code = str(sys.modules[type(self).__module__].__file__)
        for file in [code, *get_relative_import_files(code)]:
            target = Path(save_directory, Path(file).name)
            if official_config is not None:
                target.unlink(missing_ok=True)
            elif not target.exists() or not target.samefile(file):
                shutil.copyfile(file, target)
