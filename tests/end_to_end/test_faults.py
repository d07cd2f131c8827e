"""Workers that die: the run goes on from its newest state, to the bytes of the run that nobody disturbed."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest
from command import llmft
from hold import Hold
from running import Running

RUN = ["--workers", "2", "--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "8"]
RUN += ["--strategy", "zero-2", "--state.every-steps", "2"]


def last_weights(runs: Path, name: str) -> bytes:
    return sorted(runs.glob(f"{name}/checkpoint_*/model.safetensors"))[-1].read_bytes()


def losses(runs: Path, name: str) -> list[tuple[int, float]]:
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["train/loss"]) for line in map(json.loads, lines)]


@pytest.mark.timeout(1500)
def test_killed_workers_are_started_again_and_nothing_is_different(tmp_path: Path) -> None:
    flags = [*RUN, "--epochs", "6", "--checkpoint.every-epochs", "1"]
    straight = llmft("run", *flags, "--name", "straight", folder=tmp_path)
    assert straight.code == 0, straight.err
    hold = Hold(tmp_path, in_pass=0)
    command = ["run", *flags, *hold.flags, "--name", "killed", "--max-failures", "3"]
    with Running(tmp_path, *command, environment=hold.environment) as running:
        hold.wait(running)
        running.workers()[0].kill()
        hold.release()
        for number in range(2):
            running.wait_until(lambda text, number=number: states(after_restarts(text, number + 1)) > 1, "two states")
            running.workers()[number].kill()
        assert running.end() == 0, running.text
    text = running.text
    died = r"^warning: rank \d on \S+: the process was killed or its machine is gone; "
    assert len(re.findall(rf"{died}no checkpoint was complete yet$", text, re.M)) == 1
    assert len(re.findall(rf"{died}`llmft resume \S+killed` goes on from state_\d+$", text, re.M)) == 2
    assert len(re.findall(r"go on after optimizer step 0: 0 steps of .* are done again", text)) == 1
    assert len(re.findall(r"go on after optimizer step [^0]\d*: \d+ steps? of .* are done again", text)) == 2
    assert re.search(r"^the workers were started again 3 times: \d+ steps? of .* done again, .* without", text, re.M)
    runs = tmp_path / "llmft-runs" / "runs"
    assert last_weights(runs, "straight") == last_weights(runs, "killed")
    assert losses(runs, "straight") == losses(runs, "killed")


KILLS = 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_after_ten_kills_at_random_the_weights_are_those_of_a_run_that_nobody_disturbed(tmp_path: Path) -> None:
    flags = [*RUN, "--epochs", "30", "--checkpoint.every-epochs", "0"]
    straight = llmft("run", *flags, "--name", "straight", folder=tmp_path)
    assert straight.code == 0, straight.err
    chance = random.Random(5)
    arguments = ["run", *flags, "--name", "killed", "--max-failures", str(KILLS)]
    with Running(tmp_path, *arguments) as running:
        for number in range(KILLS):
            more = chance.randint(0, 6)  # 0: it is not even known whether the first step was done
            running.wait_until(lambda text, n=number: times(text, r"^… loading the model$") > n, "start of the ranks")
            wanted = states(running.text) + more
            running.wait_until(lambda text, wanted=wanted: states(text) >= wanted, f"{more} states")
            time.sleep(chance.uniform(0, 0.5))
            chance.choice(running.workers()).kill()
        assert running.end() == 0, running.text
    assert times(running.text, r"^warning: .* go on after optimizer step \d+: ") == KILLS
    runs = tmp_path / "llmft-runs" / "runs"
    assert last_weights(runs, "straight") == last_weights(runs, "killed")
    assert losses(runs, "straight") == losses(runs, "killed")


def times(text: str, line: str) -> int:
    return len(re.findall(line, text, re.M))


def states(text: str) -> int:
    return times(text, r"^state_\d+ complete")


def after_restarts(text: str, number: int) -> str:
    """What was said since the ranks were started again for that time."""
    return "".join(text.split("were started again and go on")[number:])
