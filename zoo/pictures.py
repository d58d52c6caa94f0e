"""What each attention pattern sees, drawn in text: `python -m zoo.pictures [NAME]`.

A row is a query, a column a key; on the left as in an encoder, on the right as in a decoder.
"""

import sys

import torch

from zoo.models.masks import MASKS, takes_layer

LENGTH = 20
# small enough for a picture
SHOWN = {
    "local": {"window": 3}, "dilated": {"window": 2, "dilation": 3}, "block": {"size": 5}, "strided": {"stride": 4},
    "fixed": {"stride": 5}, "longformer": {"window": 2, "global_tokens": 2}, "sinks": {"window": 3, "sinks": 2},
    "bigbird": {"block_size": 2, "random_blocks": 1},
}  # fmt: skip


# of patterns whose heads differ in kind, the one that is not shown elsewhere
HEADS = {"strided": 1}


def picture(name: str) -> str:
    """LENGTH lines of one head, bidirectional and causal."""
    head = HEADS.get(name, 0)
    positions, sides = torch.arange(LENGTH), []
    for causal in (False, True):
        layer = {"layer": 0} if takes_layer(name) else {}
        seen = MASKS[name](causal=causal, **layer, **SHOWN[name])(positions[:, None], positions[None, :], head)
        sides.append(["".join("■" if cell else "·" for cell in row) for row in seen.tolist()])
    return "\n".join(f"{left}   {right}" for left, right in zip(*sides, strict=True))


if __name__ == "__main__":
    for asked in sys.argv[1:] or MASKS:
        if asked not in SHOWN:
            raise SystemExit(f"{asked}: no pattern of that name; there are {', '.join(SHOWN)}")
        print(f"{asked} {SHOWN[asked]}\n{picture(asked)}")
