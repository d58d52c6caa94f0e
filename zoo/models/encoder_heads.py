"""Heads on an `EncoderModel`, which hang it under their family's official name and share its packing.

A family's class adds its tree: the layers under their official names, and what `score` or `transform` makes of states.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .dropout import Dropout
from .heads import classification_loss, next_token_labels, span_answer, token_answer, token_loss
from .losses import IGNORED, linear_cross_entropy
from .pretrained import ZooPreTrainedModel
from .ragged import kept_logits, padded, recorded, token_labels, unpack_states

# a class without a config of its own would take part in transformers' guesses at it
if TYPE_CHECKING:
    _Base = ZooPreTrainedModel
else:
    _Base = object


class EncoderHead(_Base):
    """Goes before a family's base class in the bases of a head.

    Heads that name `past_key_values` get the keys of peft's prefix tuning there; peft would guess at the others.
    """

    pooling: ClassVar[bool] = False  # whether its encoder has a pooler, where the family has one

    # these losses are means over samples, whatever else is in an accumulated batch
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.num_labels: int = config.num_labels
        setattr(self, self.base_model_prefix, type(self).encoder_class(config, self.pooling))

    @property
    def encoder(self) -> Any:
        return getattr(self, self.base_model_prefix)

    def classifier_dropout(self) -> Dropout:
        rate = self.config.classifier_dropout
        return Dropout(self.config.hidden_dropout_prob if rate is None else rate)

    def _run(self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs):
        """The encoder's output, as packed as it ran, and its packing. kwargs may say `pooled_only=True`."""
        packing = self.encoder.plan(input_ids, inputs_embeds, attention_mask, **kwargs)
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        return self.encoder(*inputs, packing=packing, return_dict=True, **kwargs), packing


class TokenPredictor(EncoderHead):
    """A head that predicts tokens: `transform` leads from states to the decoder, `get_output_embeddings()`."""

    transform: Callable[[torch.Tensor], torch.Tensor]

    accepts_loss_kwargs = True

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.get_output_embeddings()(self.transform(states))

    def _predict(self, states, labels, packing, num_items) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(loss, padded logits); in training with labels the logits are never built, and None is returned."""
        labels = None if labels is None else token_labels(labels, packing)
        if labels is not None and self.training:
            labelled = labels != IGNORED
            states = self.transform(states.flatten(0, -2)[labelled])
            return linear_cross_entropy(states, self.get_output_embeddings(), labels[labelled], num_items), None
        logits = self._logits(states)
        loss = None if labels is None else token_loss(logits.flatten(0, -2), labels, num_items)
        return loss, padded(logits, packing)


class CausalLM(TokenPredictor):
    """The next token, as a decoder: alone, or with `add_cross_attention` under transformers' EncoderDecoderModel."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        memory = encoder_hidden_states, encoder_attention_mask
        packing = self.encoder.plan(input_ids, inputs_embeds, attention_mask, past_key_values, *memory, **kwargs)
        output = self.encoder(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, *memory, past_key_values,
            use_cache=False if labels is not None else use_cache, packing=packing, return_dict=True, **kwargs,
        )  # fmt: skip
        states, loss, logits = output.last_hidden_state, None, None
        if labels is not None:
            loss, logits = self._predict(states, next_token_labels(labels), packing, num_items_in_batch)
        else:
            logits = kept_logits(self._logits, states, packing, logits_to_keep)
        return CausalLMOutputWithCrossAttentions(
            loss,
            logits,
            past_key_values=output.past_key_values,
            hidden_states=unpack_states(output.hidden_states, packing),
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )


class MaskedLM(TokenPredictor):
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
        return MaskedLMOutput(loss, logits, **recorded(output, packing))


class _OneAnswer(EncoderHead):
    """A head that reads the pooled token of each text."""

    pooling = True

    def add_classifier(self, outputs: int) -> None:
        self.dropout = self.classifier_dropout()
        self.classifier = nn.Linear(self.config.hidden_size, outputs)

    def score(self, pooled: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) -> (batch, outputs)."""
        return self.classifier(self.dropout(pooled))


class SequenceClassification(_OneAnswer):
    def __init__(self, config):
        super().__init__(config)
        self.add_classifier(self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        labels=None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        output, packing = self._run(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values=past_key_values,
            pooled_only=True, **kwargs,
        )  # fmt: skip
        logits = self.score(output.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return SequenceClassifierOutput(loss, logits, **recorded(output, packing))


class MultipleChoice(_OneAnswer):
    """Inputs are (batch, choices, length)."""

    def __init__(self, config):
        super().__init__(config)
        self.add_classifier(1)
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
        logits = self.score(output.pooler_output).view(-1, choices)
        loss = None if labels is None else token_loss(logits, labels)
        return MultipleChoiceModelOutput(loss, logits, **recorded(output, packing))


class TokenClassification(EncoderHead):
    def __init__(self, config):
        super().__init__(config)
        self.dropout = self.classifier_dropout()
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
        past_key_values=None,
        labels=None,
        **kwargs,
    ) -> TokenClassifierOutput:
        output, packing = self._run(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values=past_key_values,
            **kwargs,
        )  # fmt: skip
        logits = self.classifier(self.dropout(output.last_hidden_state))
        return TokenClassifierOutput(*token_answer(logits, labels, packing), **recorded(output, packing))


class QuestionAnswering(EncoderHead):
    """Start and end of a span. Packed, padding gets the lowest logit, so the loss is that of unpadded samples."""

    def __init__(self, config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, self.num_labels)
        self.dropout = self.qa_dropout()
        self.post_init()

    def qa_dropout(self) -> Dropout:
        return Dropout(0.0)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        output, packing = self._run(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values=past_key_values,
            **kwargs,
        )  # fmt: skip
        logits = self.qa_outputs(self.dropout(output.last_hidden_state))
        answer = span_answer(logits, start_positions, end_positions, packing)
        return QuestionAnsweringModelOutput(*answer, **recorded(output, packing))
