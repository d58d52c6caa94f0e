"""Encoded rows as a batch takes them: with the draw that decides all that is random about each."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset


class WithDraws(torch.utils.data.Dataset):
    """Rows that also carry `draw`: (seed, epoch, number of the row and, if it is one of several, of its piece), which
    decides all that is random about a sample.

    Whoever runs epochs calls `set_epoch`; rows that are only evaluated stay in epoch 0, the same each time. others: a
    sample also carries `other`, a sample of another row of the data; there are two such rows at least.
    """

    def __init__(self, rows: Dataset, seed: int, others: bool = False):
        self.rows, self.seed, self.epoch, self.others = rows, seed, 0, others

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        drawn = row | {"draw": [self.seed, self.epoch, row["row"], *([row["piece"]] if "piece" in row else [])]}
        return drawn | {"other": self._other(row, index)} if self.others else drawn

    def _other(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, self.epoch, index, 2])  # other numbers than those of the sample
        while True:
            other = self.rows[int(rng.integers(len(self.rows)))]
            if other["row"] != row["row"]:
                return other
