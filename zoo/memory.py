"""How much memory this process has used."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def reset_peak_memory() -> None:
    """Begins anew, where the system can: several runs in one process have a peak each."""
    with suppress(OSError):
        # 5 sets VmHWM back to what is used now (proc(5))
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The largest resident size this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage on Linux would give a started process the peak of the one that started it
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
