"""Cross entropy from hidden states against cross entropy of the whole logits."""

import copy

import bitsandbytes
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.models.losses import CHUNK_ROWS, linear_cross_entropy

WIDTH, VOCAB = 16, 50


def make(rows, bias=True, dtype=torch.float64, ignored=0.3, seed=0):
    """(hidden, head, labels); values spread so that a softmax is far from even."""
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, VOCAB, bias=bias).to(dtype)
    hidden = (2 * torch.randn(rows, WIDTH)).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return hidden, head, labels


def reference(hidden, head, labels, num_items=None):
    logits = head(hidden)
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


def assert_same(hidden, head, labels, num_items=None, factor=1.0, tolerance=1e-12):
    leaves = [hidden, *head.parameters()]
    ours, theirs = (f(hidden, head, labels, num_items) for f in (linear_cross_entropy, reference))
    assert abs(ours - theirs) <= tolerance * max(1, abs(theirs))
    gradients = [torch.autograd.grad(loss * factor, leaves) for loss in (ours, theirs)]
    for gradient, wanted in zip(*gradients, strict=True):
        assert gradient.dtype == wanted.dtype
        assert (gradient - wanted).abs().max() <= tolerance * factor * max(1e-2, wanted.abs().max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 37])
def test_value_and_gradients(rows, bias):
    assert_same(*make(rows, bias, ignored=0.0))


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(900)])
@pytest.mark.parametrize("factor", [1.0, 0.25, 1000.0])
def test_ignored_rows_counts_of_a_whole_batch_and_upstream_factors(num_items, factor):
    assert_same(*make(611, ignored=0.4), num_items, factor)


def test_gradcheck():
    hidden, head, labels = make(9)
    weight, bias = (p.detach().requires_grad_() for p in head.parameters())

    def loss(hidden, weight, bias):
        head.weight, head.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        del head._parameters["weight"], head._parameters["bias"]
        head.weight, head.bias = weight, bias
        return linear_cross_entropy(hidden, head, labels)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_float32_and_bfloat16():
    assert_same(*make(700, dtype=torch.float32), tolerance=1e-5)
    hidden, head, labels = make(700, dtype=torch.bfloat16)
    exact_head, exact = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    loss, expected = linear_cross_entropy(hidden, head, labels), reference(exact, exact_head, labels)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 0.01 * expected
    loss.backward()
    expected.backward()
    pairs = [(hidden, exact), (head.weight, exact_head.weight), (head.bias, exact_head.bias)]
    for ours, wanted in pairs:
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad - wanted.grad).norm() < 0.02 * wanted.grad.norm()


def test_no_labelled_row_is_nan_as_torch_has_it():
    hidden, head, _ = make(5)
    labels = torch.full((5,), -100)
    assert reference(hidden, head, labels).isnan()
    assert linear_cross_entropy(hidden, head, labels).isnan()
    loss = linear_cross_entropy(hidden, head, labels, num_items=3)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    hidden, head, labels = make(300)
    named = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    named.pop(frozen).requires_grad_(False)
    linear_cross_entropy(hidden, head, labels).backward()
    expected = torch.autograd.grad(reference(hidden, head, labels), list(named.values()))
    for name, gradient in zip(named, expected, strict=True):
        assert (named[name].grad - gradient).abs().max() < 1e-12, name
    assert (hidden.grad is None) == (frozen == "hidden")


def test_shared_weights_collect_both_gradients():
    """The head's weight is also the embedding's: both uses add up."""
    _, head, labels = make(40, bias=False)
    ids = torch.randint(VOCAB, (40,))
    gradients = []
    for loss in (linear_cross_entropy, reference):
        hidden = F.embedding(ids, head.weight)
        gradients.append(torch.autograd.grad(loss(hidden, head, labels), head.weight)[0])
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


def test_accumulated_micro_batches_equal_the_whole_batch():
    hidden, head, labels = make(500, ignored=0.5)
    items = int((labels != -100).sum())
    parts = [linear_cross_entropy(h, head, y, items) for h, y in zip(hidden.split(123), labels.split(123), strict=True)]
    whole = linear_cross_entropy(hidden, head, labels)
    assert abs(sum(parts) - whole) < 1e-12
    pairs = zip(torch.autograd.grad(sum(parts), [hidden, *head.parameters()]),
                torch.autograd.grad(whole, [hidden, *head.parameters()]), strict=True)  # fmt: skip
    assert all((a - b).abs().max() < 1e-12 for a, b in pairs)


