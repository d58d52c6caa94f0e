"""Where and from what a result came: versions, hardware, hashes of the data, the commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import HfApi

from zoo.data_sections import DataSection, SourceSection
from zoo.files import sha256
from zoo.recipe import Recipe
from zoo.sections import ModelSection
from zoo.sources import resolve

_PACKAGES = (
    *("torch", "transformers", "datasets", "tokenizers", "peft", "accelerate", "bitsandbytes", "numpy"),
    "sacrebleu",
)
# of larger data sizes stand for hashes: to read it once more would take longer than it is worth
MAX_HASHED_BYTES = 4 * 2**30


def environment(recipe: Recipe, world_size: int, model_commit: str | None = None) -> dict[str, Any]:
    """What a person needs to make the result again. Holds no path, user or host name, and no token."""
    return {
        "versions": {"python": platform.python_version(), "transformer-zoo": _version("transformer-zoo")}
        | {name: _version(name) for name in _PACKAGES},
        "hardware": hardware(),
        "world_size": world_size,
        "git_commit": _git_commit(recipe.file),
        "model": _model(recipe.model) | ({"commit": model_commit} if model_commit else {}),
        "data": data_of(recipe.data),
    }


def hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerators": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _git_commit(recipe: Path | None) -> str | None:
    """Of the repository that the recipe's file is in, `+changes` where its files have been changed since."""
    if recipe is None:
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=recipe.parent, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def _model(section: ModelSection) -> dict[str, Any]:
    path = section.path or section.tokenizer
    if not isinstance(path, str):
        return {"start": section.start}
    source = resolve(path, kind="model", revision=section.revision)
    found = {"path": source.shown(path), "revision": section.revision, "sha256": source.fingerprint}
    return found if section.path is not None else {"start": section.start, "tokenizer": found}


def data_of(section: DataSection) -> dict[str, Any]:
    """Where the rows come from, with hashes; of a mixture all its parts."""
    if section.mixture:
        return {"mixture": [_source(part) | {"weight": part.weight} for part in section.mixture]}
    return _source(section)


def _source(section: SourceSection) -> dict[str, Any]:
    source = resolve(section.place, kind="dataset", revision=section.revision, files=list(section.files.values()))
    found: dict[str, Any] = {
        "path": source.shown(section.place),
        "revision": section.revision,
        "sha256": source.fingerprint,
    }
    if source.kind == "hub":
        return found | {"commit": _commit(str(source.location), section.revision)}
    location = Path(source.location)
    if section.files:
        files = {name: location / name for name in section.files.values()}
    elif location.is_dir():
        files = {path.relative_to(location).as_posix(): path for path in sorted(location.rglob("*")) if path.is_file()}
    else:
        files = {location.name: location}
    sizes = {name: os.stat(path).st_size for name, path in files.items()}
    if sum(sizes.values()) <= MAX_HASHED_BYTES:
        return found | {"files": {name: sha256(path) for name, path in files.items()}}
    return found | {"file_bytes": sizes}


def _commit(repo: str, revision: str | None) -> str | None:
    """What a revision of a data set is, if the hub can be asked."""
    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=10).sha
    except (httpx2.HTTPError, OSError):
        return None


def changed(before: Any, after: Any) -> list[str]:
    """Names of what differs between two records of `data_of`; what one of them does not know is taken for the same."""
    if isinstance(before, list) and isinstance(after, list):
        return [name for pair in zip(before, after, strict=True) for name in changed(*pair)]
    found = []
    for key in before.keys() & after.keys():
        one, other = before[key], after[key]
        if isinstance(one, dict | list):
            found += changed(one, other)
        elif one != other and None not in (one, other):
            found.append(key)
    missing = before.keys() ^ after.keys() if "path" not in before else set()
    return sorted({*found, *missing})
