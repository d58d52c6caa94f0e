"""What each attention sees, drawn in text: `python -m zoo.pictures [NAME]`.

A row is a query, a column a key. Of a pattern, on the left as in an encoder, on the right as in a decoder; of a kernel,
on the left the weights of full attention, on the right its own for the same queries and keys.
"""

import sys
from types import SimpleNamespace

import torch

from zoo.models.attention_variants import ATTENTIONS
from zoo.models.masks import MASKS, takes_layer
from zoo.models.positions import sinusoids

LENGTH = 20
# small enough for a picture
SHOWN = {
    "local": {"window": 3}, "dilated": {"window": 2, "dilation": 3}, "block": {"size": 5}, "strided": {"stride": 4},
    "fixed": {"stride": 5}, "longformer": {"window": 2, "global_tokens": 2}, "sinks": {"window": 3, "sinks": 2},
    "bigbird": {"block_size": 2, "random_blocks": 1},
    "linformer": {"rank": 5}, "performer": {"features": 256, "orthogonal": False}, "nystrom": {"landmarks": 5},
}  # fmt: skip
# of a weight, by quarters of the largest of its row
SHADES = "·░▒▓█"
WIDTH, SCALING = 16, 0.5
# of patterns whose heads differ in kind, the one that is not shown elsewhere
HEADS = {"strided": 1}


def picture(name: str) -> str:
    """LENGTH lines of one head."""
    return "\n".join(f"{left}   {right}" for left, right in zip(*_sides(name), strict=True))


def _sides(name: str) -> list[list[str]]:
    if name in ATTENTIONS:
        return _weights(name)
    head = HEADS.get(name, 0)
    positions, sides = torch.arange(LENGTH), []
    for causal in (False, True):
        layer = {"layer": 0} if takes_layer(name) else {}
        seen = MASKS[name](causal=causal, **layer, **SHOWN[name])(positions[:, None], positions[None, :], head)
        sides.append(["".join("■" if cell else "·" for cell in row) for row in seen.tolist()])
    return sides


def _weights(name: str) -> list[list[str]]:
    """Of full attention and of a kernel, where queries and keys are sinusoids of their positions: near is alike."""
    states = sinusoids(torch.arange(LENGTH), WIDTH).double()[None, None]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        kernel = ATTENTIONS[name](
            SimpleNamespace(max_position_embeddings=LENGTH), 1, WIDTH, False, **SHOWN.get(name, {})
        )
        kernel.initialise()
        # what attention makes of values that are one for each key is its weights
        own = kernel(states, states, torch.eye(LENGTH, dtype=torch.float64)[None, None], SCALING)[0, 0]
    full = torch.softmax(states @ states.transpose(2, 3) * SCALING, -1)[0, 0]
    quarters = [(4 * of / of.amax(1, keepdim=True)).round().clamp(0, 4).int() for of in (full, own)]
    return [["".join(SHADES[cell] for cell in row) for row in of.tolist()] for of in quarters]


if __name__ == "__main__":
    known = (*MASKS, *ATTENTIONS)
    for asked in sys.argv[1:] or known:
        if asked not in known:
            raise SystemExit(f"{asked}: no attention of that name; there are {', '.join(known)}")
        print(f"{asked} {SHOWN.get(asked, '')}\n{picture(asked)}")
