"""ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) on the native block: patches, a class token, pre-norm.

An attention mask over (batch, 1 + patches) drops patches: they are packed away, and cost nothing. Images of several
sizes in one batch are packed in the same way.
"""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

from collections.abc import Sequence
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import Block, make_activation, make_final_norm
from .heads import classification_loss
from .layer_masks import LayerMasks
from .patches import PatchEmbeddings
from .pretrained import RECORDED_BY_ENCODERS, VariantConfig, ZooPreTrainedModel, check_heads, register_key_map
from .ragged import first_tokens, unpack_output, zero_padding
from .spec import BlockSpec, with_options

KEY_MAP = [
    WeightRenaming("encoder.layer", "layers"),
    WeightRenaming("attention.attention.query", "self_attn.q_proj"),
    WeightRenaming("attention.attention.key", "self_attn.k_proj"),
    WeightRenaming("attention.attention.value", "self_attn.v_proj"),
    WeightRenaming("attention.output.dense", "self_attn.o_proj"),
    WeightRenaming("layernorm_before", "self_attn_norm"),
    WeightRenaming("layernorm_after", "mlp_norm"),
    WeightRenaming("intermediate.dense", "mlp.fc1"),
    WeightRenaming("output.dense", "mlp.fc2"),
]


@strict
class ZooViTConfig(VariantConfig, ViTConfig):
    """`ViTConfig` and the attention variant."""

    model_type = "zoo_vit"
    own_norm_place: ClassVar[str] = "pre"

    def validate_architecture(self):
        check_heads(self, "hidden_size", "num_attention_heads")
        super().validate_architecture()


def block_spec(config: ViTConfig) -> BlockSpec:
    own = BlockSpec(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        norm_place="pre",
        qkv_bias=config.qkv_bias,
        attention_dropout=config.attention_probs_dropout_prob,
        hidden_dropout=config.hidden_dropout_prob,
    )
    return with_options(config, own)


class ZooViTPreTrainedModel(ZooPreTrainedModel):
    config: ZooViTConfig
    config_class = ZooViTConfig
    official_config_class = ViTConfig
    base_model_prefix = "vit"
    _can_record_outputs = RECORDED_BY_ENCODERS
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # as the official class
    auto_map = {
        "AutoConfig": "modeling_vit.ZooViTConfig",
        "AutoModel": "modeling_vit.ZooViTModel",
        "AutoModelForImageClassification": "modeling_vit.ZooViTForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_vit.ZooViTForMaskedImageModeling",
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PatchEmbeddings):
            for parameter in (module.position_embeddings, module.cls_token):
                if parameter is None:
                    continue
                init.trunc_normal_(parameter, mean=0.0, std=self.config.initializer_range)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)


