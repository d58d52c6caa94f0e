"""Images from their files to a finished run: what is read, what is refused, and what training makes of them."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers.image_utils import load_image

import zoo.evaluation
import zoo.prediction
from tests.commands import zoo as command
from tests.conftest import write_csv
from tests.test_runs import read_lines, read_metrics, write_jsonl
from tests.tiny_run import checkpoints, differing, weights, without_time
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.encoding import encoded
from zoo.errors import Interrupted, UserError
from zoo.images import augmented, open_image
from zoo.loading import load_processor
from zoo.recipe import Recipe
from zoo.samples import WithDraws
from zoo.sections import Augmentation
from zoo.tasks import task_of
from zoo.train import run
from zoo.trainer import ZooTrainer

SIDE = 16
CLASSES = ("bright", "dark", "striped")
ROLES = ("image", "label")
VIT = {"model_type": "vit", "image_size": SIDE, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2,
       "num_attention_heads": 4, "intermediate_size": 48}  # fmt: skip
AUGMENTATION = {"rotate": 20, "shift": 0.1, "scale": 0.1, "flip": True}


def picture(number: int) -> np.ndarray:
    """(16, 16) grey, of class `number % 3`: bright, dark, or bright and dark in turns; with noise."""
    noise = np.random.default_rng(number).integers(0, 100, (SIDE, SIDE))
    base = [np.full((SIDE, SIDE), 150), np.zeros((SIDE, SIDE)), np.tile([0, 0, 150, 150], (SIDE, SIDE // 4))]
    return (base[number % 3] + noise).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same images in three forms: named in JSON lines beside them, in a folder a class, as pixel columns."""
    made = tmp_path_factory.mktemp("images")
    for split, first, count in (("train", 0, 48), ("test", 48, 15)):
        rows, pixels = [], []
        for number in range(first, first + count):
            label, name = CLASSES[number % 3], f"{number:03}.png"
            for place in (made / "named" / "pictures" / name, made / "classes" / split / label / name):
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(number)).save(place)
            rows.append({"image": f"pictures/{name}", "label": label})
            pixels.append([*picture(number).flatten().tolist(), label])
        write_jsonl(made / "named" / f"{split}.jsonl", rows)
        names = tuple([f"p{n}" for n in range(SIDE * SIDE)] + ["label"])
        (made / "pixels").mkdir(exist_ok=True)
        write_csv(made / "pixels" / f"{split}.csv", pixels, names)
    return made


def files(ending: str) -> dict:
    return {split: f"{split}.{ending}" for split in ("train", "test")}


def named(folder: Path) -> dict:
    return {"path": str(folder / "named"), "files": files("jsonl")}


def as_pixels(folder: Path, **pixels) -> dict:
    return {
        "path": str(folder / "pixels"), "files": files("csv"), "pixels": {"height": SIDE, "width": SIDE, **pixels},
    }  # fmt: skip


def fields(data: dict, task: dict | None = None, **train) -> dict:
    arguments = {
        "max_steps": 12, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "learning_rate": 3e-3,
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "logging_steps": 4, "disable_tqdm": True,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "seed": 7,
    }  # fmt: skip
    return {
        "name": "tiny-vit", "model": {"config": VIT}, "task": {"type": "image-classification", **(task or {})},
        "data": {"validation": 0.25, **data}, "train": arguments | train,
    }  # fmt: skip


def recipe(data: dict, task: dict | None = None, **train) -> Recipe:
    return Recipe.model_validate(fields(data, task, **train))


def splits_of(data: dict):
    task = task_of(recipe(data).task)
    return load_splits(DataSection.model_validate({"validation": 0.25, **data}), ROLES, 7, kind=task.labels)


# What is read


def sample() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side: the first row is the right edge
    return exif


