"""What a micro-batch may cost beside its arithmetic: the host reads nothing back from the device, and waits for no
other rank. Copies to the host, which have no operator of their own, are looked for in tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from counting import COLLECTIVE, READS, STEPS, VOCABULARY, Watched, operators
from ranks import on_ranks
from tables import tiny_llama

MORE = 3 * STEPS
"""Micro-batches that a rank has more with an accumulation of 4 than with one of 1, in the same optimizer steps."""
OF_LABELS = {"aten::nonzero": MORE}
"""The trained positions of a micro-batch are looked for in its labels, which have not left the host."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), VOCABULARY))


def grown(base: str, cases: Sequence[dict[str, Any]]) -> list[list[dict[str, int]]]:
    """For each case, and of each of two ranks: how much more often what operators were called with 4 micro-batches in
    an optimizer step than with 1."""
    runs = [Watched(base=base, world_size=2, accumulation=number, **case) for case in cases for number in (1, 4)]
    answers: list[list[dict[str, int]]] = [[] for _ in cases]
    for rank in on_ranks(2, operators, runs):
        for number, answer in enumerate(answers):
            few, many = rank[2 * number : 2 * number + 2]
            assert sum(many[name] for name in many if name.startswith(COLLECTIVE)) >= STEPS  # of the losses
            names = sorted({*few, *many})
            more = {name: many.get(name, 0) - few.get(name, 0) for name in names}
            answer.append({name: count for name, count in more.items() if count})
    return answers


PLAIN = [{"precision": "fp32"}, {"precision": "bf16", "packed": True}]


def test_ddp_reads_nothing_back_and_waits_for_nobody(base: str) -> None:
    for of_ranks in grown(base, [{"strategy": "ddp", **case} for case in PLAIN]):
        assert of_ranks == [OF_LABELS, OF_LABELS]


def test_zero_2_reads_nothing_back_and_reduces_gradients_alone(base: str) -> None:
    """DeepSpeed partitions the gradients of every micro-batch (`reduce_ready_partitions_and_remove_grads`): that is
    what ZeRO-2 saves memory by. These fit into one bucket."""
    for of_ranks in grown(base, [{"strategy": "zero-2", **case} for case in PLAIN]):
        assert of_ranks == [{**OF_LABELS, "c10d::allreduce_": MORE}] * 2


@pytest.mark.slow
def test_zero_3_reads_nothing_back(base: str) -> None:
    for of_ranks in grown(base, [{"strategy": "zero-3", **case} for case in PLAIN]):
        for of_rank in of_ranks:
            assert {name: count for name, count in of_rank.items() if name in READS} == OF_LABELS


@pytest.mark.parametrize(
    ("disturbed", "seen"),
    [
        ("forward", "aten::_local_scalar_dense"),
        ("backward", "aten::_local_scalar_dense"),
        ("collective", "c10d::allreduce_"),
    ],
)
def test_what_micro_batches_do_besides_is_seen(base: str, disturbed: str, seen: str) -> None:
    ((one, other),) = grown(base, [{"strategy": "ddp", "disturbed": disturbed}])
    assert one == other == {**OF_LABELS, seen: MORE}
