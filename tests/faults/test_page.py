"""docs/faults.md is what the tests say."""

from __future__ import annotations

from tests.faults import page


def test_the_page_is_that_of_the_tests():
    assert (page.ROOT / "docs" / "faults.md").read_text(encoding="utf-8") == page.page(), "run `make faults`"
    assert len(page.rows()) >= 40
