"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): half of BERT's layers, without segments and pooler."""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming
from transformers.models.distilbert.configuration_distilbert import DistilBertConfig

from .blocks import Block, make_activation
from .dropout import Dropout
from .embeddings import DistilBertEmbeddings
from .encoder import EncoderModel
from .encoder_heads import (
    EncoderHead,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from .positions import sinusoids
from .pretrained import (
    OLD_NORM_NAMES,
    RECORDED_BY_ENCODERS,
    VariantConfig,
    ZooPreTrainedModel,
    check_heads,
    register_key_map,
)
from .spec import BlockSpec, with_options

NORM_EPS = 1e-12

KEY_MAP = [
    *OLD_NORM_NAMES,
    WeightRenaming("transformer.layer", "layers"),
    WeightRenaming("attention.q_lin", "self_attn.q_proj"),
    WeightRenaming("attention.k_lin", "self_attn.k_proj"),
    WeightRenaming("attention.v_lin", "self_attn.v_proj"),
    WeightRenaming("attention.out_lin", "self_attn.o_proj"),
    WeightRenaming("sa_layer_norm", "self_attn_norm"),
    WeightRenaming("ffn.lin1", "mlp.fc1"),
    WeightRenaming("ffn.lin2", "mlp.fc2"),
    WeightRenaming("output_layer_norm", "mlp_norm"),
]


@strict
class ZooDistilBertConfig(VariantConfig, DistilBertConfig):
    """`DistilBertConfig` and the attention variant."""

    model_type = "zoo_distilbert"

    def validate_architecture(self):
        check_heads(self, "dim", "n_heads")
        super().validate_architecture()


def block_spec(config: DistilBertConfig) -> BlockSpec:
    own = BlockSpec(
        hidden_size=config.dim,
        num_heads=config.n_heads,
        head_dim=config.dim // config.n_heads,
        ffn_size=config.hidden_dim,
        activation=config.activation,
        norm_eps=NORM_EPS,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.dropout,
        # the official class has none there
        attention_output_dropout=0.0,
    )
    return with_options(config, own)


class ZooDistilBertPreTrainedModel(ZooPreTrainedModel):
    config: ZooDistilBertConfig
    config_class = ZooDistilBertConfig
    official_config_class = DistilBertConfig
    base_model_prefix = "distilbert"
    _can_record_outputs = RECORDED_BY_ENCODERS
    # a buffer in checkpoints of older versions
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]
    auto_map = {
        "AutoConfig": "modeling_distilbert.ZooDistilBertConfig",
        "AutoModelForTextEncoding": "modeling_distilbert.ZooDistilBertModel",
        "AutoModel": "modeling_distilbert.ZooDistilBertModel",
        "AutoModelForMaskedLM": "modeling_distilbert.ZooDistilBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_distilbert.ZooDistilBertForSequenceClassification",
        "AutoModelForMultipleChoice": "modeling_distilbert.ZooDistilBertForMultipleChoice",
        "AutoModelForTokenClassification": "modeling_distilbert.ZooDistilBertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_distilbert.ZooDistilBertForQuestionAnswering",
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        learned = isinstance(module, DistilBertEmbeddings) and isinstance(module.position_embeddings, nn.Embedding)
        if learned and self.config.sinusoidal_pos_embds:
            rows = module.position_embeddings.weight
            init.copy_(rows, sinusoids(torch.arange(len(rows), device=rows.device), rows.shape[1]).to(rows))


class ZooDistilBertModel(EncoderModel, ZooDistilBertPreTrainedModel):
    """The encoder. `token_type_ids` are not read: there is no embedding for them."""

    def __init__(self, config: ZooDistilBertConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.embeddings = DistilBertEmbeddings(config, NORM_EPS)
        spec = block_spec(config)
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.n_layers))
        self.add_around(spec)
        self.post_init()


ZooDistilBertPreTrainedModel.encoder_class = ZooDistilBertModel


class ZooDistilBertForMaskedLM(MaskedLM, ZooDistilBertPreTrainedModel):
    _tied_weights_keys = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}

    def __init__(self, config: ZooDistilBertConfig):
        super().__init__(config)
        self.activation = make_activation(config.activation)
        self.vocab_transform = nn.Linear(config.dim, config.dim)
        self.vocab_layer_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.vocab_projector = nn.Linear(config.dim, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.vocab_projector

    def set_output_embeddings(self, new_embeddings):
        self.vocab_projector = new_embeddings

    def transform(self, states):
        return self.vocab_layer_norm(self.activation(self.vocab_transform(states)))


class _FirstToken(EncoderHead):
    """Of heads that read the first token: dense, ReLU, dropout, classifier."""

    def add_classifier(self, outputs):
        self.pre_classifier = nn.Linear(self.config.dim, self.config.dim)
        self.classifier = nn.Linear(self.config.dim, outputs)
        self.dropout = Dropout(self.config.seq_classif_dropout)

    def score(self, pooled):
        return self.classifier(self.dropout(torch.relu(self.pre_classifier(pooled))))


class ZooDistilBertForSequenceClassification(_FirstToken, SequenceClassification, ZooDistilBertPreTrainedModel):
    pass


class ZooDistilBertForMultipleChoice(_FirstToken, MultipleChoice, ZooDistilBertPreTrainedModel):
    pass


class ZooDistilBertForTokenClassification(TokenClassification, ZooDistilBertPreTrainedModel):
    def classifier_dropout(self):
        return Dropout(self.config.dropout)


class ZooDistilBertForQuestionAnswering(QuestionAnswering, ZooDistilBertPreTrainedModel):
    def qa_dropout(self):
        return Dropout(self.config.qa_dropout)


register_key_map(["ZooDistilBertModel"], KEY_MAP)

__all__ = [
    "ZooDistilBertConfig",
    "ZooDistilBertForMaskedLM",
    "ZooDistilBertForMultipleChoice",
    "ZooDistilBertForQuestionAnswering",
    "ZooDistilBertForSequenceClassification",
    "ZooDistilBertForTokenClassification",
    "ZooDistilBertModel",
    "ZooDistilBertPreTrainedModel",
]
