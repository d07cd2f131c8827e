"""A state that cannot be published takes no run down, and one that is late keeps no run waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import on_ranks
from resuming import VOCABULARY, Case
from tables import tiny_llama
from taking_states import take_two, train_beside_a_slow_upload


@pytest.mark.parametrize("spoilt", ["store", "disk"])
def test_training_goes_on_and_the_next_state_is_complete(spoilt: str, tmp_path: Path) -> None:
    base, run = tiny_llama(tmp_path / "base", VOCABULARY), tmp_path / "run"
    case = Case("zero-2", "fp32", str(base), 2, str(run), 0)
    first, other = on_ranks(2, take_two, case, spoilt, tmp_path / "cache")
    assert first["told"] == [("unpublished", "state_00000")], "while nothing else happened"
    assert other["told"] == []
    (text,) = [event["text"] for event in first["events"] if event["kind"] == "unpublished"]
    assert "\n" not in text
    assert text.endswith("; training goes on, and the next state is taken as if nothing had happened")
    if spoilt == "disk":
        assert "state_00000 could not be written to " in text, "rank 0 heard of it"
        assert "set LLMFT_CACHE to a larger disk" in text
    assert "local copy" not in text
    assert [event["name"] for event in first["events"] if event["kind"] == "state"] == ["state_00001"]
    assert (run / "state_00001" / ".is_state").is_file()
    if spoilt == "disk":
        assert not (run / "state_00000").exists(), "what there was of it is gone from the storage too"
    assert list((tmp_path / "cache" / "staging").iterdir()) == [], "half a state is of no use to anybody"


def test_one_that_is_due_by_the_clock_waits_for_the_upload_before_it_and_training_does_not(tmp_path: Path) -> None:
    base, run = tiny_llama(tmp_path / "base", VOCABULARY), tmp_path / "run"
    case = Case("ddp", "fp32", str(base), 2, str(run), 0, total=8, at=0)
    steps, _ = on_ranks(2, train_beside_a_slow_upload, case, 5, tmp_path / "cache")
    assert steps[0] == 1
    assert steps[1] in (5, 6), "training had come so far, and did not wait"