def lora(head):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

    config = peft.LoraConfig(target_modules=["head"], init_lora_weights=False, lora_dropout=0.0)
    return peft.get_peft_model(Net(), config).base_model.model.head


def trained_copy(head):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(2, 2), head

    config = peft.LoraConfig(target_modules=["first"], modules_to_save=["head"])
    wrapper = peft.get_peft_model(Net(), config).base_model.model.head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
    return wrapper


def hooked(head):
    head.register_forward_hook(lambda module, args, output: 2 * output)
    return head


def pre_hooked(head):
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return head


def backward_hooked(head):
    head.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))
    return head


def patched(head):
    """As accelerate patches a module whose weights it offloads."""
    original = head.forward
    head.forward = lambda x: original(x) / 2
    return head


def normed(head):
    return nn.utils.parametrizations.weight_norm(head)


def pruned(head):
    return prune.l1_unstructured(head, "weight", 0.5)


def quantised(head):
    layer = bitsandbytes.nn.Linear4bit(WIDTH, VOCAB, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(head.state_dict())
    return layer.to("cpu")


CHANGED = [lora, trained_copy, hooked, pre_hooked, backward_hooked, patched, normed, pruned, quantised]


@pytest.mark.parametrize("change", CHANGED, ids=lambda f: f.__name__)
def test_a_head_that_is_more_than_linear_is_called(change):
    hidden, plain, labels = make(30, dtype=torch.float32)
    before = reference(hidden, copy.deepcopy(plain), labels)
    changed = change(plain)
    leaves = [hidden, *(p for p in changed.parameters() if p.requires_grad and p.is_floating_point())]
    ours, theirs = (f(hidden, changed, labels) for f in (linear_cross_entropy, reference))
    assert abs(ours - theirs) < 1e-5
    assert (abs(theirs - before) > 1e-3) == (change not in (backward_hooked, normed))
    gradients = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (ours, theirs)]
    for gradient, wanted in zip(*gradients, strict=True):
        assert (gradient is None) == (wanted is None)
        assert wanted is None or (gradient - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_as_near_as_whole_logits_are(dtype):
    """To the loss and gradients in fp64; the weights stay in fp32, and so do their gradients."""
    hidden, head, labels = make(2 * CHUNK_ROWS + 37, dtype=torch.float32)
    leaves = [hidden, *head.parameters()]
    exact_head, exact = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    expected = reference(exact, exact_head, labels)
    wanted = torch.autograd.grad(expected, [exact, *exact_head.parameters()])
    errors = []
    for loss in (linear_cross_entropy, lambda *given: F.cross_entropy(head(hidden).float(), labels)):
        with torch.autocast("cpu", dtype=dtype):
            found = loss(hidden, head, labels)
        assert found.dtype == torch.float32
        gradients = torch.autograd.grad(found, leaves)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        off = [(a - b).norm() / b.norm() for a, b in zip(gradients, wanted, strict=True)]
        errors.append(torch.stack([abs(found - expected) / expected, *off]))
    assert (errors[0] <= 1.1 * errors[1] + 1e-5).all() and (errors[1] < 0.02).all()


def test_a_loss_scaled_for_fp16():
    """By a factor that is more than fp16 holds, where the gradient is not."""
    hidden, head, labels = make(40, dtype=torch.float16)
    with torch.no_grad():
        head.weight.mul_(0.01)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, head, labels, 1) * 2.0**17, [hidden])
    assert gradient.isfinite().all() and gradient.abs().max() > 100


def test_a_sum_that_fp16_does_not_hold():
    """Only the mean must fit, as it does where whole logits are divided first."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB).half()
    hidden = (10 + torch.randn(8192, WIDTH)).half().requires_grad_()
    labels = torch.zeros(8192, dtype=torch.long)
    found = [
        torch.autograd.grad(loss, head.weight)[0]
        for loss in (linear_cross_entropy(hidden, head, labels), F.cross_entropy(head(hidden).float(), labels))
    ]
    assert found[0].isfinite().all() and (found[0] - found[1]).abs().max() < 0.05


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_logits_are_never_whole(autocast):
    rows = 8 * CHUNK_ROWS
    hidden, head, labels = make(rows, ignored=0.0, dtype=torch.float32)
    sizes = {}
    for loss in (linear_cross_entropy, reference):
        with Largest() as largest, torch.autocast("cpu", enabled=autocast):
            loss(hidden, head, labels).backward()
        sizes[loss] = largest.elements
    assert sizes[reference] == rows * VOCAB
    assert sizes[linear_cross_entropy] <= max(CHUNK_ROWS * VOCAB, rows * WIDTH)
