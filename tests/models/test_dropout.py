"""Dropout from random bytes: its rate, its scale, its gradient, and torch's own wherever a graph is taken."""

import math

import pytest
import torch
from torch import nn

from zoo.models.dropout import Dropout, random_bytes, random_keep, thinning_rate

RATES = [0.1, 0.25, 0.9]


def drop(p, inputs, seed=0):
    torch.manual_seed(seed)
    return Dropout(p).train()(inputs)


def test_nothing_or_everything_is_dropped_at_the_ends():
    inputs = torch.randn(5, 7)
    assert torch.equal(drop(0.0, inputs), inputs)
    assert torch.equal(drop(1.0, inputs), torch.zeros(5, 7))
    assert Dropout(0.4).eval()(inputs) is inputs
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.3, 0.999])
def test_bytes_and_thinning_drop_the_share_they_say(p):
    """A byte below the threshold, or at least one of a Poisson number of hits."""
    by_bytes, by_hits = math.floor(256 * p) / 256, 1 - math.exp(-thinning_rate(p))
    assert 0 <= by_bytes <= p and by_hits >= 0
    assert by_bytes + (1 - by_bytes) * by_hits == pytest.approx(p, abs=1e-12)


def test_bytes_are_uniform_in_each_lane():
    """Every eighth byte would never have its top bit set, were the range of `random_` left open."""
    torch.manual_seed(0)
    count = 1 << 21
    for lane in random_bytes(count).view(-1, 8).unbind(1):
        # chi-square over the 256 values: 255 +- 4 sigma
        counts = torch.bincount(lane.int(), minlength=256).double()
        statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert abs(statistic - 255) < 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("p", RATES)
def test_keep_rate_of_each_lane_and_scale(p):
    output = drop(p, torch.ones(1 << 21, dtype=torch.float64))
    kept = output != 0
    assert torch.equal(output[kept], torch.full_like(output[kept], 1 / (1 - p)))
    # whole standard errors are smaller than the share that the thinning adds: 0.1 is 25 / 256 and 0.0023 more
    assert abs(kept.double().mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5 < 0.0023
    lanes = kept.view(-1, 8).double()
    sigma = (p * (1 - p) / len(lanes)) ** 0.5
    assert ((lanes.mean(0) - (1 - p)).abs() < 4 * sigma).all()
    correlation = torch.corrcoef(lanes.T) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / len(lanes) ** 0.5
    later = (lanes[1:] - lanes.mean()) * (lanes[:-1] - lanes.mean())
    assert (later.mean(0).abs() < 4 * sigma**2 * len(lanes) ** 0.5).all(), "neighbouring words"


@pytest.mark.parametrize("p", [0.1, 0.003])
def test_what_is_dropped_in_a_block_is_binomial(p):
    """Hits thrown together on a whole tensor still fall on its parts independently: variance and tail."""
    torch.manual_seed(1)
    size, blocks = 1000, 2000
    dropped = (~random_keep(size * blocks, p)).view(blocks, size).sum(1).double()
    assert abs(dropped.mean() - size * p) < 4 * (size * p * (1 - p) / blocks) ** 0.5
    variance = size * p * (1 - p)
    # the variance of a sample variance: 2 sigma^4 / (n - 1) and a little for a binomial's tails
    assert abs(dropped.var() - variance) < 4.5 * variance * (2 / (blocks - 1)) ** 0.5


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 13), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_and_gradient_are_mask_times_scale(shape, dtype):
    """The mask of a seed is read off a tensor of ones; any other input and gradient must meet the same one."""
    mask = drop(0.3, torch.ones(shape, dtype=dtype)) != 0
    inputs = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    output = drop(0.3, inputs)
    assert output.dtype == dtype
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(output, inputs.detach() * mask * (1 / 0.7), **tolerance)
    (gradient,) = torch.autograd.grad(output, inputs, upstream)
    torch.testing.assert_close(gradient, upstream * mask * (1 / 0.7), **tolerance)


def test_strides_do_not_move_the_mask():
    inputs = torch.randn(6, 10, 4)
    for view in (inputs.transpose(0, 1), inputs[:, ::3], inputs[..., 1], inputs[:1].expand(6, 10, 4)):
        strided = view.detach().requires_grad_()
        output, expected = drop(0.5, strided), drop(0.5, view.clone(memory_format=torch.contiguous_format))
        assert torch.equal(output, expected)
        (gradient,) = torch.autograd.grad(output.sum(), strided)
        assert torch.equal(gradient * view, expected)


def test_gradcheck():
    inputs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: drop(0.4, x), inputs)


def test_only_torchs_seed_matters_and_its_state_can_be_restored():
    inputs = torch.ones(1000)
    assert torch.equal(drop(0.5, inputs, seed=3), drop(0.5, inputs, seed=3))
    assert not torch.equal(drop(0.5, inputs, seed=3), drop(0.5, inputs, seed=4))
    state = torch.get_rng_state()
    first, second = Dropout(0.5)(inputs), Dropout(0.5)(inputs)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(Dropout(0.5)(inputs), first)


def test_an_exported_or_compiled_model_has_torchs_own_dropout():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = Dropout(0.3)

        def forward(self, x):
            return self.dropout(x) + 1

    net, inputs = Net().train(), torch.ones(400)
    torch.manual_seed(0)
    expected = nn.functional.dropout(inputs, 0.3) + 1
    exported = torch.export.export(net, (inputs,))
    assert torch.ops.aten.dropout.default in {node.target for node in exported.graph.nodes}
    torch.manual_seed(0)
    assert torch.equal(exported.module()(inputs), expected)
    torch.manual_seed(0)
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(inputs), expected)
    torch.manual_seed(0)
    assert not torch.equal(net(inputs), expected)


@pytest.mark.parametrize("p", [1 - 2**-20, 1.0])
def test_rates_up_to_one_are_finite(p):
    torch.manual_seed(0)
    out = Dropout(p).train()(torch.ones(1000))
    assert torch.isfinite(out).all()
    assert random_keep(1000, p).sum() <= 5
