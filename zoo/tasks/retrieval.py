"""How near a text's vector is to that of the text it belongs to, and how many others are nearer."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from scipy.sparse import issparse

RETRIEVAL = ("accuracy@1", "mrr@10", "mean_cosine")
BLOCK = 256  # texts that are compared with all others at a time


def text_id(text: str) -> int:
    """A number below 2**63 that equal texts have, and no others but by a chance of nothing."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def ranks(anchors: Any, candidates: Any, ids: np.ndarray, candidate_ids: np.ndarray) -> Iterator[int]:
    """The place of each anchor's text among all candidates, the best being 1; what is as near as it stands before it.

    anchors (rows, dim), candidates (others, dim): unit vectors, sparse or not. ids (rows, 2): of the anchor and of its
    own text; candidate_ids (others,). Equal texts are one candidate, those of equal anchors are right for each of them,
    and a text is no candidate of itself.
    """
    known, first = np.unique(candidate_ids, return_index=True)
    candidates, place = candidates[first], {number: index for index, number in enumerate(known.tolist())}
    own: dict[int, list[int]] = defaultdict(list)
    for anchor, right in ids.tolist():
        own[anchor].append(place[right])
    for start in range(0, len(ids), BLOCK):
        scores = anchors[start : start + BLOCK] @ candidates.T
        for row, anchor in zip(scores.toarray() if issparse(scores) else scores, ids[start:, 0].tolist(), strict=False):
            best = row[own[anchor]].max()
            row[own[anchor]] = -np.inf
            if anchor in place:
                row[place[anchor]] = -np.inf
            yield 1 + int((row >= best).sum())


def retrieval(places: Sequence[int], cosines: np.ndarray) -> dict[str, float]:
    """RETRIEVAL of `ranks` and of the cosines of the pairs; named as sentence-transformers' evaluator names them."""
    found = np.array(places)
    means = (found == 1).mean(), np.where(found <= 10, 1 / found, 0).mean(), cosines.mean()
    return dict(zip(RETRIEVAL, map(float, means), strict=True))
