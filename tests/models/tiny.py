"""Tiny models of every family, official and native, with the same random weights; and batches to run them on."""

import torch
import transformers
from transformers import AlbertConfig, BertConfig, DistilBertConfig, GPT2Config, RobertaConfig, T5Config, ViTConfig

import zoo.models
from zoo.models import (
    modeling_albert,
    modeling_bert,
    modeling_distilbert,
    modeling_gpt2,
    modeling_roberta,
    modeling_t5,
    modeling_vit,
)

VOCAB, LENGTH = 67, 11

# nothing at its default that could hide a hard-coded value
CONFIGS = {
    "bert": BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=28,
        hidden_act="gelu_new", max_position_embeddings=40, type_vocab_size=3, layer_norm_eps=1e-5, pad_token_id=1,
        num_labels=5,
    ),
    "roberta": RobertaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=28,
        hidden_act="gelu_new", max_position_embeddings=40, type_vocab_size=3, layer_norm_eps=1e-5, pad_token_id=1,
        num_labels=5,
    ),
    # two layers that run twice each, in groups of one that do not divide the five runs
    "albert": AlbertConfig(
        vocab_size=VOCAB, embedding_size=10, hidden_size=24, num_hidden_layers=5, num_hidden_groups=2,
        inner_group_num=2, num_attention_heads=4, intermediate_size=28, hidden_act="gelu_new",
        max_position_embeddings=40, type_vocab_size=3, layer_norm_eps=1e-5, pad_token_id=1, num_labels=5,
    ),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB, dim=24, n_layers=3, n_heads=4, hidden_dim=28, activation="relu", max_position_embeddings=40,
        pad_token_id=1, num_labels=5,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=4, n_inner=28, n_positions=40, layer_norm_epsilon=1e-4,
        activation_function="relu", scale_attn_by_inverse_layer_idx=True, bos_token_id=2, eos_token_id=2,
        pad_token_id=1, num_labels=5,
    ),
    "t5": T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=7, d_ff=28, num_layers=3, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=10, layer_norm_epsilon=1e-4,
        decoder_start_token_id=1, pad_token_id=1, eos_token_id=2, feed_forward_proj="gated-gelu", num_labels=5,
    ),
    # nine patches and the class token
    "vit": ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=28, hidden_act="gelu_new",
        layer_norm_eps=1e-5, image_size=12, patch_size=4, encoder_stride=4, num_channels=2, qkv_bias=False,
        pooler_output_size=20, pooler_act="sigmoid", num_labels=5,
    ),
}  # fmt: skip
MODULES = {
    "bert": modeling_bert, "roberta": modeling_roberta, "albert": modeling_albert, "distilbert": modeling_distilbert,
    "gpt2": modeling_gpt2, "t5": modeling_t5, "vit": modeling_vit,
}  # fmt: skip
WITH_SEGMENTS = ("bert", "roberta", "albert")
# official class names; the native one is the same with Zoo before it
HEADS = [
    ("bert", "BertModel"),
    ("bert", "BertForPreTraining"),
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForNextSentencePrediction"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForMultipleChoice"),
    ("bert", "BertForTokenClassification"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertLMHeadModel"),
    ("roberta", "RobertaModel"),
    ("roberta", "RobertaForMaskedLM"),
    ("roberta", "RobertaForCausalLM"),
    ("roberta", "RobertaForSequenceClassification"),
    ("roberta", "RobertaForMultipleChoice"),
    ("roberta", "RobertaForTokenClassification"),
    ("roberta", "RobertaForQuestionAnswering"),
    ("albert", "AlbertModel"),
    ("albert", "AlbertForPreTraining"),
    ("albert", "AlbertForMaskedLM"),
    ("albert", "AlbertForSequenceClassification"),
    ("albert", "AlbertForMultipleChoice"),
    ("albert", "AlbertForTokenClassification"),
    ("albert", "AlbertForQuestionAnswering"),
    ("distilbert", "DistilBertModel"),
    ("distilbert", "DistilBertForMaskedLM"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("distilbert", "DistilBertForMultipleChoice"),
    ("distilbert", "DistilBertForTokenClassification"),
    ("distilbert", "DistilBertForQuestionAnswering"),
    ("gpt2", "GPT2Model"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("gpt2", "GPT2ForTokenClassification"),
    ("gpt2", "GPT2ForQuestionAnswering"),
    ("t5", "T5Model"),
    ("t5", "T5EncoderModel"),
    ("t5", "T5ForConditionalGeneration"),
    ("t5", "T5ForSequenceClassification"),
    ("t5", "T5ForTokenClassification"),
    ("t5", "T5ForQuestionAnswering"),
    ("vit", "ViTModel"),
    ("vit", "ViTForImageClassification"),
    ("vit", "ViTForMaskedImageModeling"),
]
SKELETON = [
    ("bert", "BertForSequenceClassification"),
    ("gpt2", "GPT2LMHeadModel"),
    ("t5", "T5ForConditionalGeneration"),
]

PADDING = {
    "none": [[1] * 11, [1] * 11, [1] * 11],
    "right": [[1] * 11, [1] * 6 + [0] * 5, [1] * 1 + [0] * 10],
    "left": [[1] * 11, [0] * 5 + [1] * 6, [0] * 9 + [1] * 2],
    "holes": [[1] * 11, [1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]],
    "an all-pad row": [[1] * 11, [0] * 11, [1] * 4 + [0] * 7],
}


def native_class(family: str, official: str):
    return getattr(MODULES[family], f"Zoo{official}")


def config_for(family: str, official: str, **changes):
    fields = CONFIGS[family].to_dict()
    if official.endswith("QuestionAnswering"):
        fields.pop("num_labels", None)
        fields["id2label"], fields["label2id"] = {0: "start", 1: "end"}, {"start": 0, "end": 1}
    if official == "AlbertForPreTraining":
        # its sentence order has as many classes as the config has labels
        fields["id2label"], fields["label2id"] = {0: "kept", 1: "swapped"}, {"kept": 0, "swapped": 1}
    if official in ("BertLMHeadModel", "RobertaForCausalLM"):
        fields["is_decoder"] = True
    return type(CONFIGS[family]).from_dict({**fields, **changes})


def randomise(model, seed: int = 0):
    """Every parameter N(0, 0.1), norms and biases included; norms around 1, so that outputs are not tiny."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(1.0 if name.endswith("weight") else 0.0)
    return model


def make_pair(family: str, official: str, directory, attn_implementation: str = "sdpa", **changes):
    """(official model, native model) in eval mode, the native one opened from the official one's directory."""
    model = randomise(getattr(transformers, official)(config_for(family, official, **changes)))
    model.save_pretrained(directory)
    model.set_attn_implementation(attn_implementation)
    native = native_class(family, official).from_pretrained(directory, attn_implementation=attn_implementation)
    return model.eval(), native.eval()


def make_inputs(family: str, official: str, padding: str = "right", labels: bool = False, seed: int = 1) -> dict:
    """A batch for a head: ids, mask, segments where the family has them, and labels that ignore padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int, low: int = 0):
        return torch.randint(low, high, shape, generator=generator)

    mask = torch.tensor(PADDING[padding])
    if family == "vit":
        return _images(official, mask, labels, draw, generator)
    inputs = {"input_ids": draw(VOCAB, 3, LENGTH, low=3), "attention_mask": mask}
    inputs["input_ids"][mask == 0] = 1
    if family in WITH_SEGMENTS:
        inputs["token_type_ids"] = draw(3, 3, LENGTH)
    if official.endswith("MultipleChoice"):
        inputs = {name: torch.stack([x, x.flip(0)], 1) for name, x in inputs.items()}
    if official == "T5ForSequenceClassification":
        # one end token in each text, its last
        last = (torch.arange(LENGTH) * mask).argmax(1)
        inputs["input_ids"][torch.arange(3), last] = 2
    elif family == "t5" and official not in ("T5EncoderModel", "T5ForTokenClassification"):
        inputs["decoder_input_ids"] = draw(VOCAB, 3, 7, low=3)
    if labels:
        inputs |= make_labels(official, inputs, draw)
    return inputs


def _images(official: str, mask: torch.Tensor, labels: bool, draw, generator) -> dict:
    """Images of nine patches, of which a mask drops some; the class token stays."""
    mask = mask[:, :10].clone()
    mask[:, 0] = 1
    inputs = {"pixel_values": torch.randn(3, 2, 12, 12, generator=generator), "attention_mask": mask}
    if official.endswith("MaskedImageModeling"):
        # what is made of a dropped patch means nothing
        return inputs | {"attention_mask": torch.ones_like(mask), "bool_masked_pos": draw(2, 3, 9).bool()}
    return inputs | ({"labels": draw(5, 3)} if labels and official.endswith("ImageClassification") else {})


def make_labels(official: str, inputs: dict, draw) -> dict:
    mask = inputs["attention_mask"]
    if official.endswith(("ForMaskedLM", "ForPreTraining", "ForCausalLM", "LMHeadModel")):
        token_labels = draw(VOCAB, 3, LENGTH).masked_fill(mask == 0, -100)
        if official.endswith(("LMHeadModel", "ForCausalLM")):
            # a real token behind padding is no target when packed
            behind_padding = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1) == 0
            token_labels[behind_padding] = -100
        pair = {"BertForPreTraining": "next_sentence_label", "AlbertForPreTraining": "sentence_order_label"}
        return {"labels": token_labels} | ({pair[official]: draw(2, 3)} if official in pair else {})
    if official.endswith("TokenClassification"):
        return {"labels": draw(5, 3, LENGTH).masked_fill(mask == 0, -100)}
    if official.endswith("QuestionAnswering"):
        # 0 and the last slot are real only in rows without padding there
        return {"start_positions": torch.tensor([4, 0, 0]), "end_positions": torch.tensor([9, 0, 0])}
    if official.endswith("ConditionalGeneration"):
        labels = draw(VOCAB, 3, 7)
        labels[1, 4:] = -100
        return {"labels": labels}
    classes = {"NextSentencePrediction": 2, "SequenceClassification": 5, "MultipleChoice": 2}
    count = next((n for suffix, n in classes.items() if official.endswith(suffix)), None)
    return {} if count is None else {"labels": draw(count, 3)}


def rows_entering(model, call) -> dict[str, int]:
    """How many rows enter each linear layer and norm while `call()` runs."""
    rows: dict[str, int] = {}
    kinds = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.RMSNorm)

    def count(name):
        def hook(module, args):
            rows[name] = rows.get(name, 0) + args[0].numel() // args[0].shape[-1]

        return hook

    hooks = [m.register_forward_pre_hook(count(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return rows


assert zoo.models.FAMILIES.keys() == MODULES.keys()
