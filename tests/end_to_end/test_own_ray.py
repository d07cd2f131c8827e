"""A Ray of our own is begun before it is known how large it has to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from llmft_core.plan import RunPlan
from llmft_core.train.cluster import Cluster, Node, nodes_now, own_ray, start
wanted = int(sys.argv[1])
with own_ray(RunPlan.from_json({"workers": 2}), debug=False):
    (begun,) = nodes_now()
    assert {"torch", "transformers"} <= set(sys.modules)
    same = start(Cluster("local", (Node("", "here", begun.cpus, 0),)), 2, debug=False)
    larger = start(Cluster("local", (Node("", "here", begun.cpus, 0),)), wanted, debug=False)
    print(begun.id == same.nodes[0].id, begun.id == larger.nodes[0].id, larger.cpus)
print(nodes_now())
"""


def test_one_that_is_too_small_is_started_again(tmp_path: Path) -> None:
    wanted = len(os.sched_getaffinity(0)) + 3
    command = [sys.executable, "-c", SCRIPT, str(wanted)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"True False {wanted}", "()"]
