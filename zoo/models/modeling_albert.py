"""ALBERT (Lan et al. 2019, arXiv 1909.11942): factorised embeddings, few layers that run many times, sentence order."""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.models.albert.configuration_albert import AlbertConfig
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .blocks import Block, make_activation
from .dropout import Dropout
from .embeddings import BertEmbeddings
from .encoder import EncoderModel
from .encoder_heads import (
    EncoderHead,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    TokenPredictor,
)
from .heads import token_loss
from .pretrained import (
    OLD_NORM_NAMES,
    RECORDED_BY_ENCODERS,
    VariantConfig,
    ZooPreTrainedModel,
    check_heads,
    register_key_map,
)
from .ragged import recorded
from .spec import BlockSpec, with_options

KEY_MAP = [
    *OLD_NORM_NAMES,
    WeightRenaming("encoder.embedding_hidden_mapping_in", "projection"),
    WeightRenaming("encoder.albert_layer_groups", "groups"),
    WeightRenaming("albert_layers", "layers"),
    WeightRenaming("attention.query", "self_attn.q_proj"),
    WeightRenaming("attention.key", "self_attn.k_proj"),
    WeightRenaming("attention.value", "self_attn.v_proj"),
    WeightRenaming("attention.dense", "self_attn.o_proj"),
    WeightRenaming("attention.LayerNorm", "self_attn_norm"),
    WeightRenaming("full_layer_layer_norm", "mlp_norm"),
    WeightRenaming("ffn_output", "mlp.fc2"),
    WeightRenaming("ffn", "mlp.fc1"),
]


@strict
class ZooAlbertConfig(VariantConfig, AlbertConfig):
    """`AlbertConfig` and the attention variant."""

    model_type = "zoo_albert"

    def validate_architecture(self):
        check_heads(self, "hidden_size", "num_attention_heads")
        for name in ("num_hidden_groups", "inner_group_num"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but there must be at least 1 of them.")
        super().validate_architecture()


def block_spec(config: AlbertConfig) -> BlockSpec:
    own = BlockSpec(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        attention_dropout=config.attention_probs_dropout_prob,
        attention_output_dropout=config.hidden_dropout_prob,
        # the official class has none behind a feed-forward
        hidden_dropout=0.0,
    )
    return with_options(config, own)


class ZooAlbertPreTrainedModel(ZooPreTrainedModel):
    config: ZooAlbertConfig
    config_class = ZooAlbertConfig
    official_config_class = AlbertConfig
    base_model_prefix = "albert"
    _can_record_outputs = RECORDED_BY_ENCODERS
    # a buffer in checkpoints of older versions
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]
    auto_map = {
        "AutoConfig": "modeling_albert.ZooAlbertConfig",
        "AutoModelForTextEncoding": "modeling_albert.ZooAlbertModel",
        "AutoModel": "modeling_albert.ZooAlbertModel",
        "AutoModelForPreTraining": "modeling_albert.ZooAlbertForPreTraining",
        "AutoModelForMaskedLM": "modeling_albert.ZooAlbertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_albert.ZooAlbertForSequenceClassification",
        "AutoModelForMultipleChoice": "modeling_albert.ZooAlbertForMultipleChoice",
        "AutoModelForTokenClassification": "modeling_albert.ZooAlbertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_albert.ZooAlbertForQuestionAnswering",
    }


class AlbertGroup(nn.Module):
    """Layers that run one after the other wherever their group does."""

    def __init__(self, config: ZooAlbertConfig, spec: BlockSpec):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.inner_group_num))


class AlbertPooler(nn.Linear):
    """tanh(x W + b) of the first tokens: (batch, hidden) -> (batch, hidden)."""

    def forward(self, first_tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(first_tokens))