class ViTPooler(nn.Module):
    """activation(dense(first token)): (batch, hidden) -> (batch, pooler_output_size)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = make_activation(config.pooler_act)

    def forward(self, first_tokens: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(first_tokens))


class ZooViTModel(ZooViTPreTrainedModel):
    """The encoder; unless `add_pooling_layer` is false a pooler; with `use_mask_token` what hides a patch."""

    def __init__(self, config: ZooViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config, use_mask_token)
        spec = block_spec(config)
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.num_hidden_layers))
        self.layernorm = make_final_norm(spec) or nn.Identity()
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """As the official class; packed, the states of dropped patches are 0.

        pixel_values: (batch, channels, height, width), or a list of (channels, height, width) of several sizes, each a
        multiple of the patch; each image then gets what it gets alone, and behind its patches, up to those of the
        largest, states are 0. attention_mask: (batch, 1 + patches), 0 for a patch that is dropped. bool_masked_pos:
        (batch, patches), True for one that is hidden by the mask token; not with a list. A head that reads the class
        token alone says `pooled_only=True` and finds it in `pooler_output`; packed, the last layer computes no other,
        and there is no last hidden state.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing.")
        dtype, interpolate = self.embeddings.patch_embeddings.projection.weight.dtype, bool(interpolate_pos_encoding)
        if isinstance(pixel_values, torch.Tensor):
            embedded = self.embeddings(pixel_values.to(dtype), bool_masked_pos, interpolate)
            real = None
        else:
            if bool_masked_pos is not None:
                raise ValueError("bool_masked_pos is for images of one size, (batch, channels, height, width).")
            embedded, real = self.embeddings.of_sizes([image.to(dtype) for image in pixel_values], interpolate)
            attention_mask = real if attention_mask is None else attention_mask * real
        packing = self.plan_packing(embedded, attention_mask, pooled=True, **kwargs)
        output = self._encode(embedded, attention_mask, packing=packing, return_dict=True, **kwargs)
        if packing is not None:
            return unpack_output(output, packing)
        return output if real is None else zero_padding(output, real)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _encode(self, embedded, attention_mask, packing=None, pooled_only=False, **kwargs):
        # only shape, dtype and device of this are read
        grid = embedded if packing is None else embedded.new_empty(1).expand(*embedded.shape[:2], 1)
        hidden_states = embedded if packing is None else packing.pack(embedded)
        masks = LayerMasks(self.config, False, grid, attention_mask, None, packing)
        recorded = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        first_only = pooled_only and packing is not None and packing.per_sequence and not recorded
        first_only = first_only and not masks.by_kernel(len(self.layers) - 1)
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            hidden_states = layer(
                hidden_states, masks.of_layer(index), packing=packing, first_only=first_only and last, **kwargs
            )
        hidden_states = self.layernorm(hidden_states)
        pooled = None
        if self.pooler is not None or pooled_only:
            pooled = hidden_states if first_only else first_tokens(hidden_states, packing)
            pooled = pooled if self.pooler is None else self.pooler(pooled)
        return BaseModelOutputWithPooling(None if first_only else hidden_states, pooled)


class ZooViTForImageClassification(ZooViTPreTrainedModel):
    def __init__(self, config: ZooViTConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # None before a config is complete
        self.vit = ZooViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values=None,
        labels=None,
        interpolate_pos_encoding=None,
        attention_mask=None,
        **kwargs,
    ) -> ImageClassifierOutput:
        output = self.vit(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, attention_mask=attention_mask,
            pooled_only=True, return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return ImageClassifierOutput(loss, logits, output.hidden_states, output.attentions)


class ZooViTForMaskedImageModeling(ZooViTPreTrainedModel):
    """Pixels of hidden patches, by one convolution from their states (SimMIM, arXiv 2111.09886, section 3)."""

    def __init__(self, config: ZooViTConfig):
        super().__init__(config)
        self.vit = ZooViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values=None,
        bool_masked_pos=None,
        interpolate_pos_encoding=None,
        attention_mask=None,
        **kwargs,
    ) -> MaskedImageModelingOutput:
        """Loss: the mean distance of the pixels of hidden patches; `reconstruction`: (batch, channels, height, width).

        Images may be of any size that the patches divide, with `interpolate_pos_encoding`; all of a batch of the same.
        """
        if isinstance(pixel_values, list | tuple):
            raise ValueError("pixel_values must be one tensor here: the images that are made have one size.")
        stride, (high, wide) = self.config.encoder_stride, self.vit.embeddings.patch_size
        if bool_masked_pos is not None and (high, wide) != (stride, stride):
            raise ValueError(
                f"patch_size {self.config.patch_size} and encoder_stride {stride} must be equal, or what is made of "
                "hidden patches has another size than the images."
            )
        output = self.vit(pixel_values, bool_masked_pos, interpolate_pos_encoding, attention_mask, return_dict=True,
                          **kwargs)  # fmt: skip
        rows, columns = pixel_values.shape[2] // high, pixel_values.shape[3] // wide
        states = output.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))
        made = self.decoder(states)
        loss = None
        if bool_masked_pos is not None:
            hidden = bool_masked_pos.view(-1, 1, rows, columns)
            hidden = hidden.repeat_interleave(high, 2).repeat_interleave(wide, 3)
            distances = (pixel_values - made).abs() * hidden
            loss = distances.sum() / (hidden.sum() + 1e-5) / self.config.num_channels
        return MaskedImageModelingOutput(loss, made, output.hidden_states, output.attentions)


register_key_map(["ZooViTModel"], KEY_MAP)

__all__ = [
    "ZooViTConfig",
    "ZooViTForImageClassification",
    "ZooViTForMaskedImageModeling",
    "ZooViTModel",
    "ZooViTPreTrainedModel",
]
