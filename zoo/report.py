"""Metrics as a person reads them on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

# of the numbers that are no share or loss
_SHAPES = {"perplexity": "{:.2f}", "samples_per_second": "{:.1f}", "runtime": "{:.0f} s"}
_PEAKS = {"peak_memory_bytes": "peak memory", "peak_accelerator_memory_bytes": "peak memory, accelerator"}
_NOT_SHOWN = ("epoch", "_low", "_high")


def metrics_table(metrics: Mapping[str, Any], title: str) -> Table:
    """Of one run; or of several seeds, each mean with half the width of its 95 % interval."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        base = name.removesuffix("_mean")
        if base in _PEAKS:
            table.add_row(_PEAKS[base], f"{value / 2**20:,.0f} MiB")
        elif isinstance(value, float) and not base.endswith(_NOT_SHOWN):
            shape = next((shape for ending, shape in _SHAPES.items() if base.endswith(ending)), "{:.4f}")
            spread = f" ± {shape.format(metrics[f'{base}_high'] - value)}" if f"{base}_high" in metrics else ""
            table.add_row(name, shape.format(value) + spread)
    return table
