"""Masked image modelling: some squares of an image are hidden, and the model makes them (SimMIM, arXiv 2111.09886)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, EvalPrediction, Pipeline, PreTrainedModel

from zoo.errors import UserError
from zoo.images import open_image
from zoo.labels import LABEL_KINDS
from zoo.sections import TaskSection
from zoo.task_types import DEFAULT_MASK_RATIO, TASK_TYPES
from zoo.tasks.base import Collate, Task
from zoo.tasks.image_classification import ask_image, check_channels, look_at, pixel_values, sizes

UNDRAWN = (0, 0)  # seed and epoch of rows that are only evaluated, so that each hides the same for every seed
GREY = 128  # what is hidden, in a picture


def hidden_count(section: TaskSection, squares: int) -> int:
    """How many of so many squares are hidden: the share of the recipe, rounded up (SimMIM's own code does so)."""
    ratio = DEFAULT_MASK_RATIO if section.mask_ratio is None else section.mask_ratio
    # 0.1 * 30 is more than 3 in floating point
    return math.ceil(round(ratio * squares, 9))


def hidden_patches(section: TaskSection, side: int, patch: int, draw: Sequence[int]) -> torch.Tensor:
    """(patches,) row by row, True where one is hidden: of an image of `side` pixels, squares of whole patches.

    `draw` decides which.
    """
    square = section.mask_patch_size or patch
    squares = side // square
    hidden = np.zeros(squares**2, dtype=bool)
    # other numbers than those of the augmentation
    rng = np.random.default_rng([*draw, 1])
    hidden[rng.permutation(squares**2)[: hidden_count(section, squares**2)]] = True
    return torch.from_numpy(hidden).view(squares, squares).repeat_interleave(square // patch, 0).repeat_interleave(
        square // patch, 1
    ).flatten()  # fmt: skip


def hidden_pixels(hidden: torch.Tensor, patch: int) -> torch.Tensor:
    """(batch, patches) -> (batch, 1, side, side), True for each pixel of a hidden patch."""
    squares = math.isqrt(hidden.shape[1])
    return hidden.view(-1, 1, squares, squares).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def _collate(processor: BaseImageProcessor, section: TaskSection, patch_size: int) -> Collate:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = pixel_values(rows, processor, section)
        draws = [row.get("draw", [*UNDRAWN, row["row"]]) for row in rows]
        hidden = torch.stack([hidden_patches(section, pixels.shape[-1], patch_size, draw) for draw in draws])
        return {"pixel_values": pixels, "bool_masked_pos": hidden, "row": torch.tensor([row["row"] for row in rows])}

    return collate


def _check(section: TaskSection, model: PreTrainedModel) -> None:
    check_channels(section, model)
    config: Any = model.config
    side, patch = config.image_size, config.patch_size
    if not isinstance(side, int) or not isinstance(patch, int):
        raise UserError(
            f"model.config: image_size {side} and patch_size {patch}; this task makes square images of square patches, "
            "a number each"
        )
    # a hierarchical model halves its states from stage to stage
    made = patch * 2 ** (len(getattr(config, "depths", [0])) - 1)
    if config.encoder_stride != made:
        raise UserError(
            f"model.config.encoder_stride: {config.encoder_stride}, but a last state stands for {made} x {made} "
            f"pixels; set it to {made}"
        )
    square = section.mask_patch_size or patch
    if square % patch or side % square:
        raise UserError(
            f"task.mask_patch_size: {square} pixels; give a multiple of the model's patches, {patch}, that divides the "
            f"image, {side}"
        )
    squares = (side // square) ** 2
    if hidden_count(section, squares) >= squares:
        raise UserError(
            f"task.mask_ratio: all {squares} squares of an image would be hidden; give a smaller share, or a "
            "smaller task.mask_patch_size"
        )


def _metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        # as many pixels are hidden in each image, so that the mean of the losses is that of all hidden pixels
        return {} if prediction.losses is None else {"mae": float(np.mean(prediction.losses))}

    return metrics


def _reduce(made: torch.Tensor | tuple, hidden: torch.Tensor) -> torch.Tensor:
    """Nothing: images that are made would fill the memory, and the loss says how far they are."""
    return hidden.new_zeros(len(hidden))


class Reconstructions(Pipeline):
    """Hides squares of an image, other ones of each, and makes them again."""

    _load_image_processor = True  # type: ignore[assignment]
    image_processor: Any
    model: Any

    def _sanitize_parameters(self, section=None, **options):
        return {"section": section}, {}, {}

    def preprocess(self, input_, section=None, **options):
        image = open_image(input_["image"], "predict")
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        draw = [*UNDRAWN, input_["number"]]
        hidden = hidden_patches(section, pixels.shape[-1], self.model.config.patch_size, draw)
        return {"pixel_values": pixels, "bool_masked_pos": hidden.unsqueeze(0)}

    def _forward(self, input_tensors, **options):
        return {**input_tensors, "made": self.model(**input_tensors).reconstruction}

    def postprocess(self, model_outputs, **options):
        pixels, made = model_outputs["pixel_values"][0], model_outputs["made"][0].float()
        hidden = hidden_pixels(model_outputs["bool_masked_pos"], self.model.config.patch_size)[0]
        seen, whole = (self._picture(image) for image in (pixels, torch.where(hidden, made, pixels)))
        blank = np.where(hidden[0, ..., None], GREY, seen).astype(np.uint8)
        mae = (pixels - made).abs()[:, hidden[0]].mean().item()
        return {"mae": mae, "picture": Image.fromarray(np.concatenate([seen, blank, whole], axis=1))}

    def _picture(self, pixels: torch.Tensor) -> np.ndarray:
        """(height, width, channels) in 8 bits, of what the processor made."""
        if self.image_processor.do_normalize:
            mean, std = (torch.tensor(getattr(self.image_processor, f"image_{of}")) for of in ("mean", "std"))
            pixels = pixels * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _ask(row: dict[str, Any], number: int, processor: BaseImageProcessor) -> dict[str, Any]:
    return {"image": ask_image(row, number, processor), "number": number}


USAGE = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForMaskedImageModeling

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModelForMaskedImageModeling.from_pretrained("."{trusted})
pixels = processor(images=Image.open("photo.png").convert("RGB"), return_tensors="pt")["pixel_values"]
patches = (model.config.image_size // model.config.patch_size) ** 2
output = model(pixels, bool_masked_pos=torch.rand(1, patches) < 0.6)
print(output.loss, output.reconstruction.shape)"""

MASKED_IMAGE_MODELING = Task(
    name="masked-image-modeling",
    auto_class="AutoModelForMaskedImageModeling",
    roles=TASK_TYPES["masked-image-modeling"].roles,
    labels=LABEL_KINDS["beside"],
    processor="image_processor",
    encode=look_at,
    counts=sizes,
    check=_check,
    collate=_collate,
    config_fields=("patch_size",),
    draws="train",
    label_names=("bool_masked_pos",),
    metrics=_metrics,
    metric_names=("mae",),
    reduce=_reduce,
    asked=("image",),
    ask=_ask,
    pipeline=lambda section: (Reconstructions, {"section": section}),
    answer=lambda section, answer: answer,
    usage=USAGE,
    tag="image-feature-extraction",
)
