"""ZeRO's options and a user's own DeepSpeed file: what becomes of them, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmft_core.catalog import Catalog
from llmft_core.errors import LlmftError, Problems
from llmft_core.extensions import Strategy
from llmft_core.loading import load_plugins
from llmft_core.placing import place
from llmft_core.plan_layers import Layer, resolve
from llmft_core.sizes import hidden_size
from llmft_core.train.cluster import Cluster, Node
from llmft_core.values import Device, Placement
from llmft_plugins.strategies import zero_file
from llmft_plugins.strategies.zero import check_nvme

CATALOG = Catalog(load_plugins())
WIDTHS = {"7b": 4096, "13b": 5120, "70b": 8192}
GPU = Placement(4, "cuda", "bf16", 2, 3, 1.0, hidden_size=4096)

# As one finds them beside recipes for ZeRO-3 with offload: "auto" for what the trainer knows.
RECIPE = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "gather_16bit_weights_on_model_save": True,
        "round_robin_gradients": True,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 10,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def make(name: str, **options: Any) -> Strategy:
    strategy: Strategy = CATALOG.create("strategy", {"name": name, **options})
    return strategy


def said(strategy: Strategy, placement: Placement = GPU) -> list[str]:
    return [str(problem) for problem in strategy.problems(placement)]


@pytest.mark.parametrize("model", WIDTHS)
def test_sizes_follow_the_model(model: str) -> None:
    width = WIDTHS[model]
    placement = Placement(8, "cuda", "bf16", 1, 1, 1.0, hidden_size=width)
    zero = make("zero-3").configuration(placement)["zero_optimization"]
    assert zero["reduce_bucket_size"] == width * width
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * width * width)
    assert width < zero["stage3_param_persistence_threshold"] < width * width  # norms stay whole, matrices do not
    given = make("zero-3", **{"bucket-size": 7, "prefetch-size": 0}).configuration(placement)["zero_optimization"]
    assert (given["reduce_bucket_size"], given["stage3_prefetch_bucket_size"]) == (7, 0)
    two = make("zero-2").configuration(placement)["zero_optimization"]
    assert two["allgather_bucket_size"] == width * width
    assert not any(key.startswith("stage3") for key in two)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 64}, 64),
        ({"n_embd": 768, "n_layer": 12}, 768),
        ({"hidden_size": 9, "text_config": {"hidden_size": 2048}}, 2048),
        ({"model_type": "odd"}, 0),
    ],
)
def test_the_width_of_a_model_comes_from_its_config(config: dict[str, Any], width: int) -> None:
    assert hidden_size(config) == width


def test_offload_all_is_both_in_pinned_memory() -> None:
    zero = make("zero-3", offload="all").configuration(GPU)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    both = make("zero-3", **{"offload-optimizer": "cpu", "offload-params": "cpu"})
    assert both.configuration(GPU)["zero_optimization"] == zero
    nvme = make("zero-3", **{"offload-optimizer": "nvme", "nvme-path": "/mnt/nvme"})
    assert said(nvme) == []
    wanted = {"device": "nvme", "pin_memory": True, "nvme_path": "/mnt/nvme"}
    assert nvme.configuration(GPU)["zero_optimization"]["offload_optimizer"] == wanted
    assert "offload_param" not in nvme.configuration(GPU)["zero_optimization"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("zero-2", {"offload": "all"}, "strategy.offload: zero-2 keeps all weights on each GPU"),
        ("zero-2", {"offload-params": "cpu"}, "strategy.offload-params: zero-2 keeps all weights on each GPU"),
        ("zero-2", {"offload-optimizer": "nvme", "nvme-path": "/x"}, "DeepSpeed knows NVMe in zero-3 alone"),
        ("zero-2", {"prefetch-size": 5}, "strategy.prefetch-size: zero-2 fetches no weights"),
        ("zero-3", {"offload": "all", "offload-params": "none"}, "strategy.offload-params: none contradicts"),
        ("zero-3", {"offload-optimizer": "nvme"}, "strategy.nvme-path: is required for nvme"),
        ("zero-3", {"nvme-path": "/x"}, "strategy.nvme-path: nothing is offloaded to NVMe"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(name: str, options: dict[str, Any], expected: str) -> None:
    (problem,) = said(make(name, **options))
    assert expected in problem


def test_a_cpu_has_neither_nvme_nor_fp16() -> None:
    cpu = Placement(2, "cpu", "fp16", 2, 1, 1.0)
    first, second = said(make("zero-3", **{"offload-params": "nvme", "nvme-path": "/x"}), cpu)
    assert first.startswith("strategy.offload-params: nvme frees GPU memory by asynchronous reads and writes")
    assert second.startswith("precision: fp16 is not among DeepSpeed's CPU types")


def test_nvme_and_states_exclude_each_other() -> None:
    cluster = Cluster("", (Node("", "host", cpus=2, gpus=1),))
    layer = {"strategy": {"name": "zero-3", "offload-optimizer": "nvme", "nvme-path": "/x"}, "workers": 0}
    plan = resolve([Layer("flags", layer)], CATALOG)
    with pytest.raises(Problems) as caught:
        place(plan, cluster, CATALOG)
    assert "state: what DeepSpeed keeps on NVMe is not read back for states: --state.every-minutes 0" in str(
        caught.value
    )
    without = resolve([Layer("flags", {**layer, "state": {"every-minutes": 0}})], CATALOG)
    assert place(without, cluster, CATALOG)[1].device == "cuda"


def test_a_recipe_with_auto_is_taken_as_it_is(tmp_path: Path) -> None:
    (file := tmp_path / "zero_3.json").write_text(json.dumps(RECIPE))
    strategy = make("zero-3", offload="all", config=str(file))
    assert said(strategy) == []
    found = strategy.configuration(GPU)
    plain = make("zero-3", offload="all").configuration(GPU)
    extra = {"gather_16bit_weights_on_model_save": True, "round_robin_gradients": True}
    plain["zero_optimization"] |= extra
    assert found == {**plain, "steps_per_print": 10, "wall_clock_breakdown": False}


def test_the_content_is_in_the_plan_and_not_the_path(tmp_path: Path) -> None:
    (file := tmp_path / "zero_3.json").write_text(json.dumps(RECIPE))
    plan = resolve([Layer("flags", {"strategy": {"name": "zero-3", "config": str(file)}})], CATALOG)
    file.unlink()
    assert plan.strategy is not None
    assert plan.strategy["config"] == RECIPE
    again = CATALOG.create("strategy", json.loads(json.dumps(plan.to_json()))["strategy"])
    # Without flags the file itself says that all is offloaded.
    assert again.configuration(GPU) == make("zero-3", offload="all", config=RECIPE).configuration(GPU)


def test_all_contradictions_are_named_together_with_both_values() -> None:
    config = {
        "train_batch_size": 7,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "reduce_bucket_size": 5},
        "optimizer": {"type": "Lion", "params": {"lr": 0.1}},
        "zero_force_ds_cpu_optimizer": True,
    }
    found = said(make("zero-3", offload="all", config=config, **{"bucket-size": 6}))
    expected = [
        "train_batch_size is 7 in the file, and --global-batch makes it 24",
        "train_micro_batch_size_per_gpu is 3 in the file, and --micro-batch makes it 2",
        "gradient_accumulation_steps is 8 in the file, and --global-batch, --micro-batch and --workers makes it 3",
        "gradient_clipping is 0.5 in the file, and --max-grad-norm makes it 1.0",
        "bf16.enabled is false in the file, and --precision makes it true",
        "fp16.enabled is true in the file, and --precision makes it false",
        "zero_optimization.stage is 2 in the file, and --strategy makes it 3",
        'zero_optimization.offload_optimizer.device is "none" in the file, and --strategy.offload-optimizer makes it',
        "zero_optimization.reduce_bucket_size is 5 in the file, and --strategy.bucket-size makes it 6",
        "optimizer.params.lr is 0.1 in the file: AdamW is set by --lr and --weight-decay",
        "zero_force_ds_cpu_optimizer is true in the file, and must be false",
        "optimizer.type is Lion in the file: llmft trains with AdamW",
    ]
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(f"strategy.config: {start}"), problem


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"zero_optimisation": {}},
            "zero_optimisation: DeepSpeed has no such setting, or llmft does not use it (did you",
        ),
        (
            {"zero_optimization": {"reduce_bucket": 5}},
            "reduce_bucket: DeepSpeed has no such setting (did you mean reduce_b",
        ),
        (
            {"zero_optimization": {"sub_group_size": -1}},
            "zero_optimization.sub_group_size is -1: input should be greater",
        ),
        ({"zero_optimization": 3}, "zero_optimization is 3: it is a section"),
        (
            {"gradient_clipping": {"norm": 1}},
            "gradient_clipping.norm: gradient_clipping is a single value, not a section",
        ),
        ({"aio": {"block": 1}}, "aio.block: no such key (did you mean block_size?)"),
        ({"zero_optimization": {"cpu_offload": True}}, "use --strategy.offload-optimizer cpu"),
        ({"activation_checkpointing": {"partition_activations": True}}, "use --gradient-checkpointing"),
        ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale is 128 in the file, and must be 0"),
    ],
)
def test_what_deepspeed_would_ignore_or_misread_is_refused(config: dict[str, Any], expected: str) -> None:
    (problem,) = said(make("zero-3", config=config))
    assert expected in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1,\n "b" 2}', "line 2 is not JSON"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "gives steps_per_print twice"),
        ("[]", "holds no JSON object"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_broken_file_is_named(content: str | None, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(Problems) as caught:
        resolve([Layer("flags", {"strategy": {"name": "zero-3", "config": str(file)}})], CATALOG)
    assert f"strategy.config: '{file}'" in str(caught.value)
    assert expected in str(caught.value)


def test_what_says_nothing_takes_nothing_back() -> None:
    config = {
        "zero_optimization": {"offload_optimizer": None, "offload_param": {}},
        "gradient_clipping": None,
        "aio": {},
    }
    strategy = make("zero-3", offload="all", config=config)
    assert said(strategy) == []
    assert strategy.configuration(GPU) == make("zero-3", offload="all").configuration(GPU)


def test_a_setting_by_its_other_name_is_not_lost() -> None:
    configuration = make("zero-3", config={"zero_optimization": {"prefetch_bucket_size": 5}}).configuration(GPU)
    assert configuration["zero_optimization"]["stage3_prefetch_bucket_size"] == 5
    assert "prefetch_bucket_size" not in configuration["zero_optimization"]


def test_the_keys_are_deepspeeds() -> None:
    """All that is named here exists in the DeepSpeed that is installed: a key that is renamed there is found here."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    top = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert set(AIO_DEFAULT_DICT) == set(zero_file.SECTIONS["aio"])
    for key in (*zero_file.DECIDED, *zero_file.FIXED, *zero_file.REFUSED, *zero_file.SETTINGS):
        section, _, last = key.rpartition(".")
        if section:
            fields = models[section].model_fields
            assert last in {name for n, field in fields.items() for name in (n, field.alias)}, key
        else:
            assert last in top | {"activation_checkpointing", "data_efficiency"}, key


def test_a_machine_without_the_folder_for_nvme_says_so(tmp_path: Path) -> None:
    """Asked on every node; a file of the user's may name another folder for each."""
    absent, there = str(tmp_path / "absent"), str(tmp_path)
    lacks = f"strategy.nvme-path: {absent} is no folder that this machine can write to: make it, or give another one"

    def found(device: Device = "cuda", **options: Any) -> list[str]:
        return [str(problem) for problem in make("zero-3", **options).node_problems(device)]

    both = {"offload-optimizer": "nvme", "offload-params": "nvme"}
    assert found(**both, **{"nvme-path": absent}) == [lacks]
    assert found(**both, **{"nvme-path": there}) == []
    sections = {
        "offload_optimizer": {"device": "nvme", "nvme_path": there},
        "offload_param": {"device": "nvme", "nvme_path": absent},
    }
    assert found(config={"zero_optimization": sections}) == [lacks]
    assert found("cpu", config={"zero_optimization": sections}) == []
    assert found(offload="all") == []


def test_a_machine_without_asynchronous_io_says_so() -> None:
    """On each rank, before the model is loaded."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible():
        check_nvme()
    else:
        with pytest.raises(LlmftError, match="asynchronous I/O does not work on"):
            check_nvme()
