"""The engine of hello-solo does what plain PyTorch does."""

import pytest
import torch
from llmft_plugin_hello.hello_solo import HelloSolo

from llmft_core import LlmftError, Options, Placement

PLACEMENT = Placement(1, "cpu", "fp32", micro_batch=2, accumulation=2, max_grad_norm=0.5)


@pytest.fixture
def engine():
    torch.manual_seed(0)
    engine = HelloSolo(Options()).engine(PLACEMENT, rank=0)
    with engine.building():
        model = torch.nn.Linear(3, 1)
    engine.prepare(model, lambda trained: torch.optim.SGD([parameter for _, parameter, _ in trained], lr=0.0))
    yield engine
    engine.finish()


def test_two_micro_batches_make_one_clipped_step(engine):
    inputs = torch.ones(4, 3)
    before = engine.gathered(["weight"], torch.float32)["weight"]
    engine.set_learning_rate(0.1)
    for part, last in ((inputs[:2], False), (inputs[2:], True)):
        engine.backward(engine.model(part).sum(), last=last)
    outcome = engine.step()
    assert outcome.applied
    assert outcome.grad_norm == pytest.approx(8.0)  # four rows, gradient 1 for three weights and a bias: 4 · √4
    after = engine.gathered(["weight"], torch.float32)["weight"]
    assert torch.allclose(before - after, torch.full((1, 3), 0.1 * 4 * 0.5 / 8), atol=1e-6)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_a_step_that_is_not_finite_is_skipped(engine):
    before = engine.gathered(["weight"], torch.float32)["weight"]
    engine.set_learning_rate(0.1)
    engine.backward(engine.model(torch.full((2, 3), float("inf"))).sum(), last=True)
    assert not engine.step().applied
    assert torch.equal(before, engine.gathered(["weight"], torch.float32)["weight"])


def test_what_is_gathered_is_a_copy_in_the_wanted_type(engine):
    assert engine.shapes() == {"weight": (1, 3), "bias": (1,)}
    copy = engine.gathered(["bias"], torch.bfloat16)
    assert list(copy) == ["bias"]
    assert copy["bias"].dtype == torch.bfloat16
    engine.gathered(["bias"], torch.float32)["bias"].fill_(9.0)
    assert engine.model.bias.item() != 9.0


def test_a_model_without_anything_to_train_is_refused():
    engine = HelloSolo(Options()).engine(PLACEMENT, rank=0)
    with pytest.raises(LlmftError, match="no parameter to train"):
        engine.prepare(torch.nn.Linear(3, 1).requires_grad_(False), lambda trained: None)
