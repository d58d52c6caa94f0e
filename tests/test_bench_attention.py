"""The bench of attention alone: what it measures, how it adds up, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.commands import zoo
from zoo.bench import attention
from zoo.bench.attention import EAGER, KWARGS, PASSES, draw, run, table
from zoo.errors import UserError
from zoo.models.attention_variants import ATTENTIONS, FULL
from zoo.models.masks import MASKS

SHAPE = {"heads": 2, "width": 8, "causal": False}


def test_every_variant_is_measured():
    assert set(KWARGS) == {*MASKS, *ATTENTIONS}


@pytest.mark.parametrize("causal", [False, True])
def test_subjects_compute_attention(causal):
    """With parameters that hide nothing each pattern is full attention, and so is softmax of all scores."""
    wide = {
        "local": {"window": 999}, "dilated": {"window": 999, "dilation": 1}, "block": {"size": 999},
        "fixed": {"stride": 999}, "longformer": {"window": 999}, "sinks": {"window": 999},
        "bigbird": {"block_size": 999},
    }  # fmt: skip
    shape = {"heads": 2, "width": 8, "causal": causal}
    states = attention._inputs(600, 2, 8)
    expected = attention._subject(FULL, 600, kwargs=KWARGS, **shape)(*states)
    for name in (*wide, EAGER):
        found = attention._subject(name, 600, kwargs=wide, **shape)(*states)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5, name


def test_a_whole_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "SLOPE_FROM", 512)
    result = run(["local", "performer"], [64, 512, 1024], rounds=2, kwargs={"local": {"window": 32}}, **SHAPE)
    assert [entry["length"] for entry in result["results"]] == [64, 512, 1024]
    for entry in result["results"]:
        assert list(entry["variants"]) == [FULL, "local", "performer"]
        for name, found in entry["variants"].items():
            low, high = found["training_ratio_range"]
            assert low <= found["training_ratio"] <= high and found["memory_bytes"] >= 0
            assert found["training_ms"] > 0 and found["forward_ms"] > 0, name
        assert entry["variants"][FULL]["training_ratio"] == 1.0
    assert result["attention_kwargs"] == {"local": {"window": 32}, "performer": {"features": 256}}
    assert all(set(slopes) == set(PASSES) for slopes in result["slopes"].values())
    shown = table(result)
    ratio = result["results"][2]["variants"]["local"]["training_ratio"]
    assert f"**{ratio:.2f}x**" in shown and "| `local` window 32 |" in shown
    assert f"| {result['slopes']['local']['training']:.2f} |" in shown
    draw(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        draw(result, tmp_path / "nowhere" / "curves.png")


def test_slopes_are_powers_of_the_length():
    entries = [
        {"length": n, "variants": {"x": {"training_ms": 3e-6 * n**1.5, "forward_ms": 1e-3 * n}}}
        for n in (512, 2048, 4096, 8192)
    ]
    entries[0]["variants"]["x"] = {"training_ms": 99.0, "forward_ms": 99.0}
    slopes = attention._slopes("x", entries)
    assert slopes == {"training": pytest.approx(1.5), "forward": pytest.approx(1.0)}
    assert attention._slopes("x", entries[:2]) is None


def test_what_has_no_room_is_left_out(monkeypatch):
    monkeypatch.setattr(attention.psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 2**20))
    result = run([EAGER, "taylor"], [1024, 64, 512], rounds=1, kwargs={}, **SHAPE)
    assert [entry["length"] for entry in result["results"]] == [64, 512, 1024]
    assert [EAGER in entry["variants"] for entry in result["results"]] == [True, False, False]
    assert "| `eager` |" in table(result) and "no room" in table(result)


@pytest.mark.parametrize("known, expected", [
    ([], 0), ([(512, 100)], 200), ([(256, 100), (512, 400)], 1600), ([(256, 100), (512, 200)], 400),
    # what is there at any length hides how the rest grows, and noise can make it look worse
    ([(256, 0), (512, 0)], 0), ([(256, 100), (512, 99)], 198), ([(256, 1), (512, 100)], 400),
])  # fmt: skip
def test_what_a_length_needs_is_told_by_shorter_ones(known, expected):
    shorter = [{"length": n, "variants": {"taylor": {"memory_bytes": m}}} for n, m in known]
    assert attention._expected_bytes("taylor", 1024, 2, shorter) == pytest.approx(expected)


def test_memory_of_full_scores_grows_with_the_square():
    small, large = (attention._in_own_process(EAGER, n, SHAPE | {"dtype": "float32"}, KWARGS) for n in (512, 2048))
    # four times the tokens: sixteen times as much, but for what is there at any length
    assert large > 2 * 4 * 2 * 2048**2 and large > 5 * small


def test_random_queries_are_the_same_each_time():
    assert all(torch.equal(a, b) for a, b in zip(*(attention._inputs(8, 2, 4) for _ in range(2)), strict=True))


def test_the_command(tmp_path):
    arguments = ("linear", "--length", "64", "--rounds", "1", "--heads", "2", "--width", "8", "--json")
    status, output, errors = zoo("bench", "attention", *arguments, cwd=tmp_path)
    assert status == 0, errors
    assert list(json.loads(output)["results"][0]["variants"]) == ["full", "linear"]


WRONG = [
    (["locle"], "no variant is called locle"), (["linformer", "--causal"], "linformer cannot be causal"),
    (["--attention-kwargs", "{"], "not JSON"), (["--attention-kwargs", "[]"], "parameters by variant"),
    (["--attention-kwargs", '{"local": {"windw": 3}}'], "unknown key; did you mean window"),
    (["--attention-kwargs", '{"locl": {}}'], "no variant is called locl; did you mean local"),
    (["linformer", "--length", "64", "--length", "512"], "linformer.rank 256 is more than its length, 64"),
    (["local", "--attention-kwargs", '{"local": {"window": 0}}', "--length", "64"], "local.window is a number"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_refused_in_words(arguments, message, tmp_path):
    status, _, errors = zoo("bench", "attention", *arguments, cwd=tmp_path)
    assert status == 2 and message in errors and "Traceback" not in errors
