"""Staging folders: what a killed process left is swept, what lives or is whole stays."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmft_core.checkpoint.staging import Staging, kept_copies
from llmft_core.cli import doctor

HOLD = """
import sys, time
from pathlib import Path
from llmft_core.checkpoint.staging import Staging
staging = Staging.open(Path(sys.argv[1]), "run", "checkpoint_00000")
(staging.folder / "half").write_bytes(b"x")
print(staging.folder, flush=True)
time.sleep(600)
"""


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "staging").iterdir())


def test_a_folder_that_is_whole_gets_its_name_and_one_that_failed_goes(tmp_path: Path) -> None:
    first, second = Staging.open(tmp_path, "r", "checkpoint_00000"), Staging.open(tmp_path, "r", "checkpoint_00001")
    assert kept_copies(tmp_path) == []
    whole = first.settle()
    second.discard()
    assert kept_copies(tmp_path) == [whole]
    assert names(tmp_path) == [whole.name], "no locks either"


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    whole = Staging.open(tmp_path, "run", "checkpoint_00000").settle()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip())
    try:
        Staging.open(tmp_path, "other", "checkpoint_00000").discard()
        assert (folder / "half").exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    Staging.open(tmp_path, "other", "checkpoint_00000").discard()
    assert names(tmp_path) == [whole.name]


def test_doctor_names_copies_that_were_never_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path))
    whole = Staging.open(tmp_path, "run", "checkpoint_00000").settle()
    (finding,) = doctor.check_cache()
    assert finding.state == "warning"
    assert str(whole) in finding.message
