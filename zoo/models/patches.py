"""What turns images into vectors: patches, a class token, positions that may be interpolated."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .dropout import Dropout
from .positions import sinusoids
from .spec import positions_of


def as_pair(size) -> tuple[int, int]:
    """(height, width) of a config's size, which may be one number for both."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


class Patches(nn.Module):
    """(batch, channels, height, width) -> (batch, patches, hidden), row by row. Official name: `projection`."""

    def __init__(self, config):
        super().__init__()
        size = as_pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class PatchEmbeddings(nn.Module):
    """Patches behind a class token, plus positions (ViT, arXiv 2010.11929, section 3.1). Official names."""

    def __init__(self, config, use_mask_token: bool):
        super().__init__()
        self.image_size, self.patch_size = as_pair(config.image_size), as_pair(config.patch_size)
        self.num_channels = config.num_channels
        patches = self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.patch_embeddings = Patches(config)
        self.kind, self.width = positions_of(config), config.hidden_size
        learned = torch.zeros(1, patches + 1, config.hidden_size)
        self.position_embeddings = nn.Parameter(learned) if self.kind == "learned" else None
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, interpolate: bool
    ) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, 1 + patches, hidden). Raises ValueError for another size."""
        self._check(tuple(pixel_values.shape), interpolate)
        embeddings = self.patch_embeddings(pixel_values)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model with a mask token (use_mask_token=True).")
            embeddings = torch.where(bool_masked_pos.bool().unsqueeze(-1), self.mask_token, embeddings)
        embeddings = torch.cat((self.cls_token.expand(len(embeddings), -1, -1), embeddings), dim=1)
        height, width = pixel_values.shape[2:]
        positions = self.positions(height, width)
        return self.dropout(embeddings if positions is None else embeddings + positions)

    def of_sizes(self, images: Sequence[torch.Tensor], interpolate: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (channels, height, width), each of its own size -> (batch, longest, hidden), 0 behind the shorter.

        And (batch, longest), 1 where a token is. Raises ValueError for an image that is no whole number of patches.
        """
        if not images:
            raise ValueError("pixel_values is an empty list; give at least one image.")
        of_size: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(images):
            self._check_divided(image, number)
            of_size.setdefault(tuple(image.shape), []).append(number)
        rows: dict[int, torch.Tensor] = {}
        for numbers in of_size.values():
            alike = torch.stack([images[number] for number in numbers])
            rows |= zip(numbers, self(alike, None, interpolate), strict=True)
        in_order = [rows[number] for number in range(len(images))]
        real = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in in_order]
        return pad_sequence(in_order, batch_first=True), pad_sequence(real, batch_first=True)

    def _check_divided(self, image: torch.Tensor, number: int) -> None:
        if image.ndim != 3 or image.shape[0] != self.num_channels:
            raise ValueError(
                f"image {number} of the list must be ({self.num_channels}, height, width), not {tuple(image.shape)}."
            )
        (height, width), (high, wide) = image.shape[1:], self.patch_size
        if height % high or width % wide:
            raise ValueError(
                f"image {number} of the list has {height} x {width} pixels, no whole number of patches of {high} x "
                f"{wide}; resize or pad it to a multiple."
            )

    def _check(self, shape: tuple[int, ...], interpolate: bool) -> None:
        if len(shape) != 4 or shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must be (batch, {self.num_channels}, height, width), not {shape}; an image processor "
                "makes them from grey and from transparent images too."
            )
        size = shape[2:]
        if size != self.image_size and not interpolate:
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels, but the model's are {self.image_size[0]} x "
                f"{self.image_size[1]}; resize them, or say interpolate_pos_encoding=True."
            )
        if any(pixels < patch for pixels, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"images of {size[0]} x {size[1]} pixels are smaller than a patch, {self.patch_size}.")

    def positions(self, height: int, width: int) -> torch.Tensor | None:
        """(1, 1 + patches, hidden) for images of this size, those of the trained size interpolated bicubically.

        Sinusoids are of the order in which patches are read (appendix D.4: one dimension does as well as two).
        """
        wanted = (height // self.patch_size[0], width // self.patch_size[1])
        if self.kind == "sinusoidal":
            order = torch.arange(wanted[0] * wanted[1] + 1, device=self.cls_token.device)
            return sinusoids(order, self.width).unsqueeze(0).to(self.cls_token.dtype)
        if self.position_embeddings is None or (height, width) == self.image_size:
            return self.position_embeddings
        return resized(self.position_embeddings, self.grid, wanted)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of the model's size."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


def resized(positions: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """(1, 1 + patches, hidden): those of a grid of (rows, columns), interpolated bicubically to another."""
    first, rest = positions[:, :1], positions[:, 1:]
    rest = rest.unflatten(1, grid).permute(0, 3, 1, 2)
    rest = F.interpolate(rest, size=wanted, mode="bicubic", align_corners=False)
    return torch.cat((first, rest.flatten(2).transpose(1, 2)), dim=1)


def resize_positions(model: PreTrainedModel, size: tuple[int, int]) -> None:
    """Makes a model one for images of (height, width) pixels, its positions interpolated for good."""
    for module in model.modules():
        if isinstance(module, PatchEmbeddings):
            grid, module.image_size = module.grid, size
            if module.position_embeddings is None:
                continue
            with torch.no_grad():
                module.position_embeddings = nn.Parameter(resized(module.position_embeddings, grid, module.grid))
    model.config.image_size = size[0] if size[0] == size[1] else list(size)
