"""One label for an image."""

from collections import Counter
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from zoo.errors import UserError
from zoo.images import augmented, open_image
from zoo.labels import LABEL_KINDS
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import Collate, Rows, Task
from zoo.tasks.classification import (
    ONE_METRICS,
    one_answer,
    one_classes,
    one_metrics,
    one_records,
    weighted_loss,
)


def look_at(processor: BaseImageProcessor, section: TaskSection):
    """Looks at each image once, so that a broken one is named before anything is trained."""

    def encode(rows: Rows) -> Rows:
        found: Rows = {"width": [], "height": []}
        for row, image in zip(rows["row"], rows["image"], strict=True):
            width, height = open_image(image, f"data: image of row {row}").size
            found["width"].append(width)
            found["height"].append(height)
        return found

    return encode


def sizes(looked_at: Dataset, images: int, section: TaskSection) -> str:
    sizes = Counter(zip(looked_at["height"], looked_at["width"], strict=True)).most_common()
    usual = ", ".join(f"{count:,} of {height} x {width}" for (height, width), count in sizes[:3])
    return f"{images:,} images, {usual}{', ...' if len(sizes) > 3 else ''}"


def pixel_values(rows: list[dict[str, Any]], processor: BaseImageProcessor, section: TaskSection) -> torch.Tensor:
    """(rows, channels, height, width): the images of rows, of training changed as their draws decide."""
    images = []
    for row in rows:
        image = open_image(row["image"], f"data: image of row {row['row']}")
        # rows that are only evaluated carry no draw
        if section.augmentation is not None and "draw" in row:
            image = augmented(_resized(image, processor), section.augmentation, row["draw"])
        images.append(image)
    return processor(images=images, return_tensors="pt")["pixel_values"]


def _collate(processor: BaseImageProcessor, section: TaskSection) -> Collate:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("labels", "row")}
        return {"pixel_values": pixel_values(rows, processor, section), **batch}

    return collate


def _resized(image: Image.Image, processor: Any) -> Image.Image:
    """As the processor does it: what is turned at its own few pixels first is blurred by that."""
    size = dict(processor.size)
    if not processor.do_resize or not {"height", "width"} <= size.keys():
        return image
    return image.resize((size["width"], size["height"]), resample=processor.resample)


def check_channels(section: TaskSection, model: PreTrainedModel) -> None:
    """Raises UserError for a model that reads no colours, or more than three."""
    channels = getattr(model.config, "num_channels", 3)
    if channels != 3:
        raise UserError(f"model: reads images of {channels} channels; this task makes three, red, green and blue")


def ask_image(row: dict[str, Any], number: int, processor: BaseImageProcessor) -> Any:
    """The file of a row that is asked about, or its image. Raises UserError for what is none."""
    image = open_image(row["image"], f"predict: image {number}")
    # a file is opened again when its turn comes: many images would fill the memory
    return row["image"] if isinstance(row["image"], str) else row["image"].get("path") or image


IMAGE_CLASSIFICATION = Task(
    name="image-classification",
    auto_class="AutoModelForImageClassification",
    roles=TASK_TYPES["image-classification"].roles,
    labels=LABEL_KINDS["class"],
    processor="image_processor",
    encode=look_at,
    counts=sizes,
    check=check_channels,
    collate=_collate,
    draws="train",
    metrics=one_metrics,
    metric_names=ONE_METRICS,
    records=one_records,
    classes=one_classes,
    loss=weighted_loss,
    problem_type="single_label_classification",
    asked=("image",),
    ask=ask_image,
    # all of them; the pipeline takes no None for it
    pipeline=lambda section: (None, {"top_k": 10**6}),
    answer=one_answer,
    example='"photo.png"',
)
