"""T5 (Raffel et al. 2019, arXiv 1910.10683) on the native block, with all official heads; v1.0 and v1.1 (gated)."""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

import copy

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.t5.configuration_t5 import T5Config
from transformers.utils.generic import can_return_tuple

from .dropout import Dropout
from .heads import classification_loss, span_answer, token_answer, token_loss
from .linear import linear
from .losses import IGNORED, linear_cross_entropy
from .pretrained import register_key_map
from .ragged import recorded
from .t5_stack import GATED, PLAIN, ZooT5Config, ZooT5PreTrainedModel, ZooT5Stack, key_map


class _Stacks(ZooT5PreTrainedModel):
    """Encoder, decoder and the embedding they share, directly under the class, as the official ones have them."""

    _keys_to_ignore_on_load_unexpected = ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = ZooT5Stack(_of_stack(config, is_decoder=False))
        self.decoder = ZooT5Stack(_of_stack(config, is_decoder=True))
        # both `wi` and `wi_1` are fc1 here; the way back, for a model that was not loaded, needs the config
        self._weight_conversions = key_map(GATED if config.is_gated_act else PLAIN)

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, new_embeddings):
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)
        self.decoder.set_input_embeddings(new_embeddings)

    def _run(
        self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
        inputs_embeds, decoder_inputs_embeds, use_cache, **kwargs,
    ):  # fmt: skip
        """(the encoder's output, the decoder's)."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True,
                **kwargs,
            )  # fmt: skip
        elif isinstance(encoder_outputs, tuple | list):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
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
        return encoder_outputs, output


def _of_stack(config: ZooT5Config, is_decoder: bool) -> ZooT5Config:
    config = copy.deepcopy(config)
    config.is_decoder = is_decoder
    if is_decoder:
        config.num_layers = config.num_decoder_layers or config.num_layers
    else:
        config.use_cache = False
    return config


def _recorded(encoder, decoder) -> dict:
    """What the outputs of all classes with both stacks have in common."""
    return {
        "past_key_values": decoder.past_key_values,
        "decoder_hidden_states": decoder.hidden_states,
        "decoder_attentions": decoder.attentions,
        "cross_attentions": decoder.cross_attentions,
        "encoder_last_hidden_state": encoder.last_hidden_state,
        "encoder_hidden_states": encoder.hidden_states,
        "encoder_attentions": encoder.attentions,
    }


class ZooT5Model(_Stacks):
    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.post_init()

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
        use_cache=None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        encoded, output = self._run(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, **kwargs,
        )  # fmt: skip
        return Seq2SeqModelOutput(output.last_hidden_state, **_recorded(encoded, output))


class ZooT5EncoderModel(ZooT5PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = ["decoder"]
    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = ZooT5Stack(_of_stack(config, is_decoder=False))
        self._weight_conversions = key_map(GATED if config.is_gated_act else PLAIN)
        self.post_init()

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, new_embeddings):
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        return self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )


class ZooT5ForConditionalGeneration(_Stacks, GenerationMixin):
    _tied_weights_keys = {**_Stacks._tied_weights_keys, "lm_head.weight": "shared.weight"}

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        if not config.scale_decoder_outputs:
            # v1.1, whose head is a matrix of its own. `tie_word_embeddings` does not say so: transformers 5 makes it
            # true in every T5, for the stacks share their embeddings.
            self._tied_weights_keys = _Stacks._tied_weights_keys
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        if missing_keys and "lm_head.weight" in missing_keys:
            # a v1.1 made by transformers 5, which ties its head: one matrix was saved
            self._tied_weights_keys = type(self)._tied_weights_keys
            self.all_tied_weights_keys |= self._tied_weights_keys
        super().tie_weights(missing_keys, recompute_mapping)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """(batch, length) labels -> the decoder's inputs: shifted right behind the start token, -100 made padding."""
        return shift_right(labels, self.config)

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
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = shift_right(labels, self.config)
        encoded, output = self._run(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, **kwargs,
        )  # fmt: skip
        states = output.last_hidden_state
        if self.config.scale_decoder_outputs:
            states = states * self.config.d_model**-0.5
        loss = logits = None
        if labels is not None and self.training:
            loss = linear_cross_entropy(states.flatten(0, 1), self.lm_head, labels.flatten(), num_items_in_batch)
        else:
            logits = linear(self.lm_head, states)
        if labels is not None and logits is not None:
            loss = token_loss(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)
        return Seq2SeqLMOutput(loss, logits, **_recorded(encoded, output))


