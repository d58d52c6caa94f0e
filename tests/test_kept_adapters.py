"""Several adapters of one base: listed, switched, combined; each answers as it does alone."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PeftConfig

from tests.test_adapter_runs import SHORT, as_before, bases, writing_recipe  # noqa: F401 (a fixture)
from tests.tiny_run import make_recipe
from zoo import adapter_list, hub, merging, prediction
from zoo.errors import UserError
from zoo.model_directory import open_beside, open_finished
from zoo.train import run

TEXTS = ["wheat shipments rose", "the bank cut its rate"]
SUMMARIES = {"type": "summarization", "max_length": 32, "max_target_length": 8}


@pytest.fixture(scope="module")
def kept(bases, tmp_path_factory):  # noqa: F811
    """Three adapters of a T5: two by LoRA, of other ranks, layers and scales, and one by IA3."""
    folder = tmp_path_factory.mktemp("kept")
    sections = {
        "one": {"r": 4},
        "two": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "fc1"]},
        "three": {"type": "ia3"},
    }
    for number, (name, lora) in enumerate(sections.items()):
        recipe = writing_recipe(bases / "t5", bases, SUMMARIES, lora)
        run(recipe.model_copy(update={"train": recipe.train | {"seed": number}}), folder / name)
    return folder


def test_all_are_listed(kept):
    found = adapter_list.run(kept)
    assert [(one["directory"], one["type"], one["r"]) for one in found] == [
        (str(kept / "one"), "lora", 4), (str(kept / "three"), "ia3", None), (str(kept / "two"), "lora", 2)
    ]  # fmt: skip
    assert len({one["base"] for one in found}) == 1 and found[2]["targets"] == ["fc1", "q_proj"]
    assert all(one["metrics"]["test_loss"] > 0 and one["bytes"] > 500 for one in found)
    assert adapter_list.run(kept / "one") == found[:1] and adapter_list.run(kept / "one" / "checkpoints") == []
    with pytest.raises(UserError, match="no such directory"):
        adapter_list.run(kept / "four")


def logits(finished) -> torch.Tensor:
    batch = finished.processor(TEXTS, return_tensors="pt", padding=True)
    finished.activate()
    with torch.no_grad():
        return finished.model(**batch, decoder_input_ids=torch.tensor([[0, 5, 9], [0, 7, 3]])).logits


def test_switching_leaves_each_as_it_is_alone(kept):
    alone = {name: logits(open_finished(kept / name)) for name in ("one", "two")}
    first = open_finished(kept / "one")
    together = {"one": first, "two": open_beside(first, kept / "two", "two")}
    for _ in range(2):
        for name, finished in together.items():
            assert torch.equal(logits(finished), alone[name]), name
    assert not torch.allclose(alone["one"], alone["two"], atol=1e-4)
    with pytest.raises(UserError, match="three: peft puts only adapters of one method into a model, and its is ia3"):
        open_beside(first, kept / "three", "three")
    assert torch.equal(logits(first), alone["one"])


def test_each_answers_in_turn(kept):
    answers = list(prediction.run(kept / "one", TEXTS, adapters=[kept / "two"]))
    assert [answer["adapter"] for answer in answers] == [str(kept / "one")] * 2 + [str(kept / "two")] * 2
    for name, own in (("one", answers[:2]), ("two", answers[2:])):
        assert [one["predicted"] for one in prediction.run(kept / name, TEXTS)] == [one["predicted"] for one in own]
    assert [line for line in prediction.in_lines(answers) if line.endswith(":")] == [
        f"{kept / 'one'}:",
        f"{kept / 'two'}:",
    ]


@pytest.mark.usefixtures("online", "no_waiting")
def test_an_adapter_is_pushed_and_pulled(server, kept, tmp_path):
    hub.push(kept / "one", "zoo/kept-one")
    fetched = huggingface_hub.snapshot_download("zoo/kept-one", local_dir=tmp_path / "fetched")
    as_before(Path(fetched))
    pulled = PeftConfig.from_pretrained("zoo/kept-one", cache_dir=str(tmp_path / "cache"))
    assert (pulled.r, pulled.base_model_name_or_path) == (4, str(open_finished(kept / "one").recipe.model.path))


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_combined_is_the_weighted_sum(kept, way, tmp_path):
    report = merging.combine([kept / "one", kept / "two"], [0.7, 0.5], tmp_path / "both", way)
    assert report["r"] == {"cat": 6, "svd": 4}[way] and report["test_loss"] > 0
    as_before(tmp_path / "both")
    opened = {name: open_finished(path) for name, path in (("both", tmp_path / "both"), ("one", kept / "one"))}
    opened["two"] = open_finished(kept / "two")
    changes = {
        name: {
            key: layer.get_delta_weight("default")
            for key, layer in one.model.named_modules()
            if "default" in getattr(layer, "lora_A", {})
        }
        for name, one in opened.items()
    }
    assert changes["both"].keys() == changes["one"].keys() | changes["two"].keys()
    for key, found in changes["both"].items():
        wanted = sum(weight * changes[n][key] for n, weight in (("one", 0.7), ("two", 0.5)) if key in changes[n])
        # svd has the rank of the larger: what is beyond it goes
        off = (found - wanted).norm() / wanted.norm()
        assert off < (1e-5 if way == "cat" else 0.7), key
    if way == "cat":
        assert "`cat` of 0.7 x one, 0.5 x two" in (tmp_path / "both" / "README.md").read_text()
        assert merging.run(tmp_path / "both", tmp_path / "whole", texts=3)["difference"] < 1e-5


def test_what_is_not_combined(kept, tiny_bert, r8, tmp_path):
    for name, lora in (("dora", {"r": 2, "use_dora": True}), ("lora", {"r": 2}), ("again", {"r": 2})):
        run(make_recipe(tiny_bert, r8, SHORT).model_copy(update={"lora": lora}), tmp_path / name)
    for directories, says in (
        (["one"], "two directories or more"),
        (["three", "three"], "ia3 is no product of two matrices"),
        (["one", tmp_path / "lora"], "only if task.type, model.implementation and quantize"),
        ([tmp_path / "dora", tmp_path / "lora"], "lengths do not add"),
        # each has a head of its own
        ([tmp_path / "lora", tmp_path / "again"], "refused by peft: .*modules_to_save"),
    ):
        with pytest.raises(UserError, match=says):
            merging.combine([kept / one for one in directories], [1.0] * len(directories), tmp_path / "sum")
    with pytest.raises(UserError, match=r"refused by peft: .*combination_type"):
        merging.combine([kept / "one", kept / "two"], [1.0, 1.0], tmp_path / "sum", "summ")
    assert not (tmp_path / "sum").exists()
    record = json.loads((kept / "two" / "base.json").read_text())
    (kept / "two" / "base.json").write_text(json.dumps(record | {"sha256": "0"}))
    with pytest.raises(UserError, match="its adapter is of other weights"):
        list(prediction.run(kept / "one", TEXTS, adapters=[kept / "two"]))
