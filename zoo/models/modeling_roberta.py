"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT's blocks, positions counted from the padding id, other heads."""

from .versions import checked  # noqa: F401  isort: skip  (first: other versions fail in riddles further down)

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.models.roberta.configuration_roberta import RobertaConfig

from .blocks import Block
from .dropout import Dropout
from .embeddings import BertEmbeddings
from .encoder import EncoderModel
from .encoder_heads import (
    CausalLM,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    TokenPredictor,
)
from .heads import BertPooler
from .modeling_bert import KEY_MAP, ZooBertConfig, block_spec
from .pretrained import VariantConfig, ZooPreTrainedModel, check_decoder, check_heads, register_key_map


@strict
class ZooRobertaConfig(VariantConfig, RobertaConfig):
    """`RobertaConfig` and the attention variant."""

    model_type = "zoo_roberta"
    base_model_tp_plan = ZooBertConfig.base_model_tp_plan

    def validate_architecture(self):
        check_heads(self, "hidden_size", "num_attention_heads")
        check_decoder(self)
        super().validate_architecture()


class ZooRobertaPreTrainedModel(ZooPreTrainedModel):
    config: ZooRobertaConfig
    config_class = ZooRobertaConfig
    official_config_class = RobertaConfig
    base_model_prefix = "roberta"
    # a buffer in checkpoints of older versions
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]
    auto_map = {
        "AutoConfig": "modeling_roberta.ZooRobertaConfig",
        "AutoModelForTextEncoding": "modeling_roberta.ZooRobertaModel",
        "AutoModel": "modeling_roberta.ZooRobertaModel",
        "AutoModelForCausalLM": "modeling_roberta.ZooRobertaForCausalLM",
        "AutoModelForMaskedLM": "modeling_roberta.ZooRobertaForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_roberta.ZooRobertaForSequenceClassification",
        "AutoModelForMultipleChoice": "modeling_roberta.ZooRobertaForMultipleChoice",
        "AutoModelForTokenClassification": "modeling_roberta.ZooRobertaForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_roberta.ZooRobertaForQuestionAnswering",
    }


class ZooRobertaModel(EncoderModel, ZooRobertaPreTrainedModel):
    """The encoder (or decoder) and, unless `add_pooling_layer` is false, the pooler."""

    def __init__(self, config: ZooRobertaConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config, padding_position=config.pad_token_id)
        spec = block_spec(config)  # type: ignore[arg-type]  # which has the fields of BERT's
        self.layers = nn.ModuleList(Block(config, spec, index) for index in range(config.num_hidden_layers))
        self.add_around(spec)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def positions(self, input_ids, inputs, past):
        """Real tokens count on from the padding id, which is the position of padding itself."""
        padding: int = self.config.pad_token_id  # type: ignore[assignment]
        if input_ids is None:
            return super().positions(input_ids, inputs, 0) + padding + 1
        real = (input_ids != padding).int()
        return ((real.cumsum(1) + past) * real).long() + padding


ZooRobertaPreTrainedModel.encoder_class = ZooRobertaModel


class RobertaLMHead(nn.Module):
    """Dense, GELU, norm; the decoder's weight is tied to the word embeddings, its bias to `bias`. Official names."""

    is_output_bias_owner = True

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class _RobertaPredictor(TokenPredictor, ZooRobertaPreTrainedModel):
    _tied_weights_keys = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def __init__(self, config: ZooRobertaConfig):
        super().__init__(config)
        self.lm_head = RobertaLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    def transform(self, states):
        return self.lm_head.layer_norm(nn.functional.gelu(self.lm_head.dense(states)))


class ZooRobertaForMaskedLM(MaskedLM, _RobertaPredictor):
    pass


class ZooRobertaForCausalLM(CausalLM, _RobertaPredictor, GenerationMixin):
    pass


class RobertaClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection, of the first tokens: (batch, hidden) -> (batch, labels)."""

    def __init__(self, config, dropout: Dropout):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = dropout
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first_tokens: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(first_tokens)))))


class ZooRobertaForSequenceClassification(SequenceClassification, ZooRobertaPreTrainedModel):
    pooling = False

    def add_classifier(self, outputs):
        head = RobertaClassificationHead(self.config, self.classifier_dropout())
        self.classifier = head  # type: ignore[assignment]

    def score(self, pooled):
        return self.classifier(pooled)


class ZooRobertaForMultipleChoice(MultipleChoice, ZooRobertaPreTrainedModel):
    def classifier_dropout(self):
        return Dropout(self.config.hidden_dropout_prob)


class ZooRobertaForTokenClassification(TokenClassification, ZooRobertaPreTrainedModel):
    pass


class ZooRobertaForQuestionAnswering(QuestionAnswering, ZooRobertaPreTrainedModel):
    pass


register_key_map(["ZooRobertaModel"], KEY_MAP)

__all__ = [
    "ZooRobertaConfig",
    "ZooRobertaForCausalLM",
    "ZooRobertaForMaskedLM",
    "ZooRobertaForMultipleChoice",
    "ZooRobertaForQuestionAnswering",
    "ZooRobertaForSequenceClassification",
    "ZooRobertaForTokenClassification",
    "ZooRobertaModel",
    "ZooRobertaPreTrainedModel",
]
