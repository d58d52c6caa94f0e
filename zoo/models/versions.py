"""Stops an import at once when the installed transformers is not one this code was written for and tested with."""

import re

import transformers

LOWEST, BELOW = (5, 23), (5, 25)

_installed = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
if not LOWEST <= _installed < BELOW:
    raise ImportError(
        f"This model's code needs transformers >= {LOWEST[0]}.{LOWEST[1]} and < {BELOW[0]}.{BELOW[1]}, but "
        f"{transformers.__version__} is installed. Run: pip install 'transformers>={LOWEST[0]}.{LOWEST[1]},"
        f"<{BELOW[0]}.{BELOW[1]}'"
    )

checked = True
