"""The design's table of judges is that of the code."""

from tests.bench.judges.table import BEGIN, DESIGN, END, placed


def test_the_design_tells_what_the_judges_say() -> None:
    """No rule was written by hand, and none is of a judge that is gone."""
    design = DESIGN.read_text()
    assert BEGIN in design
    assert END in design
    assert design == placed(design), "python -m tests.bench.judges.table"
