"""GPT-2 (Radford et al. 2019) on the native block: pre-norm, causal, cached; official Conv1D weights in and out."""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

import math
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import Block, make_final_norm
from .dropout import Dropout
from .embeddings import add_positions, look_up, make_positions, positions_from
from .heads import classification_loss, next_token_labels, span_answer, token_answer, token_loss
from .layer_masks import LayerMasks
from .losses import linear_cross_entropy
from .positions import bias_of_pass, make_bias, make_rotary
from .pretrained import VariantConfig, ZooPreTrainedModel, check_heads, register_key_map
from .ragged import (
    PLAN,
    Packing,
    cached_tokens,
    kept_logits,
    padded,
    recorded,
    unpack_output,
    unpack_states,
)
from .spec import BlockSpec, with_options

# official linear layers are Conv1D, whose weights are (in, out), with q, k and v in one
KEY_MAP = [
    WeightRenaming(r"h.(\d+).ln_1", r"layers.\1.self_attn_norm"),
    WeightRenaming(r"h.(\d+).ln_2", r"layers.\1.mlp_norm"),
    WeightRenaming(r"h.(\d+).attn.c_attn", r"layers.\1.self_attn.c_attn"),
    WeightRenaming(r"h.(\d+).attn.c_proj.bias", r"layers.\1.self_attn.o_proj.bias"),
    WeightRenaming(r"h.(\d+).mlp.c_fc.bias", r"layers.\1.mlp.fc1.bias"),
    WeightRenaming(r"h.(\d+).mlp.c_proj.bias", r"layers.\1.mlp.fc2.bias"),
    # converters start from names that are not ours, or a checkpoint in our names would be turned as well
    WeightRenaming(r"h.(\d+).attn.c_proj.weight", r"layers.\1.self_attn.c_proj.weight"),
    WeightRenaming(r"h.(\d+).mlp.c_fc.weight", r"layers.\1.mlp.c_fc.weight"),
    WeightRenaming(r"h.(\d+).mlp.c_proj.weight", r"layers.\1.mlp.c_proj.weight"),
    WeightConverter(
        "self_attn.c_attn.weight",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        [Transpose(0, 1), Chunk(dim=0)],
    ),
    WeightConverter(
        "self_attn.c_attn.bias",
        ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
        [Chunk(dim=0)],
    ),
    WeightConverter("self_attn.c_proj.weight", "self_attn.o_proj.weight", [Transpose(0, 1)]),
    WeightConverter("mlp.c_fc.weight", "mlp.fc1.weight", [Transpose(0, 1)]),
    WeightConverter("mlp.c_proj.weight", "mlp.fc2.weight", [Transpose(0, 1)]),
]


@strict
class ZooGPT2Config(VariantConfig, GPT2Config):
    """`GPT2Config` and the attention variant."""

    model_type = "zoo_gpt2"
    own_norm_place: ClassVar[str] = "pre"
    always_causal: ClassVar[bool] = True

    def validate_architecture(self):
        check_heads(self, "n_embd", "n_head")
        if self.add_cross_attention:
            raise ValueError("zoo_gpt2 has no cross-attention: add_cross_attention must be false.")
        super().validate_architecture()


def block_spec(config: GPT2Config, layer_idx: int) -> BlockSpec:
    head_dim = config.n_embd // config.n_head
    scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scaling /= layer_idx + 1
    own = BlockSpec(
        hidden_size=config.n_embd,
        num_heads=config.n_head,
        head_dim=head_dim,
        ffn_size=config.n_inner or 4 * config.n_embd,
        activation=config.activation_function,
        norm_eps=config.layer_norm_epsilon,
        norm_place="pre",
        causal=True,
        scaling=scaling,
        attention_dropout=config.attn_pdrop,
        hidden_dropout=config.resid_pdrop,
    )
    return with_options(config, own)


