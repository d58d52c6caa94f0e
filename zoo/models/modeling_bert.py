"""BERT (Devlin et al. 2018, arXiv 1810.04805) on the native block, with all official heads.

`ZooBertFor....from_pretrained(directory or id)` opens an official checkpoint; weights are saved in official names.
"""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import Cache
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.configuration_bert import BertConfig
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import LayerMasks
from .blocks import Block, BlockSpec
from .dropout import Dropout
from .embeddings import BertEmbeddings
from .heads import BertHeads, BertPooler, classification_loss, span_loss, token_loss
from .pretrained import OLD_NORM_NAMES, VariantConfig, ZooPreTrainedModel, register_key_map
from .ragged import PLAN, Packing, unpack_output, unpack_states

KEY_MAP = [
    *OLD_NORM_NAMES,
    WeightRenaming("encoder.layer", "layers"),
    WeightRenaming("attention.self.query", "self_attn.q_proj"),
    WeightRenaming("attention.self.key", "self_attn.k_proj"),
    WeightRenaming("attention.self.value", "self_attn.v_proj"),
    WeightRenaming("attention.output.dense", "self_attn.o_proj"),
    WeightRenaming("attention.output.LayerNorm", "self_attn_norm"),
    WeightRenaming("intermediate.dense", "mlp.fc1"),
    WeightRenaming("output.dense", "mlp.fc2"),
    WeightRenaming("output.LayerNorm", "mlp_norm"),
]


@strict
class ZooBertConfig(VariantConfig, BertConfig):
    """`BertConfig` and the attention variant."""

    model_type = "zoo_bert"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    def validate_architecture(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("zoo_bert is an encoder: is_decoder and add_cross_attention must be false.")
        super().validate_architecture()


def block_spec(config: BertConfig) -> BlockSpec:
    return BlockSpec(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        attention_dropout=config.attention_probs_dropout_prob,
        hidden_dropout=config.hidden_dropout_prob,
    )


class ZooBertPreTrainedModel(ZooPreTrainedModel):
    config: ZooBertConfig
    config_class = ZooBertConfig
    official_config_class = BertConfig
    base_model_prefix = "bert"
    # a buffer in checkpoints of older versions
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]
    auto_map = {
        "AutoConfig": "modeling_bert.ZooBertConfig",
        "AutoModel": "modeling_bert.ZooBertModel",
        "AutoModelForPreTraining": "modeling_bert.ZooBertForPreTraining",
        "AutoModelForMaskedLM": "modeling_bert.ZooBertForMaskedLM",
        "AutoModelForNextSentencePrediction": "modeling_bert.ZooBertForNextSentencePrediction",
        "AutoModelForSequenceClassification": "modeling_bert.ZooBertForSequenceClassification",
        "AutoModelForMultipleChoice": "modeling_bert.ZooBertForMultipleChoice",
        "AutoModelForTokenClassification": "modeling_bert.ZooBertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_bert.ZooBertForQuestionAnswering",
    }