KINDS = {
    "grey.png": lambda file: sample().convert("L").save(file),
    "grey-alpha.png": lambda file: sample().convert("LA").save(file),
    "black-white.png": lambda file: sample().convert("1").save(file),
    "rgba.png": lambda file: Image.merge("RGBA", (*sample().split(), sample().convert("L"))).save(file),
    "palette.png": lambda file: sample().quantize(16).save(file),
    "palette-transparent.png": lambda file: sample().quantize(16).save(file, transparency=3),
    "cmyk.jpg": lambda file: sample().convert("CMYK").save(file),
    "turned.jpg": lambda file: sample().save(file, exif=turned()),
    "animated.gif": lambda file: sample().save(file, save_all=True, append_images=[sample().rotate(180)]),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_image_is_what_pipelines_make_of_it(tmp_path, name):
    KINDS[name](tmp_path / name)
    ours, theirs = open_image(str(tmp_path / name), "it"), load_image(str(tmp_path / name))
    assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(theirs))
    in_memory = open_image({"bytes": (tmp_path / name).read_bytes(), "path": None}, "it")
    assert np.array_equal(np.asarray(in_memory), np.asarray(ours))
    if name == "turned.jpg":
        assert ours.size == (24, 16), "24 x 16 as it was held"
        sample().save(tmp_path / "plain.jpg")
        plain = open_image(str(tmp_path / "plain.jpg"), "it")
        assert np.array_equal(np.asarray(ours), np.rot90(np.asarray(plain), -1))
    if name.startswith(("grey", "black")):
        assert np.array_equal(np.asarray(ours)[..., 0], np.asarray(ours)[..., 2])
    if name == "rgba.png":
        assert np.array_equal(np.asarray(ours), np.asarray(sample())), "transparency is left out"