def shift_right(ids: torch.Tensor, config: T5Config) -> torch.Tensor:
    """(batch, length) -> the same behind the start token, without the last; -100 becomes padding."""
    start, pad = getattr(config, "decoder_start_token_id", None), config.pad_token_id
    if start is None or pad is None:
        raise ValueError("config needs decoder_start_token_id and pad_token_id; for T5 both are the pad token's id.")
    shifted = ids.new_full(ids.shape, start)
    shifted[:, 1:] = ids[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, pad)


class T5ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection: (batch, hidden) -> (batch, labels). Official names."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(states)))))


class ZooT5ForSequenceClassification(ZooT5PreTrainedModel):
    """Reads the decoder, which is given the text again, at the text's last end token."""

    _keys_to_ignore_on_load_unexpected = _Stacks._keys_to_ignore_on_load_unexpected

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.transformer = ZooT5Model(config)
        self.classification_head = T5ClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ) -> Seq2SeqSequenceClassifierOutput:
        """As the official class. Raises ValueError unless each text has an end token, and all as many."""
        if input_ids is None:
            raise ValueError("input_ids are needed: in them the end token is looked for.")
        ends = input_ids == self.config.eos_token_id
        counts = ends.sum(1)
        if counts.min() == 0 or counts.min() != counts.max():
            raise ValueError(f"each text needs as many end tokens (id {self.config.eos_token_id}), at least one.")
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = shift_right(input_ids, self.config)
        output = self.transformer(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, None, inputs_embeds,
            decoder_inputs_embeds, use_cache=False if labels is not None else use_cache, return_dict=True, **kwargs,
        )  # fmt: skip
        # (batch, ends, hidden): the last
        states = output.last_hidden_state[ends].unflatten(0, (len(input_ids), -1))[:, -1]
        logits = self.classification_head(states)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        recorded = {name: output[name] for name in output if name != "last_hidden_state"}
        return Seq2SeqSequenceClassifierOutput(loss, logits, **recorded)


class ZooT5ForTokenClassification(ZooT5PreTrainedModel):
    """On the encoder alone."""

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # None before a config is complete
        self.transformer = ZooT5EncoderModel(config)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs
    ) -> TokenClassifierOutput:
        packing = self.transformer.encoder.plan(input_ids, inputs_embeds, attention_mask, **kwargs)
        output = self.transformer(input_ids, attention_mask, inputs_embeds, packing=packing, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(output.last_hidden_state))
        return TokenClassifierOutput(*token_answer(logits, labels, packing), **recorded(output, packing))


class ZooT5ForQuestionAnswering(_Stacks):
    """Start and end of a span, read from the decoder, which is given the text again."""

    def __init__(self, config: ZooT5Config):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # None before a config is complete
        self.qa_outputs = nn.Linear(config.d_model, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        start_positions=None,
        end_positions=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> Seq2SeqQuestionAnsweringModelOutput:
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids, decoder_input_ids or decoder_inputs_embeds are needed.")
            decoder_input_ids = shift_right(input_ids, self.config)
        wanted = start_positions is not None and end_positions is not None
        encoded, output = self._run(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, None, inputs_embeds,
            decoder_inputs_embeds, False if wanted else use_cache, **kwargs,
        )  # fmt: skip
        answer = span_answer(self.qa_outputs(output.last_hidden_state), start_positions, end_positions)
        return Seq2SeqQuestionAnsweringModelOutput(*answer, **_recorded(encoded, output))


# the stacks stand directly under these, which are the roots of a load, or hold the root
register_key_map(
    ["ZooT5Model", "ZooT5EncoderModel", "ZooT5ForConditionalGeneration", "ZooT5ForQuestionAnswering"],
    key_map(PLAIN | GATED),
)

__all__ = [
    "ZooT5Config",
    "ZooT5EncoderModel",
    "ZooT5ForConditionalGeneration",
    "ZooT5ForQuestionAnswering",
    "ZooT5ForSequenceClassification",
    "ZooT5ForTokenClassification",
    "ZooT5Model",
    "ZooT5PreTrainedModel",
    "ZooT5Stack",
]