class ZooBertModel(ZooBertPreTrainedModel):
    """The encoder and, unless `add_pooling_layer` is false, the pooler."""

    def __init__(self, config: ZooBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        spec = block_spec(config)
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.num_hidden_layers))
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | str | None = PLAN,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As the official class. With `packing`, a head's own plan, the outputs stay packed: (tokens, hidden).

        A head that reads the pooled output alone says `pooled_only=True`; packed, the last layer then computes no
        other token, and there is no last hidden state.
        """
        planned_here = isinstance(packing, str)
        if isinstance(packing, str):
            packing = self.plan(input_ids, inputs_embeds, attention_mask, past_key_values=past_key_values, **kwargs)
        output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values, packing, **kwargs
        )
        return unpack_output(output, packing) if planned_here and packing is not None else output

    def plan(self, input_ids, inputs_embeds, attention_mask, past_key_values=None, **kwargs) -> Packing | None:
        """How a call with these inputs is packed, or None."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        return self.plan_packing(inputs, attention_mask, pooled=self.pooler is not None, cached_tokens=cached, **kwargs)

    @capture_outputs
    def _encode(
        self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values, packing,
        pooled_only=False, **kwargs,
    ):  # fmt: skip
        inputs = input_ids if input_ids is not None else inputs_embeds
        length = inputs.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=inputs.device).unsqueeze(0)
        embedded = [input_ids, inputs_embeds, token_type_ids, position_ids]
        if packing is not None:
            embedded = [None if x is None else packing.pack(x) for x in embedded]
        hidden_states = self.embeddings(*embedded)
        # only shape, dtype and device of this are read
        grid = hidden_states if packing is None else hidden_states.new_empty(1).expand(*inputs.shape[:2], 1)
        masks = LayerMasks(self.config, False, grid, attention_mask, past_key_values, packing)
        recorded = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        in_rows = packing is not None and packing.per_sequence
        first_only = pooled_only and in_rows and (recorded is None or recorded is False)
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            hidden_states = layer(
                hidden_states, masks.of_layer(index), past_key_values=past_key_values, packing=packing,
                first_only=first_only and last, **kwargs,
            )  # fmt: skip
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(hidden_states, None if first_only else packing)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=None if first_only else hidden_states, pooler_output=pooled
        )


def _recorded(output, packing: Packing | None) -> dict:
    return {"hidden_states": unpack_states(output.hidden_states, packing), "attentions": output.attentions}


def _padded(values: torch.Tensor, packing: Packing | None, fill: float = 0.0) -> torch.Tensor:
    return values if packing is None else packing.unpack(values, fill)


