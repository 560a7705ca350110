"""Problems of tables by kind: how many, and the first ids."""

from __future__ import annotations

from raypipe.tables.problems import MAX_IDS, ProblemCounts


def test_many_problems_are_counted_and_the_first_are_named() -> None:
    problems = ProblemCounts()
    problems.add("embedding_missing", (f"i{number}" for number in range(1000)))
    assert problems.as_dict() == {
        "embedding_missing": {"count": 1000, "ids": [f"i{number}" for number in range(MAX_IDS)]}
    }
    assert problems.lines() == [
        "samples whose embedding is null, left out: 1,000 (i0, i1, i2, i3, i4, ...)"
    ]
