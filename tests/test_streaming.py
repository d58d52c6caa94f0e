"""Streams: every row once a pass, the same order after a resume, and what is refused or fails."""

import json
from itertools import islice

import datasets
import pytest

import zoo.evaluation
from tests.conftest import read_r8
from tests.test_runs import recipe, write_jsonl
from tests.tiny_run import differing, events, weights
from zoo import train
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import RunError, UserError
from zoo.labels import LABEL_KINDS
from zoo.recipe_loading import load_recipe
from zoo.streaming import Stream

SHARDS = (40, 41, 42)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three files of numbered texts; the rows of the second and the third have words of their own."""
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for shard, rows in enumerate(SHARDS):
        texts = [f"text number {number + n}" for n in range(rows)]
        write_jsonl(folder / f"train-{shard}.jsonl", [{"text": text} for text in texts])
        number += rows
    return folder


def opened(place, /, roles=("text",), kind=None, **section):
    keys = {"path": str(place), "format": "json", "streaming": True, "validation": 5, "buffer_size": 7} | section
    return load_splits(DataSection.model_validate(keys), roles, 1, kind=LABEL_KINDS[kind] if kind else None)


def stream(splits, others=False, seed=1) -> Stream:
    return Stream(splits.train, lambda rows: rows.to_dict(), seed, True, others)


def test_each_pass_has_each_row_once_in_another_order(shards):
    splits = opened(shards)
    held_out = list(splits.validation["text"])
    assert held_out == [f"text number {n}" for n in range(5)] and splits.test is None
    rows = sum(SHARDS) - len(held_out)
    samples = list(islice(stream(splits), 2 * rows))
    first, second = ([sample["text"] for sample in samples[start : start + rows]] for start in (0, rows))
    assert sorted(first) == sorted(second) and len({*first, *held_out}) == sum(SHARDS)
    assert first != second and first != sorted(first)
    assert len({tuple(sample["draw"]) for sample in samples}) == len(samples), "no draw comes twice"
    assert [sample["text"] for sample in islice(stream(splits, seed=2), rows)] != first


@pytest.mark.parametrize("weights_", [[1.0], [0.25, 0.75]])
def test_it_goes_on_anywhere(shards, weights_):
    parts = [{"path": str(shards), "format": "json", "weight": weight} for weight in weights_]
    keys = {"path": None, "format": None, "mixture": parts} if len(parts) > 1 else {}
    splits = opened(shards, **keys)
    whole = list(islice(stream(splits), 300))
    for learned in (0, 1, 6, 7, 8, 50, 119, 200):
        before = stream(splits)
        read_ahead = list(islice(before, learned + 9))
        assert read_ahead == whole[: learned + 9]
        place = json.loads(json.dumps(before.place(learned)))
        after = stream(splits)
        after.go_on(place)
        assert list(islice(after, 300 - learned)) == whole[learned:]
    shares = sum(sample["draw"][2] for sample in whole) / len(whole)
    assert shares == pytest.approx(0.75 if len(parts) > 1 else 0, abs=0.08)


def test_another_text_is_of_another_row(shards):
    for sample in islice(stream(opened(shards), others=True), 200):
        assert sample["other"]["row"] != sample["row"]
    with pytest.raises(UserError, match="none of the 123 rows of train makes a sample"):
        next(iter(stream(opened(shards, buffer_size=1), others=True)))


def test_limit_and_labels(tmp_path):
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(40)]
    data = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["even", "odd"]))
    data.to_parquet(tmp_path / "train.parquet")
    splits = opened(tmp_path, ("text", "label"), "class", format="parquet", limit=20, validation=30)
    assert splits.labels == ["even", "odd"] and len(splits.validation) == 20
    assert {sample["text"] for sample in islice(stream(opened(tmp_path, format="parquet", limit=20)), 60)} == {
        f"text {n}" for n in range(5, 25)
    }
    write_jsonl(tmp_path / "words.jsonl", [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(40)])
    with pytest.raises(UserError, match="a stream is not read for its labels; declare them as a ClassLabel"):
        opened(tmp_path / "words.jsonl", ("text", "label"), "class")


@pytest.mark.parametrize("kind", ["class", "number"])
def test_blocks_that_are_held_out_or_have_one_label(tmp_path, kind):
    rows = [{"text": f"text {n}", "label": int(n > 14) if kind == "class" else n / 2} for n in range(22)]
    data = datasets.Dataset.from_list(rows)
    if kind == "class":
        data = data.cast_column("label", datasets.ClassLabel(names=["low", "high"]))
    data.to_parquet(tmp_path / "train.parquet")
    splits = opened(tmp_path, ("text", "label"), kind, format="parquet", validation=10, buffer_size=3)
    samples = list(islice(stream(splits), 24))
    assert {sample["text"] for sample in samples[:12]} == {f"text {n}" for n in range(10, 22)}
    assert splits.train.first(3)["text"] == ["text 10", "text 11", "text 12"], "what is held out is not train"


def test_the_first_rows_of_a_mixture_are_of_all_its_parts(shards):
    parts = [{"path": str(shards), "format": "json", "weight": weight} for weight in (0.3333333, 0.3333333, 0.3333333)]
    splits = opened(shards, path=None, format=None, mixture=parts)
    assert splits.train.first(9).num_rows == 9 and sum(splits.train.weights) == pytest.approx(1)
    assert len(list(islice(stream(splits), 20))) == 20


def test_a_text_that_is_alone_is_left_out_of_pairs(shards):
    # 40 rows, of which the last is a block of its own
    samples = list(islice(stream(opened(shards, files={"train": "train-0.jsonl"}, buffer_size=39), others=True), 90))
    assert all(sample["other"]["row"] != sample["row"] for sample in samples)


def test_bad_rows_and_ends(tmp_path, capsys):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {n}"} for n in range(12)] + [{"text": ""}])
    file = tmp_path / "train.jsonl"
    with pytest.raises(UserError, match="train row 12: the text in column 'text' is empty"):
        list(islice(stream(opened(file)), 20))
    samples = list(islice(stream(opened(file, drop_empty=True)), 14))
    assert len({sample["text"] for sample in samples}) == 7
    assert "13 rows are read; it begins again (pass 2)" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 13 rows of train makes a sample"):
        next(iter(stream(opened(file, drop_empty=True, validation=12))))
    with file.open("a") as damaged:
        damaged.write('{"text": ')
    with pytest.raises((RunError, UserError), match=r"the stream failed after|cannot be read"):
        list(islice(stream(opened(file, drop_empty=True)), 20))


def test_keys_that_make_no_sense_with_a_stream(tmp_path):
    base = "name: r\nmodel: {size: bert-base, tokenizer: t}\ntask: {type: fill-mask}\n"
    (tmp_path / "r.yaml").write_text(f"{base}data: {{path: d, streaming: true, test: 0.5, deduplicate: exact}}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.yaml"), ["train.dataloader_num_workers=2"])
    said = str(caught.value)
    assert "data.validation: 0.1 is a share, and a stream has no length; give a number of rows" in said
    assert "data.test: 0.5 is a share" in said and "data.deduplicate: a stream is not held in memory" in said
    (tmp_path / "r.yaml").write_text(f"{base}data: {{path: d, streaming: true, validation: 10}}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.yaml"), ["train.dataloader_num_workers=2"])
    said = str(caught.value)
    assert "train.max_steps: required with data.streaming" in said and "a stream is read ahead by a thread" in said


def test_a_run_on_a_stream_goes_on_as_if_nothing_had_happened(tiny_bert, tmp_path, monkeypatch):
    texts = [text for text, _ in read_r8("train", 60)]
    (tmp_path / "data").mkdir()
    for shard in range(3):
        write_jsonl(tmp_path / "data" / f"{shard}.jsonl", [{"text": text} for text in texts[shard::3]])
    data = {"path": str(tmp_path / "data"), "format": "json", "streaming": True, "validation": 6, "buffer_size": 8}
    made = recipe(
        tiny_bert,
        {"type": "fill-mask", "max_length": 32},
        data,
        **{"max_steps": 12, "save_steps": 4, "eval_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2},
    )
    train.run(made, tmp_path / "whole")
    save = train.ZooTrainer._save_checkpoint

    def killed(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train.ZooTrainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(made, tmp_path / "cut")
    with (tmp_path / "data" / "1.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"data: 1\.jsonl changed since .*checkpoint-8 was written \(hashes differ\)"):
        train.run(made, tmp_path / "cut", resume=True)
    write_jsonl(tmp_path / "data" / "1.jsonl", [{"text": text} for text in texts[1::3]])
    train.run(made, tmp_path / "cut", resume=True)
    assert differing(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == []
    assert events(tmp_path / "whole", "train") == events(tmp_path / "cut", "train")
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in texts[:6]])
    found = zoo.evaluation.run(tmp_path / "whole", "test", data=str(other))
    assert found["test_loss"] > 0
    with pytest.raises(UserError, match="this wants all rows of train at once"):
        zoo.evaluation.run(tmp_path / "whole", "train")
