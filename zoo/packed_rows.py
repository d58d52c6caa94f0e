"""Several documents in a row, kept apart: `task.packing`.

A row's positions begin anew at each of its documents; by that transformers' masks, and the native models, know where
attention ends. Best fit decreasing, by length (Ding et al. 2024, arXiv 2404.10830, section 3.1), as in TRL.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, PreTrainedModel

from zoo.errors import UserError

FLATTEN = DataCollatorWithFlattening()
# attention implementations whose masks are made of positions; those of flash attention read one row alone
KEPT_APART = ("eager", "sdpa", "flex_attention")
TOLERANCE = 1e-3


def best_fit_decreasing(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the documents in each row: the longest first, each in the fullest row that still has room for it.

    A function of the lengths alone; none of them is more than `room`.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # that some row has left, in order
    waiting: dict[int, deque[int]] = {}  # space -> the rows that have so much of it
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fullest = bisect_left(spaces, lengths[document])
        if fullest < len(spaces):
            space = spaces[fullest]
            row = waiting[space].popleft()
            if not waiting[space]:
                del waiting[space], spaces[fullest]
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(document)
        left = space - lengths[document]
        if left and left not in waiting:
            insort(spaces, left)
        if left:
            waiting.setdefault(left, deque()).append(row)
    return rows


class PackedRows(torch.utils.data.Dataset):
    """Encoded documents in rows of at most `room` tokens: `input_ids`, `labels`, `position_ids`, and `row` of each.

    The first token of a document is nobody's label.
    """

    def __init__(self, documents: Dataset, lengths: Sequence[int], room: int):
        self.documents, self.rows = documents, best_fit_decreasing(lengths, room)
        fill = sum(lengths) / (room * len(self.rows))
        self.note = f"packed into {len(self.rows):,} rows, {fill:.1%} of which is text"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        documents = [self.documents[number] for number in self.rows[index]]
        flat = FLATTEN(documents)
        row = {name: flat[name][0] for name in ("input_ids", "labels", "position_ids")}
        return row | {"row": [document["row"] for document in documents]}


def packed_batch(rows: list[dict[str, Any]], padding: int) -> dict[str, Any]:
    """A batch of packed rows: what fills a short one up is a document of its own, without labels.

    There is no mask: with one, positions would not tell where a document ends, nor would they with a cache.
    """
    fills = {"input_ids": padding, "labels": FLATTEN.separator_id, "position_ids": 0}
    batch: dict[str, Any] = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }
    for positions, row in zip(batch["position_ids"], rows, strict=True):
        begin = len(row["input_ids"])
        positions[begin:] = torch.arange(len(positions) - begin)
    numbers = [number for row in rows for number in row["row"]]
    return {**batch, "use_cache": False, "row": torch.tensor(numbers)}


def check_kept_apart(model: PreTrainedModel) -> None:
    """Raises UserError for a model in which a document would see the one before it, or might."""
    implementation, kind = model.config._attn_implementation, type(model).__name__
    if implementation not in KEPT_APART:
        raise UserError(
            f"task.packing: {implementation} does not keep the texts of a batch apart; set model.attn_implementation "
            f"to one of {', '.join(KEPT_APART)}, or remove the key"
        )
    if implementation == "flex_attention":
        # its masks are those of sdpa, and it runs on an accelerator only
        return
    ids = torch.arange(8, device=model.device).repeat(2).unsqueeze(0) % model.config.vocab_size
    positions = torch.arange(8, device=model.device).repeat(2).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    except TypeError as error:
        raise UserError(f"task.packing: {kind} takes no positions, which tell texts apart; remove the key") from error
    finally:
        model.train(training)
    if not torch.allclose(logits[:8], logits[8:], rtol=TOLERANCE, atol=TOLERANCE):
        raise UserError(f"task.packing: a text in {kind} would see the one before it in its row; remove the key")
