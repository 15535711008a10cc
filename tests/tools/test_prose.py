"""The list of phrases that prose does without."""

from __future__ import annotations

from tools.prose import found_in


def test_phrases_are_found_in_any_case_and_as_whole_words() -> None:
    text = "Nobody waits.\nThe value by itself is 5.\nAmended.\nso manyfold\n"
    assert list(found_in("a.md", text)) == ["a.md:1: 'Nobody'", "a.md:2: 'by itself'"]
