"""The stack that BERT, RoBERTa, ALBERT and DistilBERT share: embeddings, blocks, a pooler where there is one.

With `config.is_decoder` it is causal, has a cache and, with `add_cross_attention`, reads an encoder's states.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import Block, make_final_norm
from .embeddings import positions_from
from .layer_masks import LayerMasks, cross_mask
from .positions import bias_of_pass, make_bias, make_rotary
from .pretrained import ZooPreTrainedModel
from .ragged import PLAN, Packing, cached_tokens, first_tokens, unpack_output
from .spec import BlockSpec

# a class without a config of its own would take part in transformers' guesses at it
if TYPE_CHECKING:
    _Base = ZooPreTrainedModel
else:
    _Base = object


class EncoderModel(_Base):
    """Goes before a family's base class in the bases of its model, which sets `embeddings`, `layers` and `pooler`.

    Its blocks run in the order of `layers_in_order`; `projection` is what leads from the embeddings to the first, and
    `add_around` makes what `config.block` puts around them.
    """

    embeddings: nn.Module
    layers: nn.ModuleList
    pooler: nn.Module | None
    projection: nn.Module | None
    final_norm: nn.Module | None
    position_bias: nn.Module | None
    rotary: nn.Module | None

    def __init__(self, config):
        super().__init__(config)
        self.pooler = self.projection = None

    def add_around(self, spec: BlockSpec) -> None:
        self.final_norm = make_final_norm(spec)
        self.position_bias, self.rotary = make_bias(self.config, spec), make_rotary(spec)

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def layers_in_order(self) -> Iterator[Block]:
        yield from self.layers  # type: ignore[misc]

    def positions(self, input_ids: torch.Tensor | None, inputs: torch.Tensor, past: int) -> torch.Tensor:
        """(1 or batch, length) of the inputs (ids or vectors), `past` tokens being in the cache."""
        return positions_from(past, inputs.shape[1], self.config, inputs.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        packing: Packing | str | None = PLAN,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As the official class. With `packing`, a head's own plan, the outputs stay packed: (tokens, hidden).

        A head that reads the first token alone says `pooled_only=True`: it finds it, pooled where there is a pooler, in
        `pooler_output`; packed, the last layer then computes no other, and there is no last hidden state.
        """
        planned_here = isinstance(packing, str)
        if isinstance(packing, str):
            memory = encoder_hidden_states, encoder_attention_mask
            packing = self.plan(input_ids, inputs_embeds, attention_mask, past_key_values, *memory, **kwargs)
        output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_hidden_states,
            encoder_attention_mask, past_key_values,
            use_cache=use_cache, packing=packing, return_dict=True, **kwargs,
        )  # fmt: skip
        return unpack_output(output, packing) if planned_here and packing is not None else output

    def plan(
        self, input_ids, inputs_embeds, attention_mask, past_key_values=None, encoder_hidden_states=None,
        encoder_attention_mask=None, **kwargs,
    ) -> Packing | None:  # fmt: skip
        """How a call with these inputs is packed, or None."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        pooled = self.pooler is not None or bool(kwargs.get("pooled_only"))
        cached = cached_tokens(past_key_values)
        packing = self.plan_packing(inputs, attention_mask, pooled=pooled, cached_tokens=cached, **kwargs)
        if packing is None or encoder_hidden_states is None:
            return packing
        # queries and keys are packed together or not at all
        memory = self.plan_packing(encoder_hidden_states, encoder_attention_mask, **kwargs)
        return None if memory is None else replace(packing, memory=memory)

    @merge_with_config_defaults
    @capture_outputs
    def _encode(
        self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_hidden_states,
        encoder_attention_mask, past_key_values,
        use_cache=None, packing=None, pooled_only=False, **kwargs,
    ):  # fmt: skip
        causal = bool(getattr(self.config, "is_decoder", False))
        use_cache = bool(use_cache) and causal
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
            if encoder_hidden_states is not None or self.config.is_encoder_decoder:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        self_cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            self_cache = past_key_values.self_attention_cache
        inputs = input_ids if input_ids is not None else inputs_embeds
        if position_ids is None:
            position_ids = self.positions(input_ids, inputs, 0 if self_cache is None else self_cache.get_seq_length())
        embedded = [input_ids, inputs_embeds, token_type_ids, position_ids]
        if packing is not None:
            embedded = [None if x is None else packing.pack(x) for x in embedded]
        hidden_states = self.embeddings(*embedded)
        rotary = None if self.rotary is None else self.rotary(embedded[-1])
        if self.projection is not None:
            hidden_states = self.projection(hidden_states)
        # only shape, dtype and device of this are read
        grid = hidden_states if packing is None else hidden_states.new_empty(1).expand(*inputs.shape[:2], 1)
        masks = LayerMasks(self.config, causal, grid, attention_mask, self_cache, packing)
        position_bias = bias_of_pass(self.position_bias, inputs, self_cache, hidden_states.dtype, masks.in_blocks)
        in_rows = packing is not None and packing.per_sequence
        memory_mask = None
        if encoder_hidden_states is not None and encoder_attention_mask is not None and not in_rows:
            memory_mask = cross_mask(self.config, grid, encoder_attention_mask, encoder_hidden_states)
        encoder_packing = None if packing is None else packing.memory
        if encoder_packing is not None:
            encoder_hidden_states = encoder_packing.pack(encoder_hidden_states)
        layers = list(self.layers_in_order())
        recorded = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        first_only = pooled_only and in_rows and not causal and (recorded is None or recorded is False)
        # a first token alone has neither the positions of the others nor their place in a bias
        first_only = first_only and not masks.by_kernel(len(layers) - 1) and rotary is None and position_bias is None
        if self_cache is not None and len({layer.self_attn.layer_idx for layer in layers}) < len(layers):
            raise ValueError(
                "a layer that runs more than once (ALBERT) has no place for cached keys: past_key_values, and prefix "
                "tuning with it, cannot be used; LoRA and prompt tuning can."
            )
        for index, layer in enumerate(layers):
            hidden_states = layer(
                hidden_states, masks.of_layer(index), position_bias, encoder_hidden_states,
                encoder_attention_mask=memory_mask, encoder_packing=encoder_packing, past_key_values=past_key_values,
                packing=packing, first_only=first_only and index == len(layers) - 1, rotary=rotary, **kwargs,
            )  # fmt: skip
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        pooled = None
        if self.pooler is not None or pooled_only:
            pooled = hidden_states if first_only else first_tokens(hidden_states, packing)
            pooled = pooled if self.pooler is None else self.pooler(pooled)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=None if first_only else hidden_states,
            pooler_output=pooled,
            past_key_values=past_key_values if use_cache else None,
        )