class ZooAlbertModel(EncoderModel, ZooAlbertPreTrainedModel):
    """The encoder and, unless `add_pooling_layer` is false, the pooler."""

    def __init__(self, config: ZooAlbertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config, config.embedding_size)
        self.projection = nn.Linear(config.embedding_size, config.hidden_size)
        spec = block_spec(config)
        self.groups = nn.ModuleList(AlbertGroup(config, spec) for _ in range(config.num_hidden_groups))
        self.add_around(spec)
        self.pooler = AlbertPooler(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def layers_in_order(self):
        for index in range(self.config.num_hidden_layers):
            group = int(index / (self.config.num_hidden_layers / self.config.num_hidden_groups))
            yield from self.groups[group].layers  # type: ignore[misc]


ZooAlbertPreTrainedModel.encoder_class = ZooAlbertModel


class AlbertMLMHead(nn.Module):
    """Dense, activation, norm, in the width of the embeddings, to which the decoder is tied. Official names."""

    is_output_bias_owner = True

    def __init__(self, config):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.activation = make_activation(config.hidden_act)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., embedding), before the decoder."""
        return self.LayerNorm(self.activation(self.dense(states)))


class _AlbertPredictor(TokenPredictor, ZooAlbertPreTrainedModel):
    _tied_weights_keys = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }

    def __init__(self, config: ZooAlbertConfig):
        super().__init__(config)
        self.predictions = AlbertMLMHead(config)
        if self.pooling:
            self.sop_classifier = AlbertSOPHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        self.predictions.decoder = new_embeddings
        self.predictions.bias = new_embeddings.bias

    def transform(self, states):
        return self.predictions(states)


class AlbertSOPHead(nn.Module):
    """Whether two sentences are in their order: (batch, hidden) -> (batch, labels)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(pooled))


@dataclass
class ZooAlbertForPreTrainingOutput(ModelOutput):
    """Loss, token logits (batch, length, vocabulary), sentence-order logits (batch, 2)."""

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    sop_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None


class ZooAlbertForPreTraining(_AlbertPredictor):
    """Masked tokens and sentence order (0: as written, 1: swapped), whose losses add up when both labels are given."""

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
        sentence_order_label=None,
        **kwargs,
    ) -> ZooAlbertForPreTrainingOutput:
        output, packing = self._run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        order = self.sop_classifier(output.pooler_output)
        both = labels is not None and sentence_order_label is not None
        loss, logits = self._predict(output.last_hidden_state, labels if both else None, packing, None)
        if loss is not None:
            loss = loss + token_loss(order, sentence_order_label.view(-1))
        return ZooAlbertForPreTrainingOutput(loss, logits, order, **recorded(output, packing))


class ZooAlbertForMaskedLM(MaskedLM, _AlbertPredictor):
    pass


class _WithClassifier(EncoderHead):
    def classifier_dropout(self):
        rate = self.config.classifier_dropout_prob
        return Dropout(self.config.hidden_dropout_prob if rate is None else rate)


class ZooAlbertForSequenceClassification(_WithClassifier, SequenceClassification, ZooAlbertPreTrainedModel):
    pass


class ZooAlbertForMultipleChoice(_WithClassifier, MultipleChoice, ZooAlbertPreTrainedModel):
    pass


class ZooAlbertForTokenClassification(_WithClassifier, TokenClassification, ZooAlbertPreTrainedModel):
    pass


class ZooAlbertForQuestionAnswering(QuestionAnswering, ZooAlbertPreTrainedModel):
    pass


register_key_map(["ZooAlbertModel"], KEY_MAP)

__all__ = [
    "ZooAlbertConfig",
    "ZooAlbertForMaskedLM",
    "ZooAlbertForMultipleChoice",
    "ZooAlbertForPreTraining",
    "ZooAlbertForPreTrainingOutput",
    "ZooAlbertForQuestionAnswering",
    "ZooAlbertForSequenceClassification",
    "ZooAlbertForTokenClassification",
    "ZooAlbertModel",
    "ZooAlbertPreTrainedModel",
]
