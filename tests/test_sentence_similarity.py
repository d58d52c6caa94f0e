"""Sentence embeddings: the loss, the ranks and the finished directory against those of sentence-transformers."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoTokenizer, BartConfig, BertModel, MPNetConfig, T5Config

import zoo.evaluation
import zoo.prediction
from tests.conftest import read_r8
from tests.test_runs import read_lines, read_metrics, recipe, write_jsonl
from tests.tiny_run import differing, weights, without_time
from zoo.baselines import run as baseline
from zoo.errors import UserError
from zoo.hub import contents
from zoo.loading import load_model, load_processor
from zoo.model_directory import open_finished
from zoo.preview import run as preview
from zoo.recipe_loading import load_recipe
from zoo.sections import ModelSection, TaskSection
from zoo.tasks import task_of
from zoo.tasks.retrieval import ranks, retrieval, text_id
from zoo.tasks.sentence_similarity import POOLINGS, contrast
from zoo.train import run

KIND = "sentence-similarity"
TEXTS = [text for text, _ in read_r8("test", 12)]


def pairs(split: str, count: int) -> list[dict]:
    """The beginning of a text and the rest of it."""
    words = [text.split() for text, _ in read_r8(split, count)]
    return [{"text": " ".join(w[:8]), "text_pair": " ".join(w[8:24])} for w in words if len(w) > 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split, count in (("train", 60), ("test", 30)):
        write_jsonl(folder / f"{split}.jsonl", pairs(split, count))
    return folder


def data(folder) -> dict:
    return {"path": str(folder), "files": {split: f"{split}.jsonl" for split in ("train", "test")}}


@pytest.fixture(scope="module")
def directory(tiny_bert, folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("embeddings") / "run"
    run(recipe(tiny_bert, {"type": KIND}, data(folder), metric_for_best_model="mrr@10"), directory)
    return directory


def start(directory) -> SentenceTransformer:
    return SentenceTransformer(str(directory), device="cpu")


# The loss


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("texts", [2, 3])
def test_the_loss_is_that_of_sentence_transformers(texts, minilm_like):
    vectors, ids = unit(6, texts, 16), torch.arange(6 * texts).view(6, texts)
    theirs = MultipleNegativesRankingLoss(minilm_like, scale=20.0)
    expected = theirs.compute_loss_from_embeddings([*vectors.transpose(0, 1)], None)
    assert contrast(vectors, ids, 0.05).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.fixture(scope="module")
def minilm_like(directory) -> SentenceTransformer:
    return start(directory)


def test_equal_texts_are_not_told_from_each_other():
    vectors = unit(4, 3, 8)
    # rows 0 and 1 have one positive, 2 and 3 one anchor, the negative of 0 is its positive again, that of 3 its anchor
    ids = torch.tensor([[0, 10, 10], [1, 10, 21], [2, 12, 22], [2, 13, 2]])
    told_from = [
        [vectors[2, 1], vectors[3, 1], vectors[1, 2], vectors[2, 2], vectors[3, 2]],
        [vectors[2, 1], vectors[3, 1], vectors[1, 2], vectors[2, 2], vectors[3, 2]],
        [vectors[0, 1], vectors[1, 1], vectors[0, 2], vectors[1, 2], vectors[2, 2]],
        [vectors[0, 1], vectors[1, 1], vectors[0, 2], vectors[1, 2], vectors[2, 2]],
    ]
    losses = []
    for row, others in zip(vectors, told_from, strict=True):
        scores = torch.stack([row[1], *others]) @ row[0] / 0.1
        losses.append(scores.logsumexp(0) - scores[0])
    assert contrast(vectors, ids, 0.1).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert contrast(vectors[:1, :2], ids[:1, :2], 0.1) == 0.0, "a row alone has nothing to be told from"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POOLINGS)
def test_padding_is_not_pooled(name, side):
    texts = [torch.randn(length, 5) for length in (3, 7, 1)]
    alone = torch.cat([POOLINGS[name](text[None], torch.ones(1, len(text))) for text in texts])
    padded, mask = torch.full((3, 7, 5), 99.0), torch.zeros(3, 7, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(7 - len(text), 7) if side == "left" else slice(0, len(text))
        padded[row, place], mask[row, place] = text, 1
    torch.testing.assert_close(POOLINGS[name](padded, mask), alone)
    expected = {"mean": texts[1].mean(0), "max": texts[1].amax(0), "cls": texts[1][0]}[name]
    torch.testing.assert_close(alone[1], expected)


# Ranks


def test_ranks_by_hand():
    def at(*degrees):
        return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    # anchors at 0, 90, 0 and 40 degrees; the third is the first again, with another text of its own
    ids = np.array([[1, 11], [2, 12], [1, 13], [3, 14]])
    candidates, of = at(10, 50, 60, 45, 10, 41), np.array([11, 12, 13, 14, 11, 3])
    # the second: 60 is nearer to 90 than 50; the fourth: the candidate at 41 is the anchor itself
    assert list(ranks(at(0, 90, 0, 40), candidates, ids, of)) == [1, 2, 1, 1]
    # all alike: nothing is found
    assert list(ranks(at(0, 0, 0, 0), at(0, 0, 0, 0), ids[[0, 1, 3, 3]], ids[[0, 1, 3, 3], 1])) == [3, 3, 3, 3]
    assert retrieval([1, 4, 11, 2], np.array([0.5, 0.7, 0.3, 0.1])) == pytest.approx(
        {"accuracy@1": 0.25, "mrr@10": (1 + 1 / 4 + 1 / 2) / 4, "mean_cosine": 0.4}
    )


# A run


def test_what_a_run_leaves_is_what_sentence_transformers_finds(directory, folder, minilm_like):
    rows = read_lines(folder / "test.jsonl")
    queries, corpus = ({str(n): row[role] for n, row in enumerate(rows)} for role in ("text", "text_pair"))
    found = InformationRetrievalEvaluator(queries, corpus, {n: {n} for n in queries}, accuracy_at_k=[1])(minilm_like)
    metrics = read_metrics(directory)
    for name in ("accuracy@1", "mrr@10"):
        assert metrics[f"test_{name}"] == pytest.approx(found[f"cosine_{name}"], abs=1e-6)
    assert 1 / len(rows) < metrics["test_mrr@10"] < 1
    first, second = (minilm_like.encode([row[role] for row in rows]) for role in ("text", "text_pair"))
    assert metrics["test_mean_cosine"] == pytest.approx((first * second).sum(-1).mean(), abs=1e-5)
    again = zoo.evaluation.run(directory)
    names = [f"test_{name}" for name in ("loss", "accuracy@1", "mrr@10", "mean_cosine")]
    assert [again[name] for name in names] == pytest.approx([metrics[name] for name in names], abs=1e-6)
    records = read_lines(directory / "predictions.jsonl")
    assert np.mean([record["rank"] == 1 for record in records]) == pytest.approx(metrics["test_accuracy@1"])
    assert [record["cosine"] for record in records] == pytest.approx((first * second).sum(-1).tolist(), abs=1e-5)


def training_vectors(directory, texts: list[str]) -> torch.Tensor:
    """As the loss sees them: two a row, in one padded batch."""
    finished = open_finished(directory)
    rows = {"text": texts[::2], "text_pair": texts[1::2], "row": list(range(len(texts) // 2))}
    encoded = finished.task.encode(finished.processor, finished.recipe.task)(rows)
    collate = finished.task.collate(finished.processor, finished.recipe.task)
    batch = collate([{name: values[n] for name, values in encoded.items()} for n in range(len(texts) // 2)])
    assert batch["input_ids"].shape[:2] == (len(texts) // 2, 2) and batch.pop("row").tolist() == rows["row"]
    with torch.no_grad():
        loss, vectors = finished.task.learn(finished.recipe.task)(finished.model.eval(), batch)
    assert loss.item() > 0 and math.isfinite(loss.item())
    return vectors.flatten(0, 1)


def same_vectors(directory, kind: str) -> None:
    theirs = start(directory)
    assert type(theirs[0].model).__name__ == kind and theirs.max_seq_length == 32
    expected = theirs.encode(TEXTS)
    assert np.abs(np.linalg.norm(expected, axis=-1) - 1).max() < 1e-6 and len({*map(len, TEXTS)}) > 6
    ours = [answer["embedding"] for answer in zoo.prediction.run(directory, TEXTS)]
    assert np.abs(np.array(ours) - expected).max() < 1e-6
    assert np.abs(training_vectors(directory, TEXTS).numpy() - expected).max() < 1e-6
    assert np.abs(expected - expected[0]).max() > 1e-3, "texts differ"


def test_a_run_that_was_killed_while_it_was_moved_into_place(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "run")
    for name in ("metrics.json", "model.safetensors", "modules.json"):
        (copy / name).unlink()
    run(load_recipe(str(copy / "recipe.yaml")), copy, resume=True)
    assert without_time(read_metrics(copy)) == without_time(read_metrics(directory))
    assert not differing(weights(copy), weights(directory)) and (copy / "1_Pooling" / "config.json").is_file()


def test_a_native_bert_is_pooled_as_sentence_transformers_pools_it(directory):
    same_vectors(directory, "BertModel")
    assert type(BertModel.from_pretrained(directory)).__name__ == "BertModel"
    names = {file.relative_to(directory).as_posix() for file in contents(directory)}
    assert {"modules.json", "1_Pooling/config.json", "model.safetensors", "README.md"} <= names
    assert not any("checkpoint" in name for name in names)


STARTS = {
    "cls, with hard negatives": ("BertModel", {"pooling": "cls"}, {"implementation": "official"}),
    "T5's encoder": ("T5EncoderModel", {"pooling": "max"}, {
        "config": T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4).to_diff_dict(),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_other_encoders(name, tiny_bert, folder, tmp_path, monkeypatch):
    kind, task, model = STARTS[name]
    for split in ("train", "test"):
        rows = read_lines(folder / f"{split}.jsonl")
        if "negatives" in name:
            rows = [row | {"negative": rows[n - 3]["text_pair"]} for n, row in enumerate(rows)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    train = {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "gradient_accumulation_steps": 3, "learning_rate": 1e-9}
    made = recipe(tiny_bert, {"type": KIND, **task}, data(tmp_path), **train)
    beginning = {"path": str(tiny_bert)} if "config" not in model else {"tokenizer": str(tiny_bert)}
    section = type(made.model).model_validate({**beginning, **model})
    run(made.model_copy(update={"model": section}), tmp_path / "run")
    same_vectors(tmp_path / "run", kind)
    metrics = read_metrics(tmp_path / "run")
    assert 0 < metrics["test_mrr@10"] <= 1
    if "negatives" in name:
        # to random weights all sixteen texts of a batch are as near; a step is the mean of three batches
        assert metrics["train_loss"] == pytest.approx(math.log(16), rel=0.25)
    code = (tmp_path / "run" / "README.md").read_text().split("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "run")
    exec(code, given := {})
    assert np.abs(given["vectors"].numpy() - start(".").encode(given["texts"])).max() < 1e-6


def test_encoders_that_the_text_encoding_class_does_not_know(tiny_bert):
    config = MPNetConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    section = ModelSection.model_validate(
        {"config": config.to_diff_dict(), "tokenizer": str(tiny_bert), "implementation": "official"}
    )
    model = load_model(section, "AutoModelForTextEncoding", processor=load_processor(section, "tokenizer"))
    assert type(model).__name__ == "MPNetModel"
    bart = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16).to_diff_dict()  # fmt: skip
    section = section.model_copy(update={"config": bart})
    model = load_model(section, "AutoModelForTextEncoding", processor=load_processor(section, "tokenizer"))
    chosen = TaskSection.model_validate({"type": KIND})
    with pytest.raises(UserError, match="BartModel has a decoder"):
        task_of(chosen).check(chosen, model)


# Answers


def test_answers(directory, tmp_path):
    pair = {"text": "oil prices rose", "text_pair": "the price of oil"}
    (answer,) = zoo.prediction.run(directory, file=write_jsonl(tmp_path / "pair.jsonl", [pair]))
    expected = start(directory).encode(list(pair.values()))
    assert answer["predicted"] == pytest.approx(float(expected[0] @ expected[1]), abs=1e-6)
    assert np.abs(np.array([answer["embedding"], answer["embedding_pair"]]) - expected).max() < 1e-6
    assert list(zoo.prediction.in_lines([answer])) == [f"{answer['predicted']:.4f}  oil prices rose"]
    texts = ["oil prices rose", "wheat", "oil price rose"]
    lines = list(zoo.prediction.in_lines(zoo.prediction.run(directory, texts)))
    vectors = start(directory).encode(texts)
    likeness = vectors @ vectors.T - 2 * np.eye(3)
    for text, line, cosines in zip(texts, lines, likeness, strict=True):
        assert line == f"{cosines.max():.4f} {texts[cosines.argmax()]}  <-  {text}"
    assert list(zoo.prediction.in_lines(zoo.prediction.run(directory, ["oil"]))) == ["32 numbers (--json)  oil"]
    assert list(zoo.prediction.in_lines([])) == []


def test_the_card_runs(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    card = (directory / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card
    codes = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    assert len(codes) == 2 and "transformers import AutoModel" in codes[1]
    likeness = []
    for code in codes:
        capsys.readouterr()
        exec(code, {})
        said = capsys.readouterr().out
        likeness.append(eval(said[said.index("tensor") :], {"tensor": torch.tensor}))
    assert likeness[0].shape == (3, 3)
    torch.testing.assert_close(likeness[0], likeness[1], atol=2e-4, rtol=0)


def test_the_preview(tiny_bert, folder):
    (sample,) = preview(recipe(tiny_bert, {"type": KIND}, data(folder)), "test", rows=1)
    tokenizer, first = AutoTokenizer.from_pretrained(tiny_bert), read_lines(folder / "test.jsonl")[0]
    assert sample.keys() == {"row", "tokens"} and len(sample["tokens"]) == 2
    for tokens, text in zip(sample["tokens"], first.values(), strict=True):
        ids = tokenizer(text, truncation=True, max_length=32)["input_ids"]
        assert tokens[: len(ids)] == tokenizer.convert_ids_to_tokens(ids)


def test_the_baseline(tiny_bert, folder, tmp_path):
    rows = [{"text": f"{word} rose", "text_pair": f"more {word}"} for word in ("oil", "wheat", "copper", "gold")] * 3
    rows += [{"text": "none of them", "text_pair": "entirely else"}, {"text": "silver", "text_pair": "silver falls"}]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    found = baseline(recipe(tiny_bert, {"type": KIND}, data(tmp_path)))["TF-IDF"]
    # what shares no word with its own stands behind the five others
    assert found["accuracy@1"] == pytest.approx(13 / 14)
    assert found["mrr@10"] == pytest.approx((13 + 1 / 6) / 14) and 0 < found["mean_cosine"] < 1


# What is wrong


def test_refused(tiny_bert, folder, directory, tmp_path):
    def refused(task=None, train=None, rows=None, path=tiny_bert, **keys) -> str:
        where = folder
        if rows is not None:
            where = tmp_path / "rows"
            where.mkdir(exist_ok=True)
            for split in ("train", "test"):
                write_jsonl(where / f"{split}.jsonl", rows)
        with pytest.raises(UserError) as caught:
            run(recipe(path, {"type": KIND, **(task or {})}, data(where) | keys, **(train or {})), tmp_path / "run")
        return str(caught.value)

    some = pairs("train", 20)
    assert "batch_size: 1, but a text is told from others" in refused(train={"per_device_train_batch_size": 1})
    assert "train.label_smoothing_factor: there are no labels" in refused(train={"label_smoothing_factor": 0.1})
    assert "does not measure 'accuracy'; did you mean accuracy@1" in refused(
        train={"metric_for_best_model": "accuracy"}
    )
    assert "train row 3: the text in column 'text_pair' is empty" in refused(
        rows=[row | ({"text_pair": " "} if n == 3 else {}) for n, row in enumerate(some)]
    )
    assert "data.columns.text_pair: required" in refused(rows=[{"text": row["text"]} for row in some])
    assert "data: a split of one row" in refused(rows=some[:8], validation=0.1)
    assert "task.max_length: 65, but the model has 64 positions" in refused({"max_length": 65})
    assert f"task.pooling: cls, but model {directory} pools by mean" in refused({"pooling": "cls"}, path=directory)
    dense = [{"path": "", "type": "sentence_transformers.models.Transformer"},
             {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]  # fmt: skip
    copy = tmp_path / "dense"
    copy.mkdir()
    for file in tiny_bert.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "modules.json").write_text(json.dumps(dense))
    assert "a further module, Dense, which is not learned" in refused(path=copy)
    (copy / "modules.json").write_text("{")
    assert "modules.json cannot be read" in refused(path=copy)
    (copy / "modules.json").write_text('[{"name": "0"}]')
    assert "modules.json is not one of sentence-transformers" in refused(path=copy)


def test_a_tokenizer_that_cannot_pad(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.pad_token = None
    section = TaskSection.model_validate({"type": KIND})
    with pytest.raises(UserError, match="no padding token"):
        task_of(section).collate(tokenizer, section)


def test_keys():
    def refused(name: str, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load_recipe(name, overrides)
        return str(caught.value)

    windows = "windows are pooled by mean or max"
    assert windows in refused("bert/finetune-topics", "task.stride=8", "task.pooling=cls")
    assert "nothing to pool without windows" in refused("bert/finetune-topics", "task.pooling=max")
    assert "task.temperature" in refused("bert/embed-news", "task.temperature=0")
    assert "text-classification does not read it" in refused("bert/finetune-topics", "task.temperature=0.1")
    assert load_recipe("bert/embed-news", ["task.pooling=cls"]).task.pooling == "cls"
    assert text_id("oil") == text_id("oil") != text_id("oil ") and 0 <= text_id("oil") < 2**63
