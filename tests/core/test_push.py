"""`llmft checkpoint push`: a folder becomes a complete checkpoint, or nothing that looks like one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy, refusal
from servers import S3Server
from toy_tokenizers import save_toy_tokenizer

from llmft_core.cli.main import main


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local copy as a run of one rank leaves it after a failed upload."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "staging" / "r-checkpoint_00003-host-0123456789ab"
    folder.mkdir(parents=True)
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    save_toy_tokenizer(folder)
    return folder


def checkpoint(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["checkpoint", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kept_copy_becomes_a_checkpoint_and_goes_round(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(kept)
    code, out, _ = checkpoint(capsys, "push", str(kept), "store/r/checkpoint_00003")
    assert code == 0
    assert "complete and verified" in out
    assert files_of(kept) == before, "the local copy stays as it is"
    assert checkpoint(capsys, "verify", "store/r/checkpoint_00003")[0] == 0
    manifest = json.loads(Path("store/r/checkpoint_00003/manifest.json").read_text())
    assert manifest["pushed"] is True
    assert manifest["metrics"] == {}
    assert "step" not in manifest
    assert checkpoint(capsys, "list", "store")[1].count(" complete") == 1
    # What was pulled is pushed with its own manifest.
    assert checkpoint(capsys, "pull", "store/r/checkpoint_00003", "pulled")[0] == 0
    assert checkpoint(capsys, "push", "pulled", "elsewhere/checkpoint_00003")[0] == 0
    assert files_of(Path("elsewhere/checkpoint_00003")) == files_of(Path("store/r/checkpoint_00003"))
    # The target is taken, by the same or by another one.
    code, _, err = checkpoint(capsys, "push", "pulled", "store/r/checkpoint_00003")
    assert (code, "this very checkpoint, complete" in err) == (2, True)


def test_a_flipped_byte_in_a_pulled_folder_is_found_before_anything_is_sent(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint(capsys, "push", str(kept), "store/checkpoint_00003")[0] == 0
    weights = Path("store/checkpoint_00003/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    code, _, err = checkpoint(capsys, "push", "store/checkpoint_00003", "new/checkpoint_00003")
    assert code == 1
    assert "model.safetensors: its bytes have changed" in err
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("break_it", "said", "code"),
    [
        (lambda f: (f / "config.json").unlink(), "lacks config.json", 2),
        (
            lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
            "it is one rank's part of a checkpoint that several ranks wrote",
            2,
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "is damaged", 1),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the exported tokenizer cannot be loaded", 1),
        (lambda f: (f / "manifest.json").write_text("{}"), "has a manifest.json but no .is_checkpoint", 2),
        (lambda f: (f / "more").mkdir(), "holds more than files (more)", 2),
        (shutil.rmtree, "is not a folder", 2),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(
    kept: Path,
    break_it: object,
    said: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(break_it)
    break_it(kept)
    got, _, err = checkpoint(capsys, "push", str(kept), "store/checkpoint_00003")
    assert said in err
    assert got == code
    assert len(err.splitlines()) == 1
    assert not Path("store").exists()


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_target_that_holds_anything_else_is_left_alone(
    kept: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Path("store/checkpoint_00003")
    target.mkdir(parents=True)
    (target / name).write_text("{ }" if name == "notes.txt" else "[]")  # the latter of the same size as ours
    code, _, err = checkpoint(capsys, "push", str(kept), str(target))
    assert code == 2
    assert name in err
    assert "choose another target" in err
    assert [path.name for path in target.iterdir()] == [name]


def test_an_interrupted_push_continues(
    kept: Path, s3_proxy: Proxy, s3_server: S3Server, capsys: pytest.CaptureFixture[str], own_name: str
) -> None:
    """The proxy refuses the manifest: all files are there, and no checkpoint. Then only the rest is sent."""
    target = f"s3://bucket/{own_name}/checkpoint_00003"
    reach = ("--backends.s3.endpoint-url", s3_proxy.url)
    forbidden = refusal("403 Forbidden", "AccessDenied")
    s3_proxy.faults = [Fault(lambda head: head.startswith(b"PUT ") and b"/manifest.json" in head, 1, answer=forbidden)]
    code, _, err = checkpoint(capsys, "push", str(kept), target, *reach)
    assert code == 2
    assert "access denied" in err.splitlines()[-1]
    assert checkpoint(capsys, "verify", target, *reach)[0] == 2, "not a checkpoint"
    sent = s3_proxy.count(b"PUT")
    code, out, _ = checkpoint(capsys, "push", str(kept), target, *reach)
    assert code == 0
    assert "lay there already" in out
    assert s3_proxy.count(b"PUT") - sent == 2, "manifest and marker"
    assert checkpoint(capsys, "verify", target, *reach)[0] == 0


def test_a_full_store_is_said_in_one_line(
    kept: Path, s3_proxy: Proxy, capsys: pytest.CaptureFixture[str], own_name: str
) -> None:
    """The proxy answers as MinIO does when its disks are full (507 with its own code). No server here really is full:
    this shows what is made of that answer, not that a full server gives it."""
    full = refusal("507 Insufficient Storage", "XMinioStorageFull")
    s3_proxy.faults = [Fault(lambda head: head.startswith(b"PUT "), 99, answer=full)]
    target = f"s3://bucket/{own_name}/checkpoint_00003"
    code, _, err = checkpoint(capsys, "push", str(kept), target, "--backends.s3.endpoint-url", s3_proxy.url)
    assert code == 1
    assert "has no room for it" in err.splitlines()[-1]
    assert s3_proxy.count(b"PUT") <= 16, "asked once for each file at most"
    assert os.listdir(kept)
