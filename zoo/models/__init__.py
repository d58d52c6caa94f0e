"""Native models. Importing this package registers them with transformers' Auto classes."""

import transformers
from transformers import AutoConfig, AutoTokenizer

from . import modeling_bert, modeling_gpt2, modeling_t5
from .modeling_bert import *
from .modeling_bert import ZooBertPreTrainedModel
from .modeling_gpt2 import *
from .modeling_gpt2 import ZooGPT2PreTrainedModel
from .modeling_t5 import *
from .modeling_t5 import ZooT5PreTrainedModel

# official model type -> the family's base class; its module holds the heads
FAMILIES = {
    "bert": (modeling_bert, ZooBertPreTrainedModel, "BertTokenizer"),
    "gpt2": (modeling_gpt2, ZooGPT2PreTrainedModel, "GPT2Tokenizer"),
    "t5": (modeling_t5, ZooT5PreTrainedModel, "T5Tokenizer"),
}

for _module, _base, _tokenizer in FAMILIES.values():
    AutoConfig.register(_base.config_class.model_type, _base.config_class, exist_ok=True)
    AutoTokenizer.register(_base.config_class, tokenizer_class=getattr(transformers, _tokenizer), exist_ok=True)
    for _auto, _path in _base.auto_map.items():
        if _auto != "AutoConfig":
            _model = getattr(_module, _path.rpartition(".")[2])
            getattr(transformers, _auto).register(_base.config_class, _model, exist_ok=True)
