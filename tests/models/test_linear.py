"""Linear layers by either of torch's matrix libraries: the same numbers, and only where nothing else is in the way."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import linear as module
from zoo.models.linear import is_plain, linear

REPO = Path(__file__).parents[2]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def by_onednn(monkeypatch):
    """Forces oneDNN and counts its products."""
    calls = []
    product = module._product
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_product", lambda *args: (calls.append(len(args[0])), product(*args))[1])
    return calls


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("weight", "bias")])
def test_outputs_and_gradients(by_onednn, bias, frozen):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(9, 24, requires_grad="x" not in frozen)
    for name in {"weight", "bias"} & set(frozen):
        if getattr(layer, name) is not None:
            getattr(layer, name).requires_grad_(False)
    upstream = torch.randn(40, 9).t()  # not contiguous, as what comes back from attention may be
    leaves = [leaf for leaf in (x, layer.weight, layer.bias) if leaf is not None and leaf.requires_grad]
    ours, expected = linear(layer, x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(y, leaves, upstream) for y in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert by_onednn == ([9, 9] if "x" not in frozen else [9]), "forward, and the gradient of the input"


@needs_onednn
def test_a_grid_is_a_matrix_of_its_tokens(by_onednn):
    layer, x = nn.Linear(8, 5), torch.randn(2, 3, 8, requires_grad=True)
    found = linear(layer, x.transpose(0, 1))
    assert torch.allclose(found, layer(x.transpose(0, 1)), atol=1e-6) and found.shape == (3, 2, 5)
    found.sum().backward()
    assert by_onednn == [6, 6]


@pytest.mark.parametrize("case", ["half", "hook", "forward", "subclass", "autocast"])
def test_all_else_calls_the_layer(by_onednn, case):
    layer, x = nn.Linear(8, 8), torch.randn(6, 8)
    if case == "half":
        layer, x = layer.bfloat16(), x.bfloat16()
    elif case == "hook":
        layer.register_forward_hook(lambda module, args, output: output + 1)
    elif case == "forward":
        layer.forward = lambda x: x
    elif case == "subclass":
        layer = type("Adapted", (nn.Linear,), {})(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(linear(layer, x), layer(x))
    assert by_onednn == []
    assert is_plain(layer) == (case in ("half", "autocast"))


@needs_onednn
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc for its free memory back")
def test_new_shapes_are_forgotten():
    """A process of its own, whose oneDNN has not been used: 150 batches, each of another size, leave nothing behind."""
    code = """
import ctypes, torch
from torch import nn
from zoo.models import linear as module

module.bound_onednn_caches()
module.onednn_is_faster = lambda: True
layer = nn.Linear(256, 512)

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024

def run(sizes):
    for rows in sizes:
        module.linear(layer, torch.randn(rows, 256, requires_grad=True)).sum().backward()
    return resident()

print(run(range(300, 350)), run(range(350, 500)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert after - before < 15, f"{after - before:.0f} MiB for 150 shapes"


def test_a_choice_is_made_once_a_machine():
    module.onednn_is_faster.cache_clear()
    first = module.onednn_is_faster()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert first is False
    assert module.onednn_is_faster() is first and module.onednn_is_faster.cache_info().hits == 1
