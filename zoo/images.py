"""Images: opened as a model sees them, made of pixel columns, and changed at random for training."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError

from zoo.data_sections import Pixels
from zoo.errors import UserError, did_you_mean
from zoo.sections import Augmentation

# what cannot be shown in 8 bits a channel without choosing what is black and what white
_TOO_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def open_image(value: Any, where: str) -> Image.Image:
    """An image in RGB, upright as its camera held it, grey in all three channels, transparency left out.

    value: a file, an image, or {"bytes": ..., "path": ...} as the datasets library has it. It is what transformers'
    pipelines make of one. Raises UserError, which begins with `where`, for what is none.
    """
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and "://" in value:
        value = xopen(value, "rb")  # of a stream
    if value is None:
        raise UserError(f"{where}: there is no image; remove the row")
    try:
        image = value if isinstance(value, Image.Image) else Image.open(value)
        image.load()
        if image.mode in _TOO_DEEP:
            raise UserError(f"{where}: has more than 8 bits a channel (mode {image.mode}); convert it to 8")
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = f"{value}: " if isinstance(value, str | Path) else ""
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        # Pillow names the file once more, or an object in memory
        what = "it is of no known format" if isinstance(error, UnidentifiedImageError) else what
        raise UserError(f"{where}: {name}cannot be read as an image: {what}; replace or remove it") from error


def from_pixels(rows: Dataset, pixels: Pixels, others: list[str], where: str) -> Dataset:
    """Rows with a column `image`, made of all columns but `others`, in their order. Raises UserError."""
    columns = [name for name in rows.column_names if name not in others]
    if len(columns) != pixels.height * pixels.width:
        raise UserError(
            f"data.pixels: {pixels.height} x {pixels.width} are {pixels.height * pixels.width} columns, but {where} "
            f"has {len(columns)} beside {', '.join(others)}"
        )
    for column in columns:
        kind = getattr(rows.features[column], "dtype", "")
        if not kind.startswith(("int", "uint", "float")):
            what = "text" if kind.endswith("string") else kind or "no numbers"
            raise UserError(f"data.pixels: {where}: column {column!r} holds {what}, and no pixel")

    def made(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        values = np.stack([np.asarray(batch[column], dtype=np.float64) for column in columns], axis=-1)
        wrong = np.argwhere(~((values >= 0) & (values <= pixels.max)))
        if len(wrong):
            row, column = wrong[0]
            raise UserError(
                f"data.pixels: {where} row {numbers[row]}: column {columns[column]!r} holds {values[row, column]:g}, "
                f"no pixel from 0 to {pixels.max} (data.pixels.max)"
            )
        grey = np.rint(values * (255 / pixels.max)).astype(np.uint8).reshape(-1, pixels.height, pixels.width)
        return {"image": [{"bytes": _png(picture), "path": None} for picture in grey]}

    features = datasets.Features(
        {name: rows.features[name] for name in others} | {"image": datasets.Image(decode=False)}
    )
    return rows.map(
        made, batched=True, with_indices=True, remove_columns=columns, features=features, desc="Reading pixels"
    )


def _png(grey: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="png")
    return stream.getvalue()


def image_column(rows: Dataset, column: str, folder: Path, where: str) -> Dataset:
    """The column as images that are not decoded yet; names of files are looked for in `folder`. Raises UserError."""
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise UserError(
            f"{where}: column {column!r} is {feature}; an image is a file's name, or the datasets library's"
        )
    files = []
    for row, name in enumerate(rows[column]):
        file = None if name is None else folder / name
        if file is None or not file.is_file():
            near = did_you_mean(str(name), [path.name for path in folder.iterdir()] if folder.is_dir() else [])
            raise UserError(f"{where} row {row}: no image {str(name)!r} in {folder}{near}")
        files.append({"bytes": None, "path": str(file)})
    return rows.remove_columns(column).add_column(column, files, feature=datasets.Image(decode=False))


def augmented(image: Image.Image, how: Augmentation, draw: list[int]) -> Image.Image:
    """Turned, shifted, scaled and mirrored as `draw` decides; what comes in at the edges is black."""
    rng = np.random.default_rng(draw)
    angle = rng.uniform(-how.rotate, how.rotate)
    width, height = image.size
    shift = rng.uniform(-how.shift, how.shift, size=2) * (width, height)
    factor = 1 + rng.uniform(-how.scale, how.scale)
    mirrored = how.flip and rng.random() < 0.5
    # a point of the result -> where it comes from: around the middle, in continuous coordinates
    turn = np.deg2rad(angle)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / factor
    if mirrored:
        matrix = np.diag([-1.0, 1.0]) @ matrix
    middle = np.array([width / 2, height / 2])
    offset = middle - matrix @ (middle + shift)
    affine = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    return image.transform(image.size, Image.Transform.AFFINE, affine, resample=Image.Resampling.BILINEAR)
