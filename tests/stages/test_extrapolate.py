from __future__ import annotations

from raypipe.stages.extrapolate import search_notes


def test_what_is_said_of_the_neighbour_search() -> None:
    classes = {"1": {"note": "raised"}, "0": {"note": ""}}
    assert search_notes({"note": "exact", "classes": classes}, ("", "dog")) == ["exact", "raised (class dog)"]
    assert search_notes({"note": ""}, ()) == []
