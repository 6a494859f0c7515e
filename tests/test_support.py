"""docs/support.md says what is so."""

from pathlib import Path

import pytest
import support_table

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
WIDE = [name for name in support_table.FAMILIES if name not in support_table.ESSENTIAL]
FAMILIES = [*support_table.ESSENTIAL, *(pytest.param(n, marks=pytest.mark.wide) for n in WIDE)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_is_found(family):
    lines = PAGE.read_text().splitlines()
    assert list(support_table.rows(family)) == [x for x in lines if x.startswith(f"| {family} |")]


def test_the_page_has_every_family_and_no_other():
    text = PAGE.read_text()
    assert text.startswith(support_table.HEAD)
    listed = [line.split(" | ")[0][2:] for line in text[len(support_table.HEAD) :].splitlines()]
    assert listed == [name for name in support_table.FAMILIES for _ in range(2)]


@pytest.mark.parametrize("family", ["codegen", "mpt"])
def test_heads_are_found_under_the_names_that_modules_give_them(family):
    model = support_table.changed(family, "replace")
    heads = {layer.block.heads for layer in model.modules() if hasattr(layer, "block")}
    assert heads == {4 if family == "codegen" else 2}
