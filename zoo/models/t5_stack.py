"""T5's config, key map and stacks: position bias, cross-attention, two caches (arXiv 1910.10683)."""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.t5.configuration_t5 import T5Config
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention
from .blocks import Block, FeedForward, make_final_norm
from .dropout import Dropout
from .embeddings import look_up
from .layer_masks import LayerMasks, cross_mask
from .positions import RelativePositionBias, Sinusoids, bias_of_pass, make_bias, make_rotary
from .pretrained import VariantConfig, ZooPreTrainedModel
from .ragged import PLAN, Packing, cached_tokens, unpack_output
from .spec import BlockSpec, options_of, with_options


def _attention_names(stack: str, sublayer: int, official: str, ours: str) -> list[WeightRenaming]:
    source = rf"{stack}.block.(\d+).layer.{sublayer}"
    renamings = [
        WeightRenaming(rf"{source}.{official}.{name}", rf"{stack}.layers.\1.{ours}.{name}_proj") for name in "qkvo"
    ]
    return [*renamings, WeightRenaming(rf"{source}.layer_norm", rf"{stack}.layers.\1.{ours}_norm")]


# official name -> ours; a checkpoint has the ones or the others
PLAIN, GATED = {"wi": "fc1", "wo": "fc2"}, {"wi_0": "gate", "wi_1": "fc1", "wo": "fc2"}


def _feed_forward_names(stack: str, sublayer: int, names: dict[str, str]) -> list[WeightRenaming]:
    source, target = rf"{stack}.block.(\d+).layer.{sublayer}", rf"{stack}.layers.\1"
    return [
        *(WeightRenaming(rf"{source}.DenseReluDense.{old}", rf"{target}.mlp.{new}") for old, new in names.items()),
        WeightRenaming(rf"{source}.layer_norm", rf"{target}.mlp_norm"),
    ]


def _position_names(stack: str) -> WeightRenaming:
    # the first layer's bias serves all layers, so here it belongs to the stack
    return WeightRenaming(
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.relative_attention_bias"
    )


def key_map(feed_forward: dict[str, str]) -> list[WeightRenaming]:
    return [
        _position_names("encoder"),
        *_attention_names("encoder", 0, "SelfAttention", "self_attn"),
        *_feed_forward_names("encoder", 1, feed_forward),
        _position_names("decoder"),
        *_attention_names("decoder", 0, "SelfAttention", "self_attn"),
        *_attention_names("decoder", 1, "EncDecAttention", "cross_attn"),
        *_feed_forward_names("decoder", 2, feed_forward),
    ]


@strict
class ZooT5Config(VariantConfig, T5Config):
    """`T5Config` and the attention variant."""

    model_type = "zoo_t5"
    own_norm_place: ClassVar[str] = "pre"
    # VariantConfig, coming first in the bases, brings the default of all other families
    is_encoder_decoder: bool = True
    # in place of `attention`, of one of the two stacks
    encoder_attention: str | list[str] | None = None
    decoder_attention: str | list[str] | None = None

    def to_dict(self):
        # generation takes what a decoder_ field says for the decoder's own, and None would be its attention
        unset = ("encoder_attention", "decoder_attention")
        return {key: value for key, value in super().to_dict().items() if value is not None or key not in unset}

    # a Trainer would gather the encoder's states beside the logits
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state"]


def block_spec(config: T5Config) -> BlockSpec:
    own = BlockSpec(
        hidden_size=config.d_model,
        num_heads=config.num_heads,
        head_dim=config.d_kv,
        ffn_size=config.d_ff,
        activation=config.dense_act_fn,
        norm="rmsnorm",
        norm_eps=config.layer_norm_epsilon,
        norm_place="pre",
        gated=config.is_gated_act,
        bias=False,
        causal=config.is_decoder,
        cross_attention=config.is_decoder,
        # the scale is folded into the initial weights, which a norm of queries and keys would undo
        scaling=None if options_of(config).get("qk_norm") else 1.0,
        attention_dropout=config.dropout_rate,
        hidden_dropout=config.dropout_rate,
        ffn_dropout=config.dropout_rate,
        positions="buckets",
    )
    return with_options(config, own)


class ZooT5PreTrainedModel(ZooPreTrainedModel):
    config: ZooT5Config
    config_class = ZooT5Config
    official_config_class = T5Config
    base_model_prefix = "transformer"
    auto_map = {
        "AutoConfig": "modeling_t5.ZooT5Config",
        "AutoModel": "modeling_t5.ZooT5Model",
        "AutoModelForTextEncoding": "modeling_t5.ZooT5EncoderModel",
        "AutoModelForSeq2SeqLM": "modeling_t5.ZooT5ForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_t5.ZooT5ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_t5.ZooT5ForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_t5.ZooT5ForQuestionAnswering",
    }

    @torch.no_grad()
    def _init_weights(self, module):
        """Deviations of the Mesh TensorFlow implementation: 1 / sqrt(fan in), queries scaled down once more."""
        super()._init_weights(module)
        config, factor = self.config, self.config.initializer_factor
        if isinstance(module, Attention):
            width = config.num_heads * config.d_kv
            init.normal_(module.q_proj.weight, std=factor * (config.d_model * config.d_kv) ** -0.5)
            init.normal_(module.k_proj.weight, std=factor * config.d_model**-0.5)
            init.normal_(module.v_proj.weight, std=factor * config.d_model**-0.5)
            init.normal_(module.o_proj.weight, std=factor * width**-0.5)
        elif isinstance(module, FeedForward):
            init.normal_(module.fc1.weight, std=factor * config.d_model**-0.5)
            if module.gated:
                init.normal_(module.gate.weight, std=factor * config.d_model**-0.5)
            init.normal_(module.fc2.weight, std=factor * config.d_ff**-0.5)
        elif isinstance(module, RelativePositionBias):
            init.normal_(module.weight, std=factor * config.d_model**-0.5)
        elif isinstance(module, nn.RMSNorm):
            init.constant_(module.weight, factor)
        elif isinstance(module, ZooT5PreTrainedModel):
            self._init_head(module, factor)

    def _init_head(self, module, factor: float) -> None:
        """What stands directly under a class with stacks or a head."""
        narrow = factor * self.config.d_model**-0.5
        deviations = {"shared": factor, "qa_outputs": narrow, "classifier": factor}
        if not self.config.scale_decoder_outputs:
            # of v1.1, which is not tied
            deviations["lm_head"] = factor
        for name, std in deviations.items():
            layer = getattr(module, name, None)
            if layer is not None:
                init.normal_(layer.weight, std=std)
        head = getattr(module, "classification_head", None)
        for layer in () if head is None else (head.dense, head.out_proj):
            init.normal_(layer.weight, std=narrow)