def half(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN = {
    "deep.png": (
        lambda file: Image.fromarray(np.full((16, 16), 999, dtype=np.uint16)).save(file),
        "has more than 8 bits a channel (mode I;16); convert it to 8",
    ),
    "half.jpg": (half, "cannot be read as an image: image file is truncated"),
    "half.png": (half, "cannot be read as an image: image file is truncated"),
    "text.png": (lambda file: file.write_text("no image"), "cannot be read as an image: it is of no known format"),
    "empty.png": (lambda file: file.write_bytes(b""), "cannot be read as an image: it is of no known format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_before_anything_is_trained(folder, tmp_path, name):
    make, says = BROKEN[name]
    broken = shutil.copytree(folder / "named", tmp_path / "named")
    make(broken / "pictures" / name)
    lines = read_lines(broken / "train.jsonl")
    lines[20]["image"] = f"pictures/{name}"
    write_jsonl(broken / "train.jsonl", lines)
    with pytest.raises(UserError) as caught:
        run(recipe(named(tmp_path)), tmp_path / "run")
    assert str(caught.value).startswith("data: image of row 20: ") and says in str(caught.value)
    assert not (tmp_path / "run").exists() or not checkpoints(tmp_path / "run")


# Where they stand


def test_every_form_gives_the_same_rows(folder):
    forms = {"named": named(folder), "pixels": as_pixels(folder), "classes": {"path": str(folder / "classes")}}
    read = {}
    for form, data in forms.items():
        splits = splits_of(data)
        assert splits.labels == list(CLASSES) and (len(splits.train), len(splits.validation)) == (36, 12)
        for split in (splits.train, splits.validation, splits.test):
            assert set(split.column_names) == {"image", "label", "row"}
        test = splits.test
        pictures = [np.asarray(open_image(image, "it"))[..., 0].tobytes() for image in test["image"]]
        read[form] = sorted(zip(pictures, test["label"], strict=True))
    expected = sorted((picture(number).tobytes(), number % 3) for number in range(48, 63))
    assert read["named"] == read["pixels"] == read["classes"] == expected


def test_names_are_looked_for_beside_the_file(folder, tmp_path, monkeypatch):
    """Whether data.path is the folder or the file, and wherever the command runs."""
    monkeypatch.chdir(tmp_path)
    alone = splits_of({"path": str(folder / "named" / "train.jsonl")})
    whole = splits_of(named(folder))
    assert alone.train["image"] == whole.train["image"]
    lines = read_lines(folder / "named" / "train.jsonl")
    for name, says in (
        ("pictures/00.png", "train row 2: no image 'pictures/00.png' in"),
        (None, "train row 2: no image 'None' in"),
        ("pictures", "train row 2: no image 'pictures' in"),
    ):
        moved = shutil.copytree(folder / "named", tmp_path / "moved", dirs_exist_ok=True)
        write_jsonl(moved / "train.jsonl", [*lines[:2], {"image": name, "label": "dark"}, *lines[3:]])
        with pytest.raises(UserError) as caught:
            splits_of(named(tmp_path) | {"path": str(moved)})
        assert says in str(caught.value)
    for split in ("train", "test"):
        write_jsonl(moved / f"{split}.jsonl", [{"image": 3, "label": "dark"}] * 8)
    with pytest.raises(UserError, match="an image is a file's name, or the datasets library's"):
        splits_of(named(tmp_path) | {"path": str(moved)})


def test_pixel_columns_that_are_refused(folder, tmp_path):
    header, *rows = (folder / "pixels" / "train.csv").read_text().splitlines()
    moved = shutil.copytree(folder / "pixels", tmp_path / "pixels")

    def says(lines: list[str], **pixels) -> str:
        (moved / "train.csv").write_text("\n".join([header, *lines]) + "\n")
        with pytest.raises(UserError) as caught:
            splits_of(as_pixels(tmp_path, **pixels))
        return str(caught.value)

    def with_first(value: str) -> list[str]:
        return [*rows[:5], ",".join([value, *rows[5].split(",")[1:]]), *rows[6:]]

    row = "train row 5: column 'p0' holds"
    assert f"{row} 256, no pixel from 0 to 255 (data.pixels.max)" in says(with_first("256"))
    assert f"{row} -1, no pixel from 0 to 255" in says(with_first("-1"))
    assert f"{row} nan, no pixel from 0 to 255" in says(with_first(""))
    assert "train row 0: column 'p0' holds " in says(rows, max=16)
    assert "train: column 'p0' holds text, and no pixel" in says(with_first("white"))
    said = says(rows, height=8)
    assert "data.pixels: 8 x 16 are 128 columns, but " in said and "train has 256 beside label" in said


def test_white_is_the_number_that_the_recipe_says(tmp_path):
    rows = [[0, 4, 8, 16, label] for label in ("a", "b") for _ in range(4)]
    for split in ("train", "test"):
        (tmp_path / "pixels").mkdir(exist_ok=True)
        write_csv(tmp_path / "pixels" / f"{split}.csv", rows, ("a", "b", "c", "d", "label"))
    image = splits_of(as_pixels(tmp_path, height=2, width=2, max=16)).test[0]["image"]
    assert np.asarray(open_image(image, "it"))[..., 1].tolist() == [[0, 64], [128, 255]]


# A run


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("vit")
    (place / "r.yaml").write_text(yaml.safe_dump(fields(named(folder), {"augmentation": AUGMENTATION})))
    status, out, err = command("train", "r.yaml", "--output-dir", "run", cwd=place)
    assert status == 0, out + err
    assert "train: 36 images, 36 of 16 x 16; labels bright 12, dark 12, striped 12" in out
    return place / "run"


def pixels_of(directory: Path, rows: list[dict], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' own processor makes of images, and the numbers of their labels."""
    processor = transformers.AutoImageProcessor.from_pretrained(directory)
    images = [load_image(str(folder / "named" / row["image"])) for row in rows]
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    return processor(images=images, return_tensors="pt")["pixel_values"], labels


def test_a_finished_run_is_an_official_one(finished, folder):
    model, info = transformers.ViTForImageClassification.from_pretrained(finished, output_loading_info=True)
    assert not any(info.values()) and model.config.image_size == SIDE
    assert model.config.id2label == dict(enumerate(CLASSES))
    pixels, labels = pixels_of(finished, read_lines(folder / "named" / "test.jsonl"), folder)
    assert pixels.shape == (15, 3, SIDE, SIDE)
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    metrics = read_metrics(finished)
    # evaluation sees images as they are
    assert metrics["test_loss"] == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-5)
    assert metrics["test_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert metrics["test_accuracy"] > 0.6, "it has learned something"
    assert zoo.evaluation.run(finished)["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-5)


def test_predict_is_the_stock_pipeline(finished, folder, tmp_path):
    names = [str(folder / "named" / "pictures" / f"{number:03}.png") for number in (48, 49, 50)]
    KINDS["turned.jpg"](tmp_path / "turned.jpg")
    KINDS["palette-transparent.png"](tmp_path / "palette.png")
    names += [str(tmp_path / "turned.jpg"), str(tmp_path / "palette.png")]
    stock = transformers.pipeline("image-classification", str(finished), top_k=3)
    answers = list(zoo.prediction.run(finished, names))
    for name, answer in zip(names, answers, strict=True):
        scores = {entry["label"]: entry["score"] for entry in stock(name)}
        assert answer["probabilities"] == pytest.approx(scores, abs=1e-5) and answer["image"] == name
        assert answer["predicted"] == max(scores, key=lambda label: scores[label])
    status, out, _ = command("predict", str(finished), names[0], cwd=tmp_path)
    assert status == 0 and out.startswith(answers[0]["predicted"])
    status, _, err = command("predict", str(finished), names[0], "nowhere.png", cwd=tmp_path)
    assert status == 2 and "predict: image 1: nowhere.png: cannot be read as an image: No such file" in err
    for broken in BROKEN:
        BROKEN[broken][0](tmp_path / broken)
        with pytest.raises(UserError, match="predict: image 0: "):
            zoo.prediction.run(finished, [str(tmp_path / broken)])


def test_predict_of_a_file_of_names_is_predictions_jsonl(finished, folder):
    answers = list(zoo.prediction.run(finished, file=folder / "named" / "test.jsonl"))
    for answer, line in zip(answers, read_lines(finished / "predictions.jsonl"), strict=True):
        assert answer["predicted"] == line["predicted"]
        assert answer["probabilities"] == pytest.approx(line["probabilities"], abs=1e-5)


# Another resolution


def test_evaluate_at_another_resolution(finished, folder):
    """The official class interpolates positions when it is asked to, for images resized to that size."""
    again = zoo.evaluation.run(finished, overrides=["task.image_size=24"])
    processor = transformers.AutoImageProcessor.from_pretrained(finished)
    rows = read_lines(folder / "named" / "test.jsonl")
    images = [load_image(str(folder / "named" / row["image"])) for row in rows]
    pixels = processor(images=images, size={"height": 24, "width": 24}, return_tensors="pt")["pixel_values"]
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    model = transformers.ViTForImageClassification.from_pretrained(finished).eval()
    with torch.no_grad():
        logits = model(pixels, interpolate_pos_encoding=True).logits
    assert again["test_loss"] == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-5)
    assert again["test_loss"] != pytest.approx(read_metrics(finished)["test_loss"], abs=1e-5)
    says = r"task.image_size: 18 x 18 pixels are no whole number of patches of 4 x 4 \(model.config.patch_size\)"
    with pytest.raises(UserError, match=says):
        zoo.evaluation.run(finished, overrides=["task.image_size=18"])


def test_a_model_trained_at_another_resolution_is_one_of_it(finished, folder, tmp_path):
    larger = recipe(named(folder), {"image_size": 24}, max_steps=4)
    larger = larger.model_copy(update={"model": larger.model.model_copy(update={"path": str(finished), "config": {}})})
    run(larger, tmp_path / "run")
    model, info = transformers.ViTForImageClassification.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values()) and model.config.image_size == 24
    assert model.vit.embeddings.position_embeddings.shape == (1, 37, 32)
    rows = read_lines(folder / "named" / "test.jsonl")
    pixels, labels = pixels_of(tmp_path / "run", rows, folder)
    assert pixels.shape[2:] == (24, 24)
    with torch.no_grad():
        loss = cross_entropy(model.eval()(pixels).logits, labels).item()
    assert read_metrics(tmp_path / "run")["test_loss"] == pytest.approx(loss, abs=1e-5)
    linformer = {"attention": "linformer", "attention_kwargs": {"linformer": {"rank": 4}}}
    shorter = larger.model_copy(update={"model": larger.model.model_copy(update=linformer)})
    with pytest.raises(UserError, match=r"give model\.attention_kwargs\.linformer\.max_length: 37"):
        run(shorter, tmp_path / "linformer")
    with pytest.raises(UserError, match=r"task.image_size: 10 x 10 pixels are no whole number of patches"):
        run(recipe(named(folder), {"image_size": 10}), tmp_path / "other")


# Changed at random


def test_augmentation_is_a_function_of_the_draw():
    image = Image.fromarray(picture(2)).convert("RGB")
    how = Augmentation.model_validate(AUGMENTATION)

    def made(draw, how=how) -> bytes:
        return augmented(image, how, draw).tobytes()

    assert made([7, 0, 3]) == made([7, 0, 3])
    assert len({made(draw) for draw in ([7, 0, 3], [8, 0, 3], [7, 1, 3], [7, 0, 4])}) == 4
    nothing = Augmentation()
    assert all(made([7, 0, row], nothing) == image.tobytes() for row in range(20))
    mirrored = Augmentation(flip=True)
    seen = {made([7, 0, row], mirrored) for row in range(20)}
    assert seen == {image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}
    quarter = augmented(Image.fromarray(picture(2)), Augmentation(rotate=180), [7, 0, 3])
    assert quarter.size == (SIDE, SIDE) and np.asarray(quarter).mean() > 20, "turned about the middle"


def test_training_rows_alone_are_changed(folder):
    augmenting = recipe(named(folder), {"augmentation": AUGMENTATION})
    task, processor = task_of(augmenting.task), load_processor(augmenting.model, "image_processor")
    plain = task.collate(processor, recipe(named(folder)).task)
    collate, splits = task.collate(processor, augmenting.task), splits_of(named(folder))
    train, _ = encoded(splits.train, augmenting, task, processor, 7, training=True)
    evaluated, _ = encoded(splits.train, augmenting, task, processor, 7)
    assert isinstance(train, WithDraws) and not isinstance(evaluated, WithDraws)
    first = [train[n] for n in range(8)]
    as_they_are = plain([evaluated[n] for n in range(8)])["pixel_values"]
    assert torch.equal(collate([evaluated[n] for n in range(8)])["pixel_values"], as_they_are)
    changed = collate(first)["pixel_values"]
    assert not torch.equal(changed, as_they_are) and torch.equal(changed, collate(first)["pixel_values"])
    # the batch in which a row stands does not matter
    assert torch.equal(collate(first[3:5])["pixel_values"], changed[3:5])
    train.set_epoch(1)
    assert not torch.equal(collate([train[n] for n in range(8)])["pixel_values"], changed)


@pytest.mark.parametrize("at", [3, 5, 8])
def test_an_interrupted_run_ends_like_one_that_was_not(finished, folder, tmp_path, monkeypatch, at):
    """36 rows are 5 steps an epoch, so that it stops within an epoch, and at its end."""
    augmenting, step = recipe(named(folder), {"augmentation": AUGMENTATION}), ZooTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ZooTrainer, "training_step", interrupted)
        with pytest.raises(Interrupted, match=f"step {at} is saved"):
            run(augmenting, tmp_path / "run")
    metrics = run(augmenting, tmp_path / "run", resume=True)
    assert without_time(metrics) == without_time(json.loads((finished / "metrics.json").read_text()))
    assert differing(weights(tmp_path / "run"), weights(finished)) == []


# Refused


def test_models_of_other_channels_are_refused(folder, tmp_path):
    grey = recipe(named(folder))
    grey = grey.model_copy(update={"model": grey.model.model_copy(update={"config": {**VIT, "num_channels": 1}})})
    with pytest.raises(UserError, match="model: reads images of 1 channels; this task makes three"):
        run(grey, tmp_path / "run")


def test_an_image_in_memory_has_no_name():
    with pytest.raises(
        UserError, match=r"^it: cannot be read as an image: it is of no known format; replace or remove"
    ):
        open_image({"bytes": b"x", "path": None}, "it")
    with pytest.raises(UserError, match=r"^it: there is no image; remove the row"):
        open_image({"bytes": None, "path": None}, "it")
    stream = io.BytesIO()
    sample().save(stream, format="png")
    assert open_image({"bytes": stream.getvalue(), "path": "gone.png"}, "it").size == (16, 24)
