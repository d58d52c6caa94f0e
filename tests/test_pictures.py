"""The pictures of docs/attention.md are what the patterns see."""

from pathlib import Path

import pytest

from zoo.models.attention_variants import ATTENTIONS
from zoo.models.masks import MASKS
from zoo.pictures import LENGTH, SHADES, SHOWN, picture

PAGE = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", (*MASKS, *ATTENTIONS))
def test_a_section_has_its_picture(name):
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert f"```text\n{picture(name)}\n```" in section


@pytest.mark.parametrize("name", MASKS)
def test_a_pattern_sees_itself(name):
    lines = picture(name).splitlines()
    assert len(lines) == LENGTH and all(line[row] == line[LENGTH + 3 + row] == "■" for row, line in enumerate(lines))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_kernel_beside_full_attention(name):
    """Full attention is sharpest at the token itself; and a kernel that is full attention is drawn as it is."""
    lines = picture(name).splitlines()
    assert len(lines) == LENGTH and all(line[row] == SHADES[-1] for row, line in enumerate(lines))
    full = [line[:LENGTH] for line in lines]
    exact = {"linformer": {"rank": LENGTH}, "nystrom": {"landmarks": LENGTH}}.get(name)
    if exact:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHOWN, name, exact)
            assert picture(name).splitlines() == [f"{line}   {line}" for line in full]