class ZooT5Stack(ZooT5PreTrainedModel):
    """The encoder, or with `config.is_decoder` the decoder."""

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        spec = block_spec(config)
        self.relative_attention_bias, self.rotary = make_bias(config, spec), make_rotary(spec)
        self.positions = Sinusoids(config.d_model) if spec.positions == "sinusoidal" else None
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.num_layers))
        self.final_layer_norm = make_final_norm(spec) or nn.Identity()
        self.dropout = Dropout(config.dropout_rate)
        self.post_init()

    def set_input_embeddings(self, new_embeddings):
        self.embed_tokens = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        use_cache=None,
        packing: Packing | str | None = PLAN,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """With `packing`, a head's own plan, the outputs stay packed: (tokens, hidden)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        planned_here = isinstance(packing, str)
        encoder_packing = None
        if isinstance(packing, str):
            packing = self.plan(input_ids, inputs_embeds, attention_mask, past_key_values, **kwargs)
            if packing is not None and encoder_hidden_states is not None:
                encoder_packing = self.plan_packing(encoder_hidden_states, encoder_attention_mask, **kwargs)
                # queries and keys are packed together or not at all
                packing = None if encoder_packing is None else packing
        output = self._run(
            input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, inputs_embeds, past_key_values,
            use_cache=use_cache, packing=packing, encoder_packing=encoder_packing, return_dict=True,
            **kwargs,
        )  # fmt: skip
        return unpack_output(output, packing) if planned_here and packing is not None else output

    def plan(self, input_ids, inputs_embeds, attention_mask, past_key_values=None, **kwargs) -> Packing | None:
        """How a call with these inputs is packed, or None."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        return self.plan_packing(inputs, attention_mask, cached_tokens=cached_tokens(past_key_values), **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _run(
        self, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, inputs_embeds, past_key_values,
        use_cache=None, packing: Packing | None = None, encoder_packing: Packing | None = None, **kwargs,
    ):  # fmt: skip
        if use_cache and past_key_values is None and self.config.is_decoder:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if not self.config.is_decoder:
            past_key_values = None
        self_cache: Cache | None = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            self_cache = past_key_values.self_attention_cache
        inputs = input_ids if input_ids is not None else inputs_embeds
        past = 0 if self_cache is None else self_cache.get_seq_length()
        position_ids = (torch.arange(inputs.shape[1], device=inputs.device) + past).unsqueeze(0)
        if packing is not None:
            input_ids, inputs_embeds = (None if x is None else packing.pack(x) for x in (input_ids, inputs_embeds))
            position_ids = packing.pack(position_ids)
        hidden_states = inputs_embeds
        if hidden_states is None:
            hidden_states = look_up(self.embed_tokens, input_ids, "token id", "vocab_size")
        if self.positions is not None:
            # its tokens' vectors begin as large as sinusoids are
            hidden_states = hidden_states + self.positions(position_ids).to(hidden_states.dtype)
        rotary = None if self.rotary is None else self.rotary(position_ids)
        # only shape, dtype and device of this are read
        grid = hidden_states if packing is None else hidden_states.new_empty(1).expand(*inputs.shape[:2], 1)
        masks = LayerMasks(self.config, self.config.is_decoder, grid, attention_mask, self_cache, packing)
        position_bias = bias_of_pass(
            self.relative_attention_bias, inputs, self_cache, hidden_states.dtype, masks.in_blocks
        )
        memory_mask = None
        if encoder_hidden_states is not None and (packing is None or not packing.per_sequence):
            memory_mask = cross_mask(self.config, grid, encoder_attention_mask, encoder_hidden_states)
        if encoder_packing is not None:
            encoder_hidden_states = encoder_packing.pack(encoder_hidden_states)
        hidden_states = self.dropout(hidden_states)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states, masks.of_layer(index), position_bias, encoder_hidden_states,
                encoder_attention_mask=memory_mask, encoder_packing=encoder_packing,
                past_key_values=past_key_values, packing=packing, rotary=rotary, **kwargs,
            )  # fmt: skip
        hidden_states = self.dropout(self.final_layer_norm(hidden_states))
        return BaseModelOutputWithPastAndCrossAttentions(hidden_states, past_key_values)
