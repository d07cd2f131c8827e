"""Progress of a transfer, in a pipe and on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.report.transfers import transfer_bar
from llmft_core.storage.places import Places
from llmft_core.storage.transfer import download_many


def test_lines_in_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3000)
    out = io.StringIO()
    with transfer_bar("weights", Console(file=out)) as progress:
        folder = Places(Catalog(load_plugins()), None, {}).place(str(tmp_path))
        download_many([(folder / "a", tmp_path / "b", None)], progress=progress)
    assert out.getvalue().startswith("weights: 3.0 kB of 3.0 kB · ")
    assert out.getvalue().count("\n") == 1


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with transfer_bar("weights", Console(file=out, force_terminal=True, width=100)) as progress:
        progress(1_000_000, 2_000_000)
    assert "1.0/2.0 MB" in out.getvalue()
