"""task.packing: which documents share a row, what a batch of rows holds, and that the loss does not notice."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import find_packed_sequence_indices

from tests.conftest import read_r8
from tests.test_runs import write_jsonl
from tests.test_writing import GPT, recipe
from zoo.errors import UserError
from zoo.packed_rows import PackedRows, best_fit_decreasing, check_kept_apart, packed_batch
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.tasks.base import IGNORED
from zoo.train import run

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def test_the_best_fit_by_hand():
    # 6 and 5 each begin a row of 10; 4 fits the first exactly, 3 the second, 2 then fills that
    assert best_fit_decreasing([2, 5, 4, 6, 3], 10) == [[3, 2], [1, 4, 0]]
    # 3 fits where 3 is left as where 5 is: the fullest takes it
    assert best_fit_decreasing([7, 5, 3], 10) == [[0, 2], [1]]
    assert best_fit_decreasing([4, 4, 4], 4) == [[0], [1], [2]]


def test_every_document_is_in_one_row_and_rows_are_full():
    lengths = np.random.default_rng(0).integers(1, 40, 3000).tolist()
    rows = best_fit_decreasing(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(3000))
    fill = [sum(lengths[number] for number in row) for row in rows]
    assert max(fill) <= 64 and len(rows) <= 1.01 * sum(lengths) / 64
    assert rows == best_fit_decreasing(lengths, 64)


@pytest.fixture(scope="module")
def documents() -> Dataset:
    """Encoded: labels as token ids, the first of each included, which no row may keep."""
    draw = np.random.default_rng(1)
    ids = [draw.integers(5, 60, length).tolist() for length in (9, 4, 12, 3, 7, 1, 5)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "row": [10 + n for n in range(len(ids))]})


def test_a_batch_of_rows(documents):
    lengths = [len(ids) for ids in documents["input_ids"]]
    rows = PackedRows(documents, lengths, 16)
    batch = packed_batch([rows[n] for n in range(len(rows))], padding=3)
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache", "row"} and batch["use_cache"] is False
    assert sorted(batch["row"].tolist()) == documents["row"]
    apart = find_packed_sequence_indices(batch["position_ids"])
    found = []
    for ids, labels, where in zip(batch["input_ids"], batch["labels"], apart, strict=True):
        for number in where.unique().tolist():
            document = where == number
            assert labels[document][0] == IGNORED
            if (labels[document] == IGNORED).all() and (ids[document] == 3).all():
                continue  # what fills a row up
            assert labels[document][1:].tolist() == ids[document][1:].tolist()
            found.append(ids[document].tolist())
    assert sorted(found) == sorted(documents["input_ids"])
    assert rows.note == "packed into 3 rows, 85.4% of which is text"


def test_models_that_do_not_keep_texts_apart_are_refused(tiny_bert):
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    assert gpt.training
    check_kept_apart(gpt)
    assert gpt.training, "its dropout was off for a moment"
    gpt.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2 does not keep the texts of a batch apart"):
        check_kept_apart(gpt)
    decoder = BertLMHeadModel(BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True
    ))  # fmt: skip
    with pytest.raises(UserError, match="a text in BertLMHeadModel would see the one before it in its row"):
        check_kept_apart(decoder)


# A run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight texts, as they are and as chats."""
    place = tmp_path_factory.mktemp("packing")
    rows = [text.split() for text, _ in read_r8("train", 9)]
    cut = [words[: 4 + 3 * n] for n, words in enumerate(rows)]
    for split, chosen in (("train", cut[:8]), ("test", cut[8:]), ("validation", cut[8:])):
        texts = [{"text": " ".join(x), "prompt": " ".join(x[:3]), "completion": " ".join(x[3:])} for x in chosen]
        write_jsonl(place / f"{split}.jsonl", texts)
    return place


def first_step(tiny_bert, folder, directory, task: dict, size: int, accumulated: int) -> tuple[float, float]:
    """(loss, norm of the gradients) of one step over all rows, which learns nothing."""
    made = recipe(
        tiny_bert, folder, {**GPT, **NO_DROPOUT}, task, {}, max_steps=1, learning_rate=0.0, logging_steps=1,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, eval_strategy="no",
        save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip
    files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    made = made.model_copy(update={"data": made.data.model_copy(update={"files": files})})
    run(made, directory)
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    (values,) = [event["values"] for event in events if "grad_norm" in event["values"]]
    return values["loss"], values["grad_norm"]


@pytest.mark.parametrize("kind", ["text-generation", "instruction-tuning"])
def test_a_step_is_a_mean_over_its_tokens_however_it_is_made(tiny_bert, folder, tmp_path, kind):
    """In one batch, accumulated, or packed and accumulated: the loss is the official class's mean over all labels."""
    task = {"type": kind, "max_length": 56}
    whole, norm = first_step(tiny_bert, folder, tmp_path / "whole", task, 8, 1)
    directory = tmp_path / "whole"
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    section = TaskSection.model_validate(task)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = {name: [line[name] for line in lines] for name in lines[0]} | {"row": list(range(len(lines)))}
    encoded = task_of(section).encode(tokenizer, section)(rows)
    losses = []
    for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
        logits, wanted = model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
        one = torch.nn.functional.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED)
        losses += one[wanted != IGNORED].tolist()
    assert whole == pytest.approx(np.mean(losses), rel=1e-6)
    packs = len(best_fit_decreasing([len(ids) for ids in encoded["input_ids"]], 56))
    assert 2 < packs < 8
    for name, changes, size in (("accumulated", {}, 4), ("packed", {"packing": True}, -(-packs // 2))):
        made = first_step(tiny_bert, folder, tmp_path / name, task | changes, size, 2)
        assert made == pytest.approx((whole, norm), rel=1e-6), name


def test_pieces_of_a_text_share_no_label(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    section = TaskSection.model_validate({"type": "text-generation", "max_length": 5})
    rows = task_of(section).encode(tokenizer, section)(
        {"text": ["oil prices rose and shares fell", "oil"], "row": [0, 1]}
    )
    assert all(labels == [IGNORED, *ids[1:]] for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True))
    assert min(map(len, rows["input_ids"])) > 1 and all(a <= b for a, b in pairwise(rows["row"]))


def test_a_resumed_run_ends_as_one_that_was_never_stopped(tiny_bert, folder, tmp_path):
    task = {"type": "instruction-tuning", "max_length": 56, "packing": True}
    made = recipe(
        tiny_bert, folder, GPT, task, {}, max_steps=4, eval_steps=2, save_steps=2, per_device_train_batch_size=2
    )
    run(made, tmp_path / "run")
    whole = load_file(tmp_path / "run" / "model.safetensors")
    for name in ("metrics.json", "model.safetensors", "config.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    run(made, tmp_path / "run", resume=True)
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
