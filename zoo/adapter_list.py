"""`zoo adapters list`: which adapters lie in a directory, of which base, and what they reach; nothing is opened."""

import json
from pathlib import Path
from typing import Any

from zoo.adapter_types import BASE, CONFIG, WEIGHTS
from zoo.errors import UserError


def run(directory: Path) -> list[dict[str, Any]]:
    """Of each finished run with an adapter, `directory` itself or beneath it: what it is, and its test metrics.

    Those of one `base` (the beginning of the hash) go together: they switch, stack and combine. Raises UserError.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    # a Trainer's checkpoints have no base.json
    return [_described(file.parent) for file in sorted(directory.rglob(BASE)) if (file.parent / CONFIG).is_file()]


def _described(directory: Path) -> dict[str, Any]:
    try:
        config, base, metrics = (
            json.loads((directory / name).read_text(encoding="utf-8")) for name in (CONFIG, BASE, "metrics.json")
        )
        size = (directory / WEIGHTS).stat().st_size
        return {
            "directory": str(directory),
            "type": config["peft_type"].lower(),
            "r": config.get("r") or config.get("num_virtual_tokens"),
            "targets": sorted(config.get("target_modules") or ()),
            "model": base["path"],
            "implementation": base["implementation"],
            "base": base["sha256"][:12],
            "bytes": size,
            "metrics": {name: value for name, value in metrics.items() if name.startswith("test_")},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: its adapter cannot be described: {error}; the directory is damaged") from error
