"""How much memory this process has used."""

import resource
import sys


def peak_memory_bytes() -> int:
    """The largest resident size this process has had (getrusage counts kilobytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