class ZooGPT2PreTrainedModel(ZooPreTrainedModel):
    config: ZooGPT2Config
    config_class = ZooGPT2Config
    official_config_class = GPT2Config
    base_model_prefix = "transformer"
    _can_compile_fullgraph = True
    auto_map = {
        "AutoConfig": "modeling_gpt2.ZooGPT2Config",
        "AutoModel": "modeling_gpt2.ZooGPT2Model",
        "AutoModelForCausalLM": "modeling_gpt2.ZooGPT2LMHeadModel",
        "AutoModelForSequenceClassification": "modeling_gpt2.ZooGPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_gpt2.ZooGPT2ForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_gpt2.ZooGPT2ForQuestionAnswering",
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Block):
            # two residual branches a layer: their outputs are scaled down by 1 / sqrt(2 layers) (GPT-2, section 2.3)
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.self_attn.o_proj.weight, mean=0.0, std=std)
            init.normal_(module.mlp.fc2.weight, mean=0.0, std=std)


class ZooGPT2Model(ZooGPT2PreTrainedModel):
    def __init__(self, config: ZooGPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = make_positions(config, config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        spec = block_spec(config, 0)
        self.layers = nn.ModuleList(Block(config, block_spec(config, index), index) for index in range(config.n_layer))
        self.ln_f = make_final_norm(spec) or nn.Identity()
        self.position_bias, self.rotary = make_bias(config, spec), make_rotary(spec)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new_embeddings):
        self.wte = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        packing: Packing | str | None = PLAN,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As the official class. With `packing`, a head's own plan, the outputs stay packed: (tokens, hidden)."""
        planned_here = isinstance(packing, str)
        if isinstance(packing, str):
            packing = self.plan(
                input_ids, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids, **kwargs
            )
        output = self._decode(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds,
            use_cache=use_cache, packing=packing, return_dict=True, **kwargs,
        )  # fmt: skip
        return unpack_output(output, packing) if planned_here and packing is not None else output

    def plan(
        self, input_ids, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, **kwargs
    ) -> Packing | None:
        """How a call with these inputs is packed, or None."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        # keys that are there, or are yet to come, leave a row to one document
        documents = position_ids if past_key_values is None else None
        return self.plan_packing(
            inputs, attention_mask, cached_tokens=cached_tokens(past_key_values), position_ids=documents, **kwargs
        )

    @merge_with_config_defaults
    @capture_outputs
    def _decode(
        self, input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds,
        use_cache=None, packing=None, **kwargs,
    ):  # fmt: skip
        inputs = input_ids if input_ids is not None else inputs_embeds
        # an empty cache of our own would hide from the masks that a row holds several documents
        given_cache, given_positions = past_key_values, position_ids
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = positions_from(past, inputs.shape[1], self.config, inputs.device)
        if packing is not None:
            input_ids, inputs_embeds, token_type_ids, position_ids = (
                None if x is None else packing.pack(x) for x in (input_ids, inputs_embeds, token_type_ids, position_ids)
            )
        words = look_up(self.wte, input_ids, "token id", "vocab_size") if inputs_embeds is None else inputs_embeds
        hidden_states = add_positions(words, self.wpe, position_ids)
        rotary = None if self.rotary is None else self.rotary(position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + look_up(self.wte, token_type_ids, "token type", "vocab_size")
        # only shape, dtype and device of this are read
        grid = hidden_states if packing is None else hidden_states.new_empty(1).expand(*inputs.shape[:2], 1)
        masks = LayerMasks(self.config, True, grid, attention_mask, given_cache, packing, given_positions)
        position_bias = bias_of_pass(self.position_bias, inputs, past_key_values, hidden_states.dtype, masks.in_blocks)
        hidden_states = self.drop(hidden_states)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states, masks.of_layer(index), position_bias, past_key_values=past_key_values, packing=packing,
                rotary=rotary, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPastAndCrossAttentions(
            self.ln_f(hidden_states), past_key_values if use_cache else None
        )


class ZooGPT2LMHeadModel(ZooGPT2PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: ZooGPT2Config):
        super().__init__(config)
        self.transformer = ZooGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As the official class; packed, a row's first real token is no target, whatever pads it on the left."""
        packing = self.transformer.plan(
            input_ids, inputs_embeds, attention_mask, past_key_values, position_ids, **kwargs
        )
        output = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds,
            use_cache=use_cache, packing=packing, return_dict=True, **kwargs,
        )  # fmt: skip
        states = output.last_hidden_state
        loss = logits = None
        if labels is not None:
            labels = next_token_labels(labels)
            labels = labels.flatten() if packing is None else packing.pack(labels)
        if labels is not None and self.training:
            loss = linear_cross_entropy(states.flatten(0, -2), self.lm_head, labels, num_items_in_batch)
        else:
            logits = kept_logits(self.lm_head, states, packing, logits_to_keep)
        if labels is not None and logits is not None:
            rows = logits.flatten(0, 1) if packing is None else packing.pack(logits)
            loss = token_loss(rows.float(), labels, num_items_in_batch)
        return CausalLMOutputWithCrossAttentions(
            loss,
            logits,
            past_key_values=output.past_key_values,
            hidden_states=unpack_states(output.hidden_states, packing),
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )


