"""Native models. Importing this package registers them with transformers' Auto classes."""

import transformers
from transformers import AutoConfig, AutoTokenizer

from . import (
    modeling_albert,
    modeling_bert,
    modeling_distilbert,
    modeling_gpt2,
    modeling_roberta,
    modeling_t5,
    modeling_vit,
)
from .modeling_albert import *
from .modeling_albert import ZooAlbertPreTrainedModel
from .modeling_bert import *
from .modeling_bert import ZooBertPreTrainedModel
from .modeling_distilbert import *
from .modeling_distilbert import ZooDistilBertPreTrainedModel
from .modeling_gpt2 import *
from .modeling_gpt2 import ZooGPT2PreTrainedModel
from .modeling_roberta import *
from .modeling_roberta import ZooRobertaPreTrainedModel
from .modeling_t5 import *
from .modeling_t5 import ZooT5PreTrainedModel
from .modeling_vit import *
from .modeling_vit import ZooViTPreTrainedModel

# official model type -> the family's base class; its module holds the heads
FAMILIES = {
    "bert": (modeling_bert, ZooBertPreTrainedModel, "BertTokenizer"),
    "roberta": (modeling_roberta, ZooRobertaPreTrainedModel, "RobertaTokenizer"),
    "albert": (modeling_albert, ZooAlbertPreTrainedModel, "AlbertTokenizer"),
    "distilbert": (modeling_distilbert, ZooDistilBertPreTrainedModel, "DistilBertTokenizer"),
    "gpt2": (modeling_gpt2, ZooGPT2PreTrainedModel, "GPT2Tokenizer"),
    "t5": (modeling_t5, ZooT5PreTrainedModel, "T5Tokenizer"),
    "vit": (modeling_vit, ZooViTPreTrainedModel, None),
}

for _module, _base, _tokenizer in FAMILIES.values():
    AutoConfig.register(_base.config_class.model_type, _base.config_class, exist_ok=True)
    # an image processor is found by its own file
    if _tokenizer is not None:
        AutoTokenizer.register(_base.config_class, tokenizer_class=getattr(transformers, _tokenizer), exist_ok=True)
    for _auto, _path in _base.auto_map.items():
        if _auto != "AutoConfig":
            _model = getattr(_module, _path.rpartition(".")[2])
            getattr(transformers, _auto).register(_base.config_class, _model, exist_ok=True)
