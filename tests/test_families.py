"""Recipes on the families beside BERT: trained, saved in the official form, evaluated and asked again."""

import shutil

import pytest
import transformers
from transformers import AlbertConfig, AutoTokenizer, DistilBertConfig, GPT2Config, RobertaConfig, T5Config

import zoo.evaluation
import zoo.prediction
from tests.test_runs import RUNS, files, recipe
from zoo.errors import UserError
from zoo.train import run

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "roberta": RobertaConfig(**SIZE, max_position_embeddings=66),
    "albert": AlbertConfig(**SIZE, embedding_size=16, max_position_embeddings=64),
    "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "t5": T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, decoder_start_token_id=0),
}
BASES = {
    "roberta": "RobertaModel", "albert": "AlbertModel", "distilbert": "DistilBertModel", "gpt2": "GPT2Model",
    "t5": "T5Model",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tiny_bert, tmp_path_factory):
    """An official one of each family, with random weights and the WordPiece tokenizer of the tiny BERT."""
    folder = tmp_path_factory.mktemp("families")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for family, config in CONFIGS.items():
        fields = config.to_dict() | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        # T5 classifies at the end token, of which a text has one
        fields |= {"bos_token_id": None, "eos_token_id": tokenizer.sep_token_id if family == "t5" else None}
        transformers.set_seed(0)
        getattr(transformers, BASES[family])(type(config).from_dict(fields)).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_text_classification(checkpoints, topics_run, tmp_path, family):
    data = files(topics_run.parent, "topics")
    metrics = run(recipe(checkpoints / family, RUNS["one label"][0], data, max_steps=4), tmp_path / "run")
    assert zoo.evaluation.run(tmp_path / "run")["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-5)
    official = BASES[family].replace("Model", "ForSequenceClassification")
    model, info = getattr(transformers, official).from_pretrained(tmp_path / "run", output_loading_info=True)
    assert type(model).__name__ == official and not any(info.values())
    answer = next(zoo.prediction.run(tmp_path / "run", ["wheat shipments rose"]))
    (theirs,) = transformers.pipeline("text-classification", str(tmp_path / "run"), top_k=None)(
        ["wheat shipments rose"]
    )
    assert answer["probabilities"] == pytest.approx({one["label"]: one["score"] for one in theirs}, abs=1e-5)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in ("gpt2", "t5")])
def test_fill_mask(checkpoints, topics_run, tmp_path, family):
    for split in ("train", "test"):
        shutil.copyfile(topics_run.parent / f"topics-{split}.jsonl", tmp_path / f"plain-{split}.jsonl")
    metrics = run(
        recipe(checkpoints / family, RUNS["masked"][0], files(tmp_path, "plain"), max_steps=4), tmp_path / "run"
    )
    assert zoo.evaluation.run(tmp_path / "run")["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-5)


def test_robertas_positions_begin_behind_that_of_padding(checkpoints, topics_run, tmp_path):
    longer = {**RUNS["one label"][0], "max_length": 66}
    with pytest.raises(UserError, match=r"task.max_length: 66, but the model has 65 positions"):
        run(recipe(checkpoints / "roberta", longer, files(topics_run.parent, "topics"), max_steps=4), tmp_path / "run")
