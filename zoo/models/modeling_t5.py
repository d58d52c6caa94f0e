"""T5 (Raffel et al. 2019, arXiv 1910.10683) on the native block: position bias, cross-attention, two caches."""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

import copy

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions, Seq2SeqLMOutput
from transformers.models.t5.configuration_t5 import T5Config
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention, LayerMasks
from .blocks import Block, BlockSpec, FeedForward
from .dropout import Dropout
from .embeddings import RelativePositionBias
from .heads import token_loss
from .losses import IGNORED, linear_cross_entropy
from .pretrained import VariantConfig, ZooPreTrainedModel, register_key_map
from .ragged import Packing, unpack_output


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


def block_spec(config: T5Config) -> BlockSpec:
    return BlockSpec(
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
        # the scale is folded into the initial weights
        scaling=1.0,
        attention_dropout=config.dropout_rate,
        hidden_dropout=config.dropout_rate,
        ffn_dropout=config.dropout_rate,
    )


class ZooT5PreTrainedModel(ZooPreTrainedModel):
    config: ZooT5Config
    config_class = ZooT5Config
    official_config_class = T5Config
    base_model_prefix = "transformer"
    auto_map = {
        "AutoConfig": "modeling_t5.ZooT5Config",
        "AutoModelForSeq2SeqLM": "modeling_t5.ZooT5ForConditionalGeneration",
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
        elif isinstance(module, ZooT5ForConditionalGeneration):
            init.normal_(module.shared.weight, std=factor)


class ZooT5Stack(ZooT5PreTrainedModel):
    """The encoder, or with `config.is_decoder` the decoder."""

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.relative_attention_bias = RelativePositionBias(
            config.relative_attention_num_buckets,
            config.num_heads,
            config.relative_attention_max_distance,
            causal=config.is_decoder,
        )
        spec = block_spec(config)
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.num_layers))
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
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
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if isinstance(past_key_values, EncoderDecoderCache):
            # assisted generation may take back every token of its own, but not the encoder's keys
            cached += int(past_key_values.cross_attention_cache.get_seq_length())
        packing = self.plan_packing(inputs, attention_mask, cached_tokens=cached, **kwargs)
        encoder_packing = None
        if packing is not None and encoder_hidden_states is not None:
            encoder_packing = self.plan_packing(encoder_hidden_states, encoder_attention_mask, **kwargs)
            # queries and keys are packed together or not at all
            packing = None if encoder_packing is None else packing
        output = self._run(
            input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, inputs_embeds, past_key_values,
            use_cache=use_cache, packing=packing, encoder_packing=encoder_packing, **kwargs,
        )  # fmt: skip
        return output if packing is None else unpack_output(output, packing)

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
        position_bias = self._position_bias(inputs, self_cache)
        if packing is not None:
            input_ids, inputs_embeds = (None if x is None else packing.pack(x) for x in (input_ids, inputs_embeds))
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # only shape, dtype and device of this are read
        grid = hidden_states if packing is None else hidden_states.new_empty(1).expand(*inputs.shape[:2], 1)
        masks = LayerMasks(self.config, self.config.is_decoder, grid, attention_mask, self_cache, packing)
        cross_mask = None
        if encoder_hidden_states is not None and (packing is None or not packing.per_sequence):
            cross_mask = create_bidirectional_mask(
                self.config, grid, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        if encoder_packing is not None:
            encoder_hidden_states = encoder_packing.pack(encoder_hidden_states)
        hidden_states = self.dropout(hidden_states)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states, masks.of_layer(index), position_bias, encoder_hidden_states,
                encoder_attention_mask=cross_mask, encoder_packing=encoder_packing,
                past_key_values=past_key_values, packing=packing, **kwargs,
            )  # fmt: skip
        hidden_states = self.dropout(self.final_layer_norm(hidden_states))
        return BaseModelOutputWithPastAndCrossAttentions(hidden_states, past_key_values)

    def _position_bias(self, inputs: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """(1, heads, queries, keys), the keys in the cache included."""
        length = inputs.shape[1]
        past, keys = (0, length) if cache is None else (cache.get_seq_length(), cache.get_mask_sizes(length, 0)[0])
        key_positions = torch.arange(keys, device=inputs.device)
        return self.relative_attention_bias(torch.arange(length, device=inputs.device) + past, key_positions)


class ZooT5ForConditionalGeneration(ZooT5PreTrainedModel, GenerationMixin):
    _keys_to_ignore_on_load_unexpected = ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        encoder_config = copy.deepcopy(config)
        encoder_config.is_decoder = encoder_config.use_cache = False
        self.encoder = ZooT5Stack(encoder_config)
        decoder_config = copy.deepcopy(config)
        decoder_config.is_decoder = True
        decoder_config.num_layers = config.num_decoder_layers or config.num_layers
        self.decoder = ZooT5Stack(decoder_config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # both `wi` and `wi_1` are fc1 here; the way back, for a model that was not loaded, needs the config
        self._weight_conversions = key_map(GATED if config.is_gated_act else PLAIN)
        self.post_init()

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, new_embeddings):
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)
        self.decoder.set_input_embeddings(new_embeddings)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """(batch, length) labels -> the decoder's inputs: shifted right behind the start token, -100 made padding."""
        start, pad = getattr(self.config, "decoder_start_token_id", None), self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "config needs decoder_start_token_id and pad_token_id; for T5 both are the pad token's id."
            )
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == IGNORED, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        num_items_in_batch=None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True,
                **kwargs,
            )  # fmt: skip
        elif isinstance(encoder_outputs, tuple | list):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        states = output.last_hidden_state
        if self.config.scale_decoder_outputs:
            states = states * self.config.d_model**-0.5
        loss = logits = None
        if labels is not None and self.training:
            loss = linear_cross_entropy(states.flatten(0, 1), self.lm_head, labels.flatten(), num_items_in_batch)
        else:
            logits = self.lm_head(states)
        if labels is not None and logits is not None:
            loss = token_loss(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)
        return Seq2SeqLMOutput(
            loss,
            logits,
            past_key_values=output.past_key_values,
            decoder_hidden_states=output.hidden_states,
            decoder_attentions=output.attentions,
            cross_attentions=output.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


# the stacks stand directly under the head, so the head itself is the root of a load
register_key_map(["ZooT5ForConditionalGeneration"], key_map(PLAIN | GATED))

__all__ = [
    "ZooT5Config",
    "ZooT5ForConditionalGeneration",
    "ZooT5PreTrainedModel",
    "ZooT5Stack",
]
