"""The peak is this process's own."""

import subprocess
import sys

from zoo.memory import peak_memory_bytes


def test_a_large_parent_does_not_count():
    held = b"x" * (400 * 2**20)
    code = "from zoo.memory import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child < 100 * 2**20 < len(held) < peak_memory_bytes()
