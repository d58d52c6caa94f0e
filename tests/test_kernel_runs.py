"""Whole runs of attentions with their own maths: from an official checkpoint, interrupted, resumed, opened again."""

import json
from itertools import pairwise

import pytest
import torch

from tests.tiny_run import SAVE, STEPS, differing, make_recipe, weights
from zoo import evaluation
from zoo.interrupts import StopAtCheckpoint
from zoo.models.attention_variants import ATTENTIONS
from zoo.train import run

SMALL = {
    "performer": {"features": 16, "redraw": 6}, "linformer": {"rank": 8, "sharing": "model"},
    "nystrom": {"landmarks": 4, "convolution": 3},
}  # fmt: skip
KERNELS = [(name, SMALL.get(name, {})) for name in ATTENTIONS]


@pytest.mark.parametrize(("name", "kwargs"), KERNELS)
def test_a_run_of_a_kernel_resumes_and_evaluates(name, kwargs, tiny_bert, r8, tmp_path, monkeypatch):
    recipe = make_recipe(tiny_bert, r8, {"max_steps": 4 * SAVE}, attention=name, attention_kwargs={name: kwargs})
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        begun = StopAtCheckpoint.on_step_end

        def end(self, args, state, control, **more):
            begun(self, args, state, control, **more)
            if state.global_step == 2 * SAVE:
                raise KeyboardInterrupt

        patch.setattr(StopAtCheckpoint, "on_step_end", end)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "resumed")
    run(recipe, tmp_path / "resumed", resume=True)
    assert differing(weights(tmp_path / "whole"), weights(tmp_path / "resumed")) == []
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["model_type"], config["attention"]) == ("zoo_bert", name)
    said = json.loads((tmp_path / "whole" / "metrics.json").read_text())["test_accuracy"]
    assert evaluation.run(tmp_path / "whole")["test_accuracy"] == pytest.approx(said)


def test_features_are_drawn_anew_while_training(tiny_bert, r8, tmp_path):
    drawn = []
    for redraw in (None, 6):
        kwargs = {"features": 16} | ({"redraw": redraw} if redraw else {})
        recipe = make_recipe(
            tiny_bert, r8, {"save_total_limit": 20}, attention="performer", attention_kwargs={"performer": kwargs}
        )
        run(recipe, tmp_path / str(redraw))
        steps = range(SAVE, STEPS + 1, SAVE)
        found = [weights(tmp_path / str(redraw) / "checkpoints" / f"checkpoint-{step}") for step in steps]
        key = next(key for key in found[0] if key.endswith("kernel.projection"))
        drawn.append(sum(not torch.equal(a[key], b[key]) for a, b in pairwise(found)))
    # before the steps 7, 13, 19, 25, 31 and 37, each between other two checkpoints
    assert drawn == [0, 6]