class _Head(ZooGPT2PreTrainedModel):
    """A model under `transformer`, whose packing the head shares."""

    # these losses are means over samples, whatever else is in an accumulated batch
    accepts_loss_kwargs = False

    def __init__(self, config: ZooGPT2Config):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # None before a config is complete
        self.transformer = ZooGPT2Model(config)

    def _run(self, input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds, use_cache,
             **kwargs):  # fmt: skip
        """The model's output, as packed as it ran, and its packing."""
        packing = self.transformer.plan(
            input_ids, inputs_embeds, attention_mask, past_key_values, position_ids, **kwargs
        )
        inputs = input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds
        return self.transformer(*inputs, use_cache=use_cache, packing=packing, return_dict=True, **kwargs), packing


class ZooGPT2ForSequenceClassification(_Head):
    """Reads the last token of each text that is not the padding id."""

    def __init__(self, config: ZooGPT2Config):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        output, packing = self._run(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds, use_cache, **kwargs
        )
        states = padded(output.last_hidden_state, packing)
        rows = torch.arange(len(states), device=states.device)
        logits = self.score(states[rows, self._last_tokens(input_ids, states)])
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return SequenceClassifierOutputWithPast(
            loss, logits, output.past_key_values, unpack_states(output.hidden_states, packing), output.attentions
        )

    def _last_tokens(self, input_ids, states: torch.Tensor) -> torch.Tensor | int:
        padding = self.config.pad_token_id
        if padding is None and len(states) > 1:
            raise ValueError("config.pad_token_id is None: it tells where each text of a batch ends.")
        if padding is None or input_ids is None:
            return -1
        # the rightmost, so that padding may stand on either side
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (places * (input_ids != padding)).argmax(-1)


class ZooGPT2ForTokenClassification(_Head):
    def __init__(self, config: ZooGPT2Config):
        super().__init__(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.classifier = nn.Linear(config.n_embd, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ) -> TokenClassifierOutput:
        output, packing = self._run(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds, use_cache, **kwargs
        )
        logits = self.classifier(self.dropout(output.last_hidden_state))
        return TokenClassifierOutput(*token_answer(logits, labels, packing), **recorded(output, packing))


class ZooGPT2ForQuestionAnswering(_Head):
    """Start and end of a span. Packed, padding gets the lowest logit, so the loss is that of unpadded samples."""

    def __init__(self, config: ZooGPT2Config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        output, packing = self._run(
            input_ids, None, attention_mask, token_type_ids, position_ids, inputs_embeds, None, **kwargs
        )
        logits = self.qa_outputs(output.last_hidden_state)
        answer = span_answer(logits, start_positions, end_positions, packing)
        return QuestionAnsweringModelOutput(*answer, **recorded(output, packing))


register_key_map(["ZooGPT2Model"], KEY_MAP)

__all__ = [
    "ZooGPT2Config",
    "ZooGPT2ForQuestionAnswering",
    "ZooGPT2ForSequenceClassification",
    "ZooGPT2ForTokenClassification",
    "ZooGPT2LMHeadModel",
    "ZooGPT2Model",
    "ZooGPT2PreTrainedModel",
]
