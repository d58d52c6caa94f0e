"""Each kernel against its paper: formulas, laws of its error, and what it is equal to."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo.models import linear_attention
from zoo.models.attention_variants import ATTENTIONS
from zoo.models.linformer import Linformer
from zoo.models.nystrom import Nystrom, pseudoinverse
from zoo.models.performer import Performer, random_directions

HEADS, WIDTH, SCALING = 3, 8, 0.4
CONFIG = SimpleNamespace(max_position_embeddings=64)
KWARGS = {"linformer": {"rank": 16}, "performer": {"features": 32}, "nystrom": {"landmarks": 8}}


def make(name, causal=False, **kwargs):
    torch.manual_seed(0)
    kernel = ATTENTIONS[name](CONFIG, HEADS, WIDTH, causal, **(KWARGS.get(name, {}) | kwargs))
    kernel.initialise()
    return kernel.double()


def draw(queries, keys=None, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(length):
        return size * torch.randn(2, HEADS, length, WIDTH, dtype=torch.float64, generator=generator)

    return normal(queries), normal(keys or queries), normal(keys or queries)


def softmax(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=SCALING)


def error(kernel, length=64, seeds=4, size=1.0):
    """Relative error against full attention, mean of several inputs."""
    found = []
    for seed in range(seeds):
        q, k, v = draw(length, seed=seed, size=size)
        found.append((kernel(q, k, v, SCALING) - softmax(q, k, v)).norm() / softmax(q, k, v).norm())
    return float(torch.stack(found).mean())


# Linear attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 16, 37])
def test_linear_attention_is_its_formula(causal, length, monkeypatch):
    """arXiv 2006.16236, equations 4 and 9, pair by pair; in one chunk and in several, with their gradients."""
    leaves = [x.requires_grad_() for x in draw(length)]
    q, k, v = leaves
    similar = (F.elu(q * SCALING**0.5) + 1) @ (F.elu(k * SCALING**0.5) + 1).transpose(2, 3)
    similar = similar.tril() if causal else similar
    expected = (similar / similar.sum(-1, keepdim=True)) @ v
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for chunk in (128, 8):
        monkeypatch.setattr(linear_attention, "CHUNK", chunk)
        ours = make("linear", causal)(q, k, v, SCALING)
        assert (ours - expected).abs().max() < 1e-12
        for a, b in zip(torch.autograd.grad(ours, leaves, upstream), wanted, strict=True):
            assert (a - b).abs().max() < 1e-11


# Performer


def estimates(x, y, features, orthogonal, draws=400):
    """(draws,): phi(x) . phi(y), the estimates of exp(x . y)."""
    kernel = Performer(CONFIG, 1, len(x), True, features=features, orthogonal=orthogonal).double()
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        kernel.redraw_features()
        # of a causal kernel keys have no factor taken out; a query's own one is put back
        by_key = kernel.features(y[None], False)[0]
        exponents = x @ kernel.projection.T - x.square().sum() / 2
        found.append((exponents.exp() * features**-0.5) @ by_key)
    return torch.stack(found)


PAIRS = [torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) * 0.2 for s in range(3)]


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_favor_is_unbiased(pair, orthogonal):
    """arXiv 2009.14794, lemma 1: the mean is exp(x . y), within three standard errors."""
    x, y = pair
    found = estimates(x, y, 32, orthogonal)
    assert abs(found.mean() - (x @ y).exp()) < 3 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("pair", PAIRS)
def test_favors_error_is_that_of_lemma_2(pair):
    """MSE = (1/m) exp(|x + y|^2) SM(x, y)^2 (1 - exp(-|x + y|^2)), so it halves as m doubles."""
    x, y = pair
    exact, size = (x @ y).exp(), (x + y).square().sum()
    for features in (16, 64):
        found = (estimates(x, y, features, False, draws=1000) - exact).square().mean()
        expected = size.exp() * exact**2 * (1 - (-size).exp()) / features
        assert 0.75 < found / expected < 1.35, features


def test_orthogonal_features_err_less():
    """Theorem 2, on the mean of many pairs."""
    found = {}
    for orthogonal in (False, True):
        errors = [
            (estimates(x, y, 16, orthogonal, draws=300) - (x @ y).exp()).square().mean() / (x @ y).exp() ** 2
            for x, y in PAIRS
        ]
        found[orthogonal] = float(torch.stack(errors).mean())
    assert found[True] < found[False], found


def test_orthogonal_directions():
    drawn = random_directions(20, 8).double()
    for block in drawn.split(8):
        product = block @ block.T
        assert (product - product.diagonal().diag()).abs().max() < 1e-4
    # norms of a normal vector, not all alike
    assert abs(random_directions(4000, 8).square().sum(1).mean() - 8) < 0.3 and drawn.norm(dim=1).std() > 0.1


@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("causal", [False, True])
def test_features_and_denominators_are_positive(size, causal):
    """However large queries and keys are, no output is infinite or nan."""
    q, k, v = draw(40, size=size)
    kernel = make("performer", causal)
    assert (kernel.features(q, True) >= 0).all() and (kernel.features(k, False) >= 0).all()
    assert torch.isfinite(kernel(q, k, v, SCALING)).all()
    assert torch.isfinite(kernel.float()(q.float(), k.float(), v.float(), SCALING)).all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_finite_where_nothing_is_similar(causal):
    """Queries and keys so large that features underflow in fp32."""
    leaves = [x.detach().float().requires_grad_() for x in draw(300, size=15 if causal else 40)]
    output = make("performer", causal).float()(*leaves, SCALING)
    output.sum().backward()
    assert (output == 0).any() and all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("chunk", [128, 16, 7])
def test_causal_performer_is_the_quadratic_form(chunk, monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNK", chunk)
    q, k, v = draw(50)
    kernel = make("performer", True)
    pairs = (kernel.features(q * SCALING**0.5, True) @ kernel.features(k * SCALING**0.5, False).transpose(2, 3)).tril()
    assert (kernel(q, k, v, SCALING) - pairs / pairs.sum(-1, keepdim=True) @ v).abs().max() < 1e-12


def test_performers_error_falls_as_features_grow():
    errors = [error(make("performer", features=features), size=0.5) for features in (16, 64, 256, 1024)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 3, errors


# Causal kernels


CAUSAL = [name for name, kernel in ATTENTIONS.items() if kernel.causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_changes_nothing(name):
    """Even one of a size at which a common factor of all keys would leave nothing of the others."""
    q, k, v = draw(300)
    kernel = make(name, True)
    before = kernel(q, k, v, SCALING)[:, :, :200]
    k[:, :, 200:] *= 30
    v[:, :, 200:] += 5
    assert torch.equal(kernel(q, k, v, SCALING)[:, :, :200], before)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("first", [1, 20, 49])
def test_sums_go_on_where_they_were(name, first):
    q, k, v = draw(50)
    kernel = make(name, True)
    expected, total = kernel.with_sums(q, k, v, SCALING)
    head, sums = kernel.with_sums(*(x[:, :, :first] for x in (q, k, v)), SCALING)
    tail, sums = kernel.with_sums(*(x[:, :, first:] for x in (q, k, v)), SCALING, sums)
    assert (torch.cat([head, tail], 2) - expected).abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(sums, total, strict=True))
    assert sums[0].shape[2:] == (sums[1].shape[2], WIDTH), "of a size that does not grow"


# Linformer


@pytest.mark.parametrize("sharing", ["head", "layer", "model"])
@pytest.mark.parametrize("length", [1, 30, 64])
def test_linformer_with_a_slot_for_each_token_is_full_attention(sharing, length):
    q, k, v = draw(length)
    kernel = make("linformer", rank=64, sharing=sharing)
    assert (kernel(q, k, v, SCALING) - softmax(q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("length", [1, 2, 5, 33, 64])
def test_linformer_begins_with_means_of_any_text(length):
    """Of values that are all one, one: a slot that a short text fills in part is the mean of that part."""
    q, k, v = draw(length)
    out = make("linformer")(q, k, torch.ones_like(v), SCALING)
    assert (out - 1).abs().max() < 1e-12


def test_linformer_attends_to_slots_that_begin_within_a_text():
    """Whatever it has learned: of 64 positions in 16 slots, ten tokens begin three."""
    kernel, states = make("linformer"), draw(10)
    with torch.no_grad():
        for projection in (kernel.key_projection, kernel.value_projection):
            projection.add_(0.3 * torch.randn_like(projection))
        before = kernel(*states, SCALING)
        for projection in (kernel.key_projection, kernel.value_projection):
            projection[:, 3:] += 1
        assert torch.equal(kernel(*states, SCALING), before)
        kernel.value_projection[:, 2] += 1
        assert not torch.allclose(kernel(*states, SCALING), before)


def test_linformer_is_its_formula():
    """arXiv 2006.04768, equation 7."""
    q, k, v = draw(40)
    kernel = make("linformer", start="random")
    by_key, by_value = kernel.key_projection[0, :, :40], kernel.value_projection[0, :, :40]
    assert (kernel(q, k, v, SCALING) - softmax(q, by_key @ k, by_value @ v)).abs().max() < 1e-12


def test_linformers_error_falls_as_the_rank_grows():
    errors = [error(make("linformer", rank=rank)) for rank in (4, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12, errors


def test_linformers_parameters():
    """E and F of (rank, length): of each head, or of all."""
    count = {
        sharing: sum(p.numel() for p in make("linformer", sharing=sharing).parameters())
        for sharing in ("head", "layer")
    }
    assert count == {"head": 2 * HEADS * 16 * 64, "layer": 2 * 16 * 64}


def test_linformer_refuses_what_is_too_long():
    with pytest.raises(ValueError, match="65 tokens: this Linformer takes 64 at most"):
        make("linformer")(*draw(65), SCALING)


# Nyström


def test_nystrom_of_few_tokens_is_full_attention():
    q, k, v = draw(8)
    assert (make("nystrom")(q, k, v, SCALING) - softmax(q, k, v)).abs().max() < 1e-12


def test_nystrom_is_its_formula():
    """arXiv 2102.03902, equation 13, with landmarks of equal shares and a pseudoinverse by singular values."""
    q, k, v = draw(40)
    landmarks = [x.unflatten(2, (8, 5)).mean(3) for x in (q, k)]
    left = torch.softmax(SCALING * q @ landmarks[1].transpose(2, 3), -1)
    middle = torch.softmax(SCALING * landmarks[0] @ landmarks[1].transpose(2, 3), -1)
    right = torch.softmax(SCALING * landmarks[0] @ k.transpose(2, 3), -1)
    expected = left @ pseudoinverse(middle, 40) @ right @ v
    ours = make("nystrom")._by_landmarks(q * SCALING, k, v)
    assert (pseudoinverse(middle, 40) - torch.linalg.pinv(middle)).abs().max() < 1e-6
    six = left @ pseudoinverse(middle, 6) @ right @ v
    assert (ours - six).abs().max() < 1e-12 and torch.isfinite(expected).all()


def test_nystroms_error_falls_with_more_landmarks():
    """On queries and keys that change slowly along the text; of many landmarks six iterations leave some error."""
    q, k, v = (x.cumsum(2) / 8 for x in draw(256))
    full, errors = softmax(q, k, v), []
    for count in (2, 4, 16, 256):
        errors.append(float((make("nystrom", landmarks=count)(q, k, v, SCALING) - full).norm() / full.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9, errors


def test_nystroms_convolution_is_added():
    q, k, v = draw(20)
    kernel = make("nystrom", convolution=3)
    plain = make("nystrom")(q, k, v, SCALING)
    assert (kernel(q, k, v, SCALING) - plain).abs().max() < 1e-12, "it begins at nothing"
    kernel.convolution.data[:, 0] = torch.tensor([0.0, 0.0, 1.0])
    following = F.pad(v[:, :, 1:], (0, 0, 0, 1))
    assert (kernel(q, k, v, SCALING) - plain - following).abs().max() < 1e-12


# All


@pytest.mark.parametrize("name", [name for name, kernel in ATTENTIONS.items() if kernel.cross])
def test_across_two_texts(name):
    """Queries of one over the keys of another; a text over itself is self-attention."""
    q, k, v = draw(13, 40)
    assert make(name)(q, k, v, SCALING).shape == q.shape
    whole, part = make(name)(k, k, v, SCALING), make(name)(k[:, :, :13], k, v, SCALING)
    assert (whole[:, :, :13] - part).abs().max() < 1e-12


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_do_not_meet(name):
    q, k, v = draw(40)
    both = make(name)(q, k, v, SCALING)
    alone = make(name)(*(x[1:] for x in (q, k, v)), SCALING)
    assert (both[1:] - alone).abs().max() < 1e-12


REFUSED = [
    ("linformer", {"rank": 0}, "linformer.rank is a whole number of at least 1, not 0"),
    ("linformer", {"rank": 65}, "linformer.rank 65 is more than its length, 64"),
    ("linformer", {"rank": 9, "max_length": 8}, "linformer.rank 9 is more than its length, 8"),
    ("linformer", {"rank": 4, "sharing": "all"}, "linformer.sharing is one of head, layer, model"),
    ("linformer", {"rank": 4, "start": 1}, "linformer.start is one of mean, random"),
    ("performer", {"features": 2.5}, "performer.features is a whole number of at least 1, not 2.5"),
    ("performer", {"features": True}, "performer.features"), ("performer", {"redraw": 0}, "performer.redraw"),
    ("performer", {"orthogonal": 1}, "performer.orthogonal is true or false"),
    ("nystrom", {"landmarks": "8"}, "nystrom.landmarks"), ("nystrom", {"convolution": 4}, "an odd number of tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "message"), REFUSED)
def test_refuses_in_words(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ATTENTIONS[name].check(CONFIG, **kwargs)


def test_no_length_to_take():
    with pytest.raises(ValueError, match=r"linformer\.max_length is missing"):
        Linformer.check(SimpleNamespace(), rank=4)
    Linformer.check(SimpleNamespace(), rank=4, max_length=8)
    Nystrom.check(SimpleNamespace())
