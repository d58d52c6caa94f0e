"""How much memory this process has used, and how much of an accelerator's."""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def reset_peak_memory() -> None:
    """Begins anew, where the system can: several runs in one process have a peak each."""
    with suppress(OSError):
        # 5 sets VmHWM back to what is used now (proc(5))
        Path("/proc/self/clear_refs").write_text("5")
    module = _of_accelerator()
    if module is not None:
        module.reset_peak_memory_stats()


def peak_accelerator_memory_bytes() -> int | None:
    """The most that tensors have taken on the accelerator; None without one, and on one that does not tell."""
    module = _of_accelerator()
    return None if module is None else module.max_memory_allocated()


def _of_accelerator() -> Any:
    import torch  # not for the sake of a process's own peak

    place = torch.accelerator.current_accelerator(check_available=True)
    module = None if place is None else torch.get_device_module(place)
    return module if hasattr(module, "max_memory_allocated") else None


def peak_memory_bytes() -> int:
    """The largest resident size this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage on Linux would give a started process the peak of the one that started it
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
