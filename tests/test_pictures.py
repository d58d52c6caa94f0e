"""The pictures of docs/attention.md are what the patterns see."""

from pathlib import Path

import pytest

from zoo.models.attention_variants import ATTENTIONS
from zoo.models.masks import MASKS
from zoo.pictures import LENGTH, SHOWN, picture

PAGE = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MASKS)
def test_a_picture_is_what_a_pattern_sees(name):
    drawn = picture(name)
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert f"```text\n{drawn}\n```" in section
    lines = drawn.splitlines()
    assert len(lines) == LENGTH and all(line[row] == line[LENGTH + 3 + row] == "■" for row, line in enumerate(lines))


def test_each_variant_has_a_section():
    assert set(SHOWN) == set(MASKS)
    assert all(f"\n## {name}\n" in PAGE for name in (*MASKS, *ATTENTIONS))
