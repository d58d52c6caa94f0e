"""Masked image modelling: what is hidden, what it is measured on, a run, and what goes on from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import zoo.baselines
import zoo.evaluation
import zoo.prediction
import zoo.preview
from tests import test_images
from tests.commands import zoo as command
from tests.test_images import CLASSES, SIDE, VIT, as_pixels, fields, named
from tests.test_runs import read_lines, read_metrics
from tests.tiny_run import checkpoints, weights, without_time
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.loading import load_model, load_processor
from zoo.recipe import Recipe
from zoo.samples import WithDraws
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.tasks.masked_images import hidden_patches, hidden_pixels
from zoo.train import run
from zoo.trainer import ZooTrainer

TASK = "masked-image-modeling"
folder = test_images.folder  # the fixture


def section(**keys) -> TaskSection:
    return TaskSection.model_validate({"type": TASK, **keys})


def recipe(data: dict, task: dict | None = None, config: dict | None = None, **train) -> Recipe:
    made = fields(data, **train)
    made |= {
        "task": {"type": TASK, **(task or {})},
        "model": {"config": {**VIT, "encoder_stride": 4, **(config or {})}},
    }
    return Recipe.model_validate(made)


# What is hidden


@pytest.mark.parametrize(
    "side, patch, keys, squares, hidden",
    [
        # SimMIM's own, section 4.1.1: squares of 32 pixels
        (224, 16, {"mask_patch_size": 32}, 7, 30),
        (224, 16, {}, 14, 118),
        (16, 4, {"mask_ratio": 0.5}, 4, 8),
        (16, 4, {"mask_ratio": 0.01}, 4, 1),
        # 0.07 * 100 is more than 7 in floating point
        (40, 4, {"mask_ratio": 0.07}, 10, 7),
    ],
)
def test_the_exact_share_is_hidden_in_whole_squares(side, patch, keys, squares, hidden):
    chosen = section(**keys)
    square = chosen.mask_patch_size or patch
    found = set()
    for row in range(200):
        mask = hidden_patches(chosen, side, patch, [7, 0, row])
        whole = hidden_pixels(mask.unsqueeze(0), patch)[0, 0]
        assert whole.shape == (side, side)
        tiles = whole.view(squares, square, squares, square).transpose(1, 2).flatten(2).float().mean(-1)
        assert set(tiles.unique().tolist()) <= {0.0, 1.0} and int(tiles.sum()) == hidden
        found.add(tuple(tiles.flatten().tolist()))
    assert len(found) > 8, "rows hide different ones"


def test_each_square_is_hidden_as_often():
    masks = torch.stack([hidden_patches(section(mask_ratio=0.5), 16, 4, [7, 0, row]) for row in range(2000)])
    assert (masks.float().mean(0) - 0.5).abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_masks_are_a_function_of_the_draw(folder):
    augmenting = recipe(named(folder), {"augmentation": {"rotate": 20}})
    task, processor = task_of(augmenting.task), load_processor(augmenting.model, "image_processor")
    collate = task.collate(processor, augmenting.task, patch_size=4)
    splits = load_splits(augmenting.data, task.roles, 7, kind=task.labels)
    train, _ = encoded(splits.train, augmenting, task, processor, 7, training=True)
    evaluated, _ = encoded(splits.train, augmenting, task, processor, 8)
    assert isinstance(train, WithDraws) and not isinstance(evaluated, WithDraws)
    first = [train[n] for n in range(8)]
    batch, again = collate(first), collate(first[3:5])
    for name in ("pixel_values", "bool_masked_pos"):
        assert torch.equal(batch[name][3:5], again[name]), "the batch in which a row stands does not matter"
    train.set_epoch(1)
    other = collate([train[n] for n in range(8)])
    assert not torch.equal(other["bool_masked_pos"], batch["bool_masked_pos"])
    # as they are, and the same hidden for every seed
    plain = collate([evaluated[n] for n in range(8)])
    expected = [hidden_patches(augmenting.task, 224, 4, [0, 0, row]) for row in evaluated["row"][:8]]
    assert torch.equal(plain["bool_masked_pos"], torch.stack(expected))
    assert not torch.equal(plain["pixel_values"], batch["pixel_values"])


# A run


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("masked") / "run"
    run(recipe(named(folder), {"mask_ratio": 0.5}), directory)
    return directory


def test_a_finished_run_is_an_official_one(finished, folder):
    """And the metric is the mean distance of the hidden pixels, over all images."""
    model, info = transformers.AutoModelForMaskedImageModeling.from_pretrained(finished, output_loading_info=True)
    assert type(model) is transformers.ViTForMaskedImageModeling and not any(info.values())
    processor = transformers.AutoImageProcessor.from_pretrained(finished)
    rows = read_lines(folder / "named" / "test.jsonl")
    images = [Image.open(folder / "named" / row["image"]).convert("RGB") for row in rows]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[:, 0], pixels[:, 2]), "grey in all three channels"
    hidden = torch.stack([hidden_patches(section(mask_ratio=0.5), SIDE, 4, [0, 0, row]) for row in range(len(rows))])
    with torch.no_grad():
        made = model.eval()(pixels, bool_masked_pos=hidden)
    distances = (pixels - made.reconstruction).abs()[hidden_pixels(hidden, 4).expand_as(pixels)]
    metrics = read_metrics(finished)
    assert metrics["test_mae"] == pytest.approx(distances.mean().item(), abs=1e-5)
    assert metrics["test_mae"] == pytest.approx(made.loss.item(), abs=1e-5)
    assert metrics["test_loss"] == pytest.approx(metrics["test_mae"], abs=1e-6)
    assert zoo.evaluation.run(finished)["test_mae"] == pytest.approx(metrics["test_mae"], abs=1e-5)
    more = zoo.evaluation.run(finished, overrides=["task.mask_ratio=0.8"])
    assert more["test_mae"] != pytest.approx(metrics["test_mae"], abs=1e-5)


def test_predict(finished, folder, tmp_path):
    """The mean over the test rows is the metric, and of the pictures the visible part is the image's own."""
    answers = list(zoo.prediction.run(finished, file=folder / "named" / "test.jsonl", pictures=tmp_path / "made"))
    assert np.mean([answer["mae"] for answer in answers]) == pytest.approx(read_metrics(finished)["test_mae"], abs=1e-5)
    for answer, row in zip(answers, read_lines(folder / "named" / "test.jsonl"), strict=True):
        image = np.asarray(Image.open(folder / "named" / row["image"]).convert("RGB")).astype(int)
        seen, blank, whole = np.split(np.asarray(Image.open(answer["predicted"])).astype(int), 3, axis=1)
        hidden = hidden_pixels(hidden_patches(section(mask_ratio=0.5), SIDE, 4, [0, 0, answer["id"]])[None], 4)[0, 0]
        assert np.array_equal(seen, image) and (blank[hidden] == 128).all()
        assert np.array_equal(whole[~hidden], image[~hidden]) and np.array_equal(blank[~hidden], image[~hidden])
        # a distance of 1 is half of the 255 steps, and what is made may be beyond them
        steps = np.abs(whole[hidden] - image[hidden]).mean()
        assert steps / 127.5 == pytest.approx(answer["mae"], abs=0.1) and steps > 1
    picture = str(folder / "named" / "pictures" / "048.png")
    status, out, err = command("predict", str(finished), picture, "--output", "a.jsonl", cwd=tmp_path)
    assert status == 0, err
    (said,) = read_lines(tmp_path / "a.jsonl")
    assert said["predicted"] == "a-pictures/0.png" and (tmp_path / said["predicted"]).is_file()
    assert said["mae"] == pytest.approx(answers[0]["mae"], abs=1e-6)
    assert next(zoo.prediction.in_lines([said])).startswith(f"mae {said['mae']:.4f}  ")
    with pytest.raises(UserError, match=r"predict: image 0: nowhere.png: cannot be read"):
        zoo.prediction.run(finished, ["nowhere.png"])


