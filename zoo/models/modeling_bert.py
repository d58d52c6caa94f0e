"""BERT (Devlin et al. 2018, arXiv 1810.04805) on the native block, with all official heads.

`ZooBertFor....from_pretrained(directory or id)` opens an official checkpoint; weights are saved in official names. With
`is_decoder` and `add_cross_attention` it is a decoder, alone or under transformers' EncoderDecoderModel.
"""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import NextSentencePredictorOutput
from transformers.models.bert.configuration_bert import BertConfig
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .blocks import Block
from .embeddings import BertEmbeddings
from .encoder import EncoderModel
from .encoder_heads import (
    CausalLM,
    EncoderHead,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    TokenPredictor,
)
from .heads import BertHeads, BertPooler, token_loss
from .pretrained import (
    OLD_NORM_NAMES,
    VariantConfig,
    ZooPreTrainedModel,
    check_decoder,
    check_heads,
    register_key_map,
)
from .ragged import recorded
from .spec import BlockSpec, with_options

KEY_MAP = [
    *OLD_NORM_NAMES,
    WeightRenaming("encoder.layer", "layers"),
    # before the self-attention's, whose names are the ends of these
    WeightRenaming("crossattention.self.query", "cross_attn.q_proj"),
    WeightRenaming("crossattention.self.key", "cross_attn.k_proj"),
    WeightRenaming("crossattention.self.value", "cross_attn.v_proj"),
    WeightRenaming("crossattention.output.dense", "cross_attn.o_proj"),
    WeightRenaming("crossattention.output.LayerNorm", "cross_attn_norm"),
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
        check_heads(self, "hidden_size", "num_attention_heads")
        check_decoder(self)
        super().validate_architecture()


def block_spec(config: BertConfig) -> BlockSpec:
    own = BlockSpec(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        causal=config.is_decoder,
        cross_attention=config.add_cross_attention,
        attention_dropout=config.attention_probs_dropout_prob,
        hidden_dropout=config.hidden_dropout_prob,
    )
    return with_options(config, own)


class ZooBertPreTrainedModel(ZooPreTrainedModel):
    config: ZooBertConfig
    config_class = ZooBertConfig
    official_config_class = BertConfig
    base_model_prefix = "bert"
    # a buffer in checkpoints of older versions
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]
    auto_map = {
        "AutoConfig": "modeling_bert.ZooBertConfig",
        "AutoModelForTextEncoding": "modeling_bert.ZooBertModel",
        "AutoModel": "modeling_bert.ZooBertModel",
        "AutoModelForPreTraining": "modeling_bert.ZooBertForPreTraining",
        "AutoModelForCausalLM": "modeling_bert.ZooBertLMHeadModel",
        "AutoModelForMaskedLM": "modeling_bert.ZooBertForMaskedLM",
        "AutoModelForNextSentencePrediction": "modeling_bert.ZooBertForNextSentencePrediction",
        "AutoModelForSequenceClassification": "modeling_bert.ZooBertForSequenceClassification",
        "AutoModelForMultipleChoice": "modeling_bert.ZooBertForMultipleChoice",
        "AutoModelForTokenClassification": "modeling_bert.ZooBertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_bert.ZooBertForQuestionAnswering",
    }


class ZooBertModel(EncoderModel, ZooBertPreTrainedModel):
    """The encoder (or decoder) and, unless `add_pooling_layer` is false, the pooler."""

    def __init__(self, config: ZooBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        spec = block_spec(config)
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.num_hidden_layers))
        self.add_around(spec)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()


ZooBertPreTrainedModel.encoder_class = ZooBertModel


class _BertPredictor(TokenPredictor, ZooBertPreTrainedModel):
    """A head whose `cls` predicts tokens."""

    cls: BertHeads
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: ZooBertConfig):
        super().__init__(config)
        self.cls = BertHeads(config, seq_relationship=self.pooling)
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def transform(self, states):
        return self.cls.predictions.transform(states)


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

    pooling = True
    # the sum of two means with different counts
    accepts_loss_kwargs = False

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
        return ZooBertForPreTrainingOutput(loss, logits, relation, **recorded(output, packing))


class ZooBertForMaskedLM(MaskedLM, _BertPredictor):
    pass


class ZooBertLMHeadModel(CausalLM, _BertPredictor, GenerationMixin):
    pass


class ZooBertForNextSentencePrediction(EncoderHead, ZooBertPreTrainedModel):
    """Label 0: the second sentence follows the first; 1: it is a random one."""

    pooling = True

    def __init__(self, config: ZooBertConfig):
        super().__init__(config)
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
        return NextSentencePredictorOutput(loss, logits, **recorded(output, packing))


class ZooBertForSequenceClassification(SequenceClassification, ZooBertPreTrainedModel):
    pass


class ZooBertForMultipleChoice(MultipleChoice, ZooBertPreTrainedModel):
    pass


class ZooBertForTokenClassification(TokenClassification, ZooBertPreTrainedModel):
    pass


class ZooBertForQuestionAnswering(QuestionAnswering, ZooBertPreTrainedModel):
    pass


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
    "ZooBertLMHeadModel",
    "ZooBertModel",
    "ZooBertPreTrainedModel",
]
