"""`zoo doctor`: is this machine fit for it? Versions, devices, caches and the hub; each problem with its remedy."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from zoo.sources import cache_home

PROJECT = "transformer-zoo"
HUB_TIMEOUT_SECONDS = 5
LITTLE_DISK_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """`value` is what was found; `problem`, where there is one, says what is wrong and what to do."""

    name: str
    value: str
    problem: str | None = None


def examine() -> list[Finding]:
    return [*_machine(), *_project(), *_devices(), *_cache(), *_hub()]


def _machine() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("platform", platform.platform())


def _project() -> Iterator[Finding]:
    try:
        yield Finding("zoo", metadata.version(PROJECT))
    except metadata.PackageNotFoundError:
        remedy = "run: pip install -c constraints.txt -e . in the checkout; until then no versions are checked"
        yield Finding("zoo", "runs from files that are not installed", remedy)
        return
    yield from packages(metadata.requires(PROJECT) or [])


def packages(requirements: list[str]) -> Iterator[Finding]:
    """Is what the project needs there, in a version it was written for? Extras are not looked at."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", f"run: pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        wanted = None if fits else f"{requirement.specifier} is needed; run: pip install '{requirement}'"
        yield Finding(requirement.name, version, wanted)


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    few = threads < cores and "OMP_NUM_THREADS" not in os.environ
    yield Finding(
        "cpu",
        f"{threads} threads on {cores} cores, {torch.backends.cpu.get_cpu_capability()}",
        f"torch uses {threads} of {cores} cores; set OMP_NUM_THREADS={cores}" if few else None,
    )
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        count = torch.accelerator.device_count()
        yield Finding("accelerator", f"{count} x {kind.type if kind else 'unknown'}")
        return
    # a GPU that the operating system sees and torch does not
    unused = shutil.which("nvidia-smi") is not None
    yield Finding(
        "accelerator",
        "none",
        f"there is an NVIDIA driver, but this torch ({torch.__version__}) cannot use it; install a CUDA build of torch"
        if unused
        else None,
    )


def _cache() -> Iterator[Finding]:
    folder = cache_home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Finding("cache", str(folder), f"cannot be written: {error.strerror}; unlock it, or set HF_HOME")
        return
    free = shutil.disk_usage(folder).free
    little = f"only {free / 2**30:.1f} GB are free; make room, or set HF_HOME" if free < LITTLE_DISK_BYTES else None
    yield Finding("cache", f"{folder}, {free / 2**30:.0f} GB free", little)


def _hub() -> Iterator[Finding]:
    import httpx2
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    # whether there is one, never which
    try:
        yield Finding("hub token", "none" if get_token() is None else "set")
    except OSError as error:
        yield Finding("hub token", "cannot be read", f"{error.strerror}: look at HF_HOME and HF_TOKEN_PATH")
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", f"{constants.ENDPOINT}: not asked, HF_HUB_OFFLINE is set")
        return
    remedy = "directories, files and pypi:// sources work without it; behind a mirror set HF_ENDPOINT"
    try:
        status = get_session().get(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS).status_code
    except (httpx2.HTTPError, OSError) as error:
        yield Finding("hub", constants.ENDPOINT, f"cannot be reached ({type(error).__name__}); {remedy}")
        return
    failed = status >= 500
    yield Finding("hub", f"{constants.ENDPOINT} answers {status}", f"it has failed; {remedy}" if failed else None)