def test_the_card_runs(finished, folder, monkeypatch, capsys):
    (finished / "photo.png").write_bytes((folder / "named" / "pictures" / "048.png").read_bytes())
    monkeypatch.chdir(finished)
    code = (finished / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    assert "torch.Size([1, 3, 16, 16])" in capsys.readouterr().out
    (finished / "photo.png").unlink()


def test_what_it_has_learned_is_classified_with(finished, folder, tmp_path):
    """The encoder arrives, the layer that makes pixels and the mask token are left out; and the other way round."""
    made = fields(named(folder), max_steps=2, eval_steps=1, save_steps=1)
    run(Recipe.model_validate(made | {"model": {"path": str(finished)}}), tmp_path / "classes")
    assert 0 <= read_metrics(tmp_path / "classes")["test_accuracy"] <= 1
    section_of = Recipe.model_validate(made | {"model": {"path": str(finished)}}).model
    model = load_model(section_of, "AutoModelForImageClassification", list(CLASSES))
    ours, theirs = weights(finished), model.state_dict()
    key = "vit.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(ours[key], theirs[key]) and not any("decoder" in name or "mask_token" in name for name in theirs)
    back = made | {"model": {"path": str(tmp_path / "classes")}, "task": {"type": TASK}}
    run(Recipe.model_validate(back), tmp_path / "masked")
    assert "vit.embeddings.mask_token" in weights(tmp_path / "masked")


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(finished, folder, tmp_path):
    whole = recipe(named(folder), {"mask_ratio": 0.5})
    step = ZooTrainer.training_step

    def fails(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise RuntimeError("stop")
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZooTrainer, "training_step", fails)
        with pytest.raises(RuntimeError, match="stop"):
            run(whole, tmp_path / "run")
    assert list(checkpoints(tmp_path / "run")) == [4]
    metrics = run(whole, tmp_path / "run", resume=True)
    assert without_time(metrics) == without_time(json.loads((finished / "metrics.json").read_text()))


def test_steps_of_several_batches_are_those_of_one(folder, tmp_path):
    """The loss of each image weighs the same: 36 rows, so that neither 12 nor 6 leaves a smaller batch."""
    once = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    run(recipe(named(folder), None, per_device_train_batch_size=12, **once), tmp_path / "one")
    several = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    run(recipe(named(folder), None, **several, **once), tmp_path / "two")
    for name, tensor in weights(tmp_path / "one").items():
        assert torch.allclose(tensor, weights(tmp_path / "two")[name], atol=1e-5), name


def test_preview_shows_what_is_hidden(folder):
    (sample,) = zoo.preview.run(recipe(named(folder), {"mask_ratio": 0.5}), "test", 1)
    hidden = hidden_patches(section(mask_ratio=0.5), SIDE, 4, [0, 0, 0])
    assert sample == {"row": 0, "pixels": [3, SIDE, SIDE], "masked": hidden.int().tolist()}


# Beside it


def test_baselines(folder):
    made = zoo.baselines.run(recipe(named(folder), {"mask_ratio": 0.5}))
    said = {name: values["mae"] for name, values in made.items()}
    mean, median, nearest = [], [], []
    for row, line in enumerate(read_lines(folder / "named" / "test.jsonl")):
        image = np.asarray(Image.open(folder / "named" / line["image"])) / 127.5 - 1
        hidden = hidden_pixels(hidden_patches(section(mask_ratio=0.5), SIDE, 4, [0, 0, row])[None], 4)[0, 0].numpy()
        mean.append(np.abs(image[hidden] - image[~hidden].mean()).mean())
        median.append(np.abs(image[hidden] - np.median(image[~hidden])).mean())
        places, there = np.argwhere(~hidden), np.argwhere(hidden)
        apart = ((places[None] - there[:, None]) ** 2).sum(-1)
        # of several that are as near, any
        distances = np.abs(image[~hidden][None] - image[hidden][:, None])
        tied = apart == apart.min(1, keepdims=True)
        least, most = (of(np.where(tied, distances, np.nan), axis=1).mean() for of in (np.nanmin, np.nanmax))
        nearest.append((least, most))
    assert said["the mean visible pixel"] == pytest.approx(np.mean(mean), abs=1e-6)
    assert said["the median visible pixel"] == pytest.approx(np.mean(median), abs=1e-6)
    least, most = np.mean(nearest, axis=0)
    assert least <= said["the nearest visible pixel"] <= most < least + 0.3


def test_a_label_beside_pixels_decides_what_is_held_out(folder):
    """The same rows as where it is learned, so that a model which goes on from here has not seen them."""
    columns = {"columns": {"label": "label"}, "test": 0.25, "files": {"train": "train.csv"}, "validation": 0.25}
    learned = load_splits(DataSection.model_validate(as_pixels(folder) | columns), ("image", "label"), 7,
                          kind=task_of(Recipe.model_validate(fields(named(folder))).task).labels)  # fmt: skip
    beside = recipe(as_pixels(folder) | columns)
    task = task_of(beside.task)
    splits = load_splits(beside.data, task.roles, 7, kind=task.labels)
    assert splits.labels == [] and len(splits.test) == 12
    for name in ("train", "validation", "test"):
        assert list(getattr(splits, name)["row"]) == list(getattr(learned, name)["row"])
    plain = load_splits(DataSection.model_validate(named(folder)), task.roles, 7, kind=task.labels)
    assert set(plain.train.column_names) == {"image", "row"} and "label" not in "".join(plain.notes)


# Refused


@pytest.mark.parametrize(
    "task, config, says",
    [
        ({}, {"encoder_stride": 16}, "encoder_stride: 16, but a last state stands for 4 x 4 pixels; set it to 4"),
        ({"mask_patch_size": 6}, {}, "task.mask_patch_size: 6 pixels; give a multiple of the model's patches, 4, that"),
        ({"mask_patch_size": 12}, {}, "that divides the image, 16"),
        ({"image_size": 18}, {}, "task.image_size: 18 x 18 pixels are no whole number of patches of 4 x 4"),
        ({"mask_ratio": 0.95}, {}, "task.mask_ratio: all 16 squares of an image would be hidden; give a smaller share"),
        ({"mask_patch_size": 16}, {}, "task.mask_ratio: all 1 squares of an image would be hidden"),
        ({}, {"image_size": [8, 16]}, "image_size [8, 16] and patch_size 4; this task makes square images of square"),
        ({}, {"num_channels": 1}, "model: reads images of 1 channels; this task makes three"),
    ],
)
def test_what_cannot_be_hidden_is_refused_before_training(folder, tmp_path, task, config, says):
    with pytest.raises(UserError) as caught:
        run(recipe(named(folder), task, config), tmp_path / "run")
    assert says in str(caught.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_families_without_such_a_head_are_refused(folder, tmp_path):
    text = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4}
    made = fields(named(folder)) | {"task": {"type": TASK}, "model": {"config": text}}
    with pytest.raises(UserError, match="the native bert has no AutoModelForMaskedImageModeling"):
        run(Recipe.model_validate(made), tmp_path / "run")


def test_a_run_that_is_not_there_is_not_looked_for_on_a_hub(folder, tmp_path):
    made = fields(named(folder)) | {"model": {"path": "runs/nowhere"}}
    with pytest.raises(UserError, match=r"model runs/nowhere: no such file or directory: "):
        run(Recipe.model_validate(made), tmp_path / "run")
