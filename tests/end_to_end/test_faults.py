"""Workers that die: the run goes on from its newest state, to the bytes of the run that nobody disturbed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import psutil
from command import llmft, llmft_path

RUN = ["--workers", "2", "--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "8"]
RUN += ["--epochs", "6", "--checkpoint.every-epochs", "1", "--strategy", "zero-2", "--state.every-steps", "2"]


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]


def test_killed_workers_are_started_again_and_nothing_is_different(tmp_path: Path) -> None:
    straight = llmft("run", *RUN, "--name", "straight", folder=tmp_path)
    assert straight.code == 0, straight.err
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [llmft_path(), "run", *RUN, "--name", "killed", "--max-failures", "2"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ,
        )
    try:
        for number in range(2):
            deadline = time.monotonic() + 300
            while f"state_{3 * number + 1:05d} complete" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            workers_of(process)[number].kill()
        assert process.wait(300) == 0, log.read_text()
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()
            process.wait()
    text = log.read_text()
    assert len(re.findall(r"warning: rank \d on \S+: the process was killed; `llmft resume \S+killed` goes", text)) == 2
    assert len(re.findall(r"go on after optimizer step \d+: \d+ steps? of .* done again", text)) == 2
    assert re.search(r"^the workers were started again 2 times: \d+ steps? of .* done again, .* without", text, re.M)
    runs = tmp_path / "llmft-runs" / "runs"
    weights = {name: sorted(runs.glob(f"{name}/checkpoint_*/model.safetensors"))[-1] for name in ("straight", "killed")}
    assert weights["straight"].read_bytes() == weights["killed"].read_bytes()
    losses = {
        name: [
            (line["step"], line["train/loss"])
            for line in map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
        ]
        for name in weights
    }
    assert losses["killed"] == losses["straight"]