def _token_labels(labels: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """(batch, length) -> one label for each row of states; a packed label at a padded slot is left out."""
    return labels.flatten() if packing is None else packing.pack(labels)


class _BertHead(ZooBertPreTrainedModel):
    """A model under `bert`, whose packing the head shares, so that its own layers see packed tokens too."""

    bert: "ZooBertModel"

    # these losses are means over samples, whatever else is in an accumulated batch
    accepts_loss_kwargs = False

    def __init__(self, config: ZooBertConfig, add_pooling_layer: bool):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # None before a config is complete
        self.bert = ZooBertModel(config, add_pooling_layer)

    def _classifier_dropout(self) -> Dropout:
        rate = self.config.classifier_dropout
        return Dropout(self.config.hidden_dropout_prob if rate is None else rate)

    def _run(self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs):
        """The base model's output, as packed as it ran, and its packing. kwargs may say `pooled_only=True`."""
        packing = self.bert.plan(input_ids, inputs_embeds, attention_mask, **kwargs)
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        return self.bert(*inputs, packing=packing, return_dict=True, **kwargs), packing


class _BertPredictor(_BertHead):
    """A head whose `cls` predicts tokens."""

    cls: BertHeads

    accepts_loss_kwargs = True
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def _predict(self, states, labels, packing, num_items) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(loss, padded logits); in training with labels the logits are never built, and None is returned."""
        labels = None if labels is None else _token_labels(labels, packing)
        if labels is not None and self.training:
            return self.cls.predictions.loss(states.flatten(0, -2), labels, num_items), None
        logits = self.cls.predictions(states)
        loss = None if labels is None else token_loss(logits.flatten(0, -2), labels, num_items)
        return loss, _padded(logits, packing)


@dataclass
class ZooBertForPreTrainingOutput(ModelOutput):
    """Loss, token logits (batch, length, vocabulary), next-sentence logits (batch, 2)."""

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None


class ZooBertForPreTraining(_BertPredictor):
    """Masked tokens and next sentence, whose losses add up when both labels are given."""

    # the sum of two means with different counts
    accepts_loss_kwargs = False

    def __init__(self, config: ZooBertConfig):
        super().__init__(config, add_pooling_layer=True)
        self.cls = BertHeads(config, seq_relationship=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        next_sentence_label=None,
        **kwargs,
    ) -> ZooBertForPreTrainingOutput:
        output, packing = self._run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        relation = self.cls.seq_relationship(output.pooler_output)
        both = labels is not None and next_sentence_label is not None
        loss, logits = self._predict(output.last_hidden_state, labels if both else None, packing, None)
        if loss is not None:
            loss = loss + token_loss(relation, next_sentence_label.view(-1))
        return ZooBertForPreTrainingOutput(loss, logits, relation, **_recorded(output, packing))


class ZooBertForMaskedLM(_BertPredictor):
    def __init__(self, config: ZooBertConfig):
        super().__init__(config, add_pooling_layer=False)
        self.cls = BertHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs,
    ) -> MaskedLMOutput:
        output, packing = self._run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        loss, logits = self._predict(output.last_hidden_state, labels, packing, num_items_in_batch)
        return MaskedLMOutput(loss, logits, **_recorded(output, packing))


class ZooBertForNextSentencePrediction(_BertHead):
    """Label 0: the second sentence follows the first; 1: it is a random one."""

    def __init__(self, config: ZooBertConfig):
        super().__init__(config, add_pooling_layer=True)
        self.cls = BertHeads(config, predictions=False, seq_relationship=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ) -> NextSentencePredictorOutput:
        output, packing = self._run(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pooled_only=True, **kwargs
        )
        logits = self.cls.seq_relationship(output.pooler_output)
        loss = None if labels is None else token_loss(logits, labels.view(-1))
        return NextSentencePredictorOutput(loss, logits, **_recorded(output, packing))


class ZooBertForSequenceClassification(_BertHead):
    def __init__(self, config: ZooBertConfig):
        super().__init__(config, add_pooling_layer=True)
        self.dropout = self._classifier_dropout()
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        output, packing = self._run(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pooled_only=True, **kwargs
        )
        logits = self.classifier(self.dropout(output.pooler_output))
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return SequenceClassifierOutput(loss, logits, **_recorded(output, packing))


class ZooBertForMultipleChoice(_BertHead):
    """Inputs are (batch, choices, length)."""

    def __init__(self, config: ZooBertConfig):
        super().__init__(config, add_pooling_layer=True)
        self.dropout = self._classifier_dropout()
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        choices = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        output, packing = self._run(
            *(None if x is None else x.flatten(0, 1) for x in inputs), pooled_only=True, **kwargs
        )
        logits = self.classifier(self.dropout(output.pooler_output)).view(-1, choices)
        loss = None if labels is None else token_loss(logits, labels)
        return MultipleChoiceModelOutput(loss, logits, **_recorded(output, packing))


class ZooBertForTokenClassification(_BertHead):
    def __init__(self, config: ZooBertConfig):
        super().__init__(config, add_pooling_layer=False)
        self.dropout = self._classifier_dropout()
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ) -> TokenClassifierOutput:
        output, packing = self._run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None if labels is None else token_loss(logits.flatten(0, -2), _token_labels(labels, packing))
        return TokenClassifierOutput(loss, _padded(logits, packing), **_recorded(output, packing))


class ZooBertForQuestionAnswering(_BertHead):
    """Start and end of a span. Packed, padding gets the lowest logit, so the loss is that of unpadded samples."""

    def __init__(self, config: ZooBertConfig):
        super().__init__(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, self.num_labels)
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
        output, packing = self._run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(output.last_hidden_state)
        start, end = _padded(logits, packing, fill=torch.finfo(logits.dtype).min).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, start.contiguous(), end.contiguous(), **_recorded(output, packing))


# every BERT head holds a ZooBertModel, whose map serves them all
register_key_map(["ZooBertModel"], KEY_MAP)

__all__ = [
    "ZooBertConfig",
    "ZooBertForMaskedLM",
    "ZooBertForMultipleChoice",
    "ZooBertForNextSentencePrediction",
    "ZooBertForPreTraining",
    "ZooBertForPreTrainingOutput",
    "ZooBertForQuestionAnswering",
    "ZooBertForSequenceClassification",
    "ZooBertForTokenClassification",
    "ZooBertModel",
    "ZooBertPreTrainedModel",
]
