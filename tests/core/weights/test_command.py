"""`llmft weights`: wrong inputs, files and the environment, help."""

from __future__ import annotations

from pathlib import Path

import pytest
from mirrors import weights


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "no action is given; there are fetch, mirror, list, verify"),
        (("fetsh", "x"), "no action is called fetsh (did you mean fetch?)"),
        (("fetch",), "nothing was given for fetch: write `llmft weights fetch MODEL`"),
        (("mirror", "llama-2-tiny"), "write `llmft weights mirror MODEL MIRROR`"),
        (("verify", "a", "b"), "2 words were given for verify"),
        (("fetch", "llama-2-tiny", "--as", "x/y"), "--as belongs to `llmft weights mirror"),
        (("verify", "x", "--json"), "--json belongs to `llmft weights list"),
        (("list", "--weights.mirror", "m"), "--weights.mirror belongs to `llmft weights fetch MODEL`"),
        (("fetch", "llama-3"), "no model is called llama-3"),
        (("fetch", "./nowhere"), "no such folder"),
        (("mirror", "llama-2-tiny", "m", "--as", "../x"), "'../x' cannot be a model's name in a mirror"),
        (("mirror", "llama-2-tiny", "source"), "is a model's own folder (it has config.json), no mirror"),
        (("list", "nowhere"), "holds no models: give a mirror's root"),
        (("verify", "owner/name"), "neither a folder nor in this node's cache"),
        (("verify", "source"), "has no manifest.json"),
        (("fetch", "llama-2-7b", "--flag"), "--flag"),
    ],
)
def test_wrong_inputs(args: tuple[str, ...], says: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = weights(capsys, *args)
    assert code == 2
    assert says in error


def test_the_mirror_comes_from_a_file_or_the_environment(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert weights(capsys, "mirror", str(source), "m", "--as", "llama-2-7b")[0] == 0
    (tmp_path / "llmft.yaml").write_text("weights: {mirror: m}\nepochs: not for us\n")
    assert "/mirror/meta-llama--" in weights(capsys, "fetch", "llama-2-7b")[1][0]
    monkeypatch.setenv("LLMFT_WEIGHTS_MIRROR", "elsewhere")
    code, _, error = weights(capsys, "fetch", "llama-2-7b")
    assert code == 2
    assert f"is not in the mirror {tmp_path}/elsewhere" in error
    monkeypatch.setenv("LLMFT_WEIGHTS_MIROR", "m")
    assert "did you mean LLMFT_WEIGHTS_MIRROR?" in weights(capsys, "fetch", "llama-2-7b")[2]


def test_help_and_an_empty_cache(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    for action in ("fetch", "mirror", "list", "verify"):
        code, out, _ = weights(capsys, action, "--help")
        assert code == 0
        assert "--backends.s3.endpoint-url" in "\n".join(out)
    code, out, _ = weights(capsys, "list")
    assert (code, out) == (0, [f"{cache} holds no models yet: `llmft weights fetch MODEL`"])
