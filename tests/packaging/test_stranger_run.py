"""A whole run with a dataset, a storage backend and a strategy that llmft has never heard of."""

from __future__ import annotations

from pathlib import Path

from wheels import Wheels


def test_a_run_with_three_plugins_of_a_stranger(wheels: Wheels, tmp_path: Path) -> None:
    done = wheels.with_packages("hello").llmft(
        *("run", "--name", "x", "--dataset", "hello", "--strategy", "hello-solo"),
        *("--storage", "hello-disk", "--storage.root", str(tmp_path)),
        *("--workers", "0", "--max-steps", "2", "--context-length", "128"),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "x" / "checkpoint_00000" / ".is_checkpoint").exists()
