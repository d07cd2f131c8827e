"""CPU threads of a rank beside a GPU on a cluster that is not our own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmft_core.train.cluster import Node
from llmft_core.train.launch import threads_beside_gpus

# As Ray Train does it: the environment is changed after the start, and training runs in a thread of its own.
IN_A_THREAD = """
import os, sys, threading
import torch
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from llmft_core.train.launch import take_threads
def rank():
    take_threads(3)
    print(torch.get_num_threads())
thread = threading.Thread(target=rank)
thread.start()
thread.join()
"""


def node(cpus: int, gpus: int) -> Node:
    return Node(f"{cpus}-{gpus}", "host", cpus, gpus)


def test_a_rank_has_its_gpus_share_of_the_smallest_node() -> None:
    assert threads_beside_gpus([node(200, 8)]) == 25
    assert threads_beside_gpus([node(200, 8), node(96, 8), node(4, 0)]) == 12  # a node without GPUs gets no rank
    assert threads_beside_gpus([node(2, 8)]) == threads_beside_gpus([node(0, 1)]) == threads_beside_gpus([]) == 1


@pytest.mark.parametrize(("own", "expected"), [("", "3"), ("2", "2")])
def test_they_are_taken_but_for_a_users_own_number(own: str, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": own} if own else {}
    said = subprocess.run([sys.executable, "-c", IN_A_THREAD], env=environment, capture_output=True, text=True)
    assert said.stdout.split() == [expected], said.stderr
