"""Packages that llmft has never heard of: good ones work like built-ins, bad ones are named and stop nobody else."""

from __future__ import annotations

import json

import pytest
from wheels import REPOSITORY, Installed, Wheels

PACKAGES = ("hello", "broken_import", "same_entry", "same_name", "misspelt_hook", "wrong_api")

RESOLVE = """
import json, sys
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.plan_layers import Layer, resolve
catalog = Catalog(load_plugins())
print(json.dumps(resolve([Layer("flags", json.loads(sys.argv[1]))], catalog).to_json()))
"""

HELLO = {
    "dataset": {"name": "hello", "rows": 3},
    "storage": {"name": "hello-disk", "root": "/x"},
    "strategy": "hello-solo",
}


def listed(installed: Installed, *arguments: str, **variables: str) -> dict[tuple[str, str, str], str]:
    """(kind, name, distribution) → state, as `llmft plugins` prints it to a pipe."""
    done = installed.llmft("plugins", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=4) for line in done.stdout.splitlines()[1:]]
    return {(kind, name, distribution): state for kind, name, distribution, _, state in rows}


@pytest.fixture(scope="module")
def alone(wheels: Wheels) -> Installed:
    """llmft and the example."""
    return wheels.with_packages("hello")


@pytest.fixture(scope="module")
def crowd(wheels: Wheels) -> Installed:
    """llmft, the example and everything that is odd, together."""
    return wheels.with_packages(*PACKAGES)


def test_a_strangers_plugins_are_listed_beside_the_built_ins(alone: Installed) -> None:
    rows = listed(alone)
    for kind, name in (("dataset", "hello"), ("storage", "hello-disk"), ("strategy", "hello-solo")):
        assert rows[kind, name, "llmft-plugin-hello"] == "loaded"
    assert rows["method", "full", "llmft"] == "loaded"
    assert set(rows.values()) == {"loaded"}


def test_a_strangers_options_are_described(alone: Installed) -> None:
    text = alone.llmft("plugins", "hello").stdout
    assert "from llmft-plugin-hello 0.1.0" in text
    assert "choose with --dataset hello" in text
    assert "--dataset.test-rows" in text
    assert "training rows to make up where no source is given" in text
    assert "--storage.root" in alone.llmft("plugins", "hello-disk").stdout


def test_a_strangers_plugins_resolve_into_a_plan(alone: Installed) -> None:
    done = alone.python("-c", RESOLVE, json.dumps(HELLO))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["dataset"] == {"name": "hello", "source": "", "train": [], "test": [], "rows": 3, "test-rows": 20}
    assert plan["storage"] == {"name": "hello-disk", "root": "/x"}
    assert plan["strategy"] == {"name": "hello-solo"}


def test_odd_packages_do_not_touch_the_others(crowd: Installed) -> None:
    rows = listed(crowd)
    assert rows["dataset", "hello", "llmft-plugin-hello"] == "loaded"
    assert rows["dataset", "gsm8k", "llmft"] == "loaded"
    done = crowd.python("-c", RESOLVE, json.dumps(HELLO), LLMFT_DISABLED_PLUGINS="llmft-test-same-name")
    assert done.returncode == 0, done.stderr


def test_each_failure_is_listed_with_its_cause(crowd: Installed) -> None:
    rows = listed(crowd)
    broken = rows["-", "broken", "llmft-test-broken-import"]
    assert broken == "failed: ModuleNotFoundError: No module named 'a_library_nobody_has'"
    misspelt = rows["-", "misspelt", "llmft-test-misspelt-hook"]
    assert misspelt.startswith("failed: PluginValidationError:")
    assert "llmft_method" in misspelt
    wrong = rows["-", "wrong-api", "llmft-test-wrong-api"]
    assert wrong.startswith("failed: llmft_test_wrong_api was written for 99; this llmft has extension API 1")


def test_a_broken_plugin_is_named_when_it_is_missed(crowd: Installed) -> None:
    done = crowd.llmft("plugins", "brokn")
    assert done.returncode == 2
    assert "no plugin is called brokn" in done.stderr
    assert "llmft-test-broken-import:broken could not be loaded" in done.stderr
    assert "Traceback" not in done.stderr
    asked = crowd.llmft("plugins", "broken")
    assert asked.returncode == 0
    assert "a_library_nobody_has" in asked.stdout
    resolved = crowd.python("-c", RESOLVE, json.dumps({**HELLO, "method": "broken"}))
    assert resolved.returncode == 1
    assert "llmft-test-broken-import:broken could not be loaded" in resolved.stderr


def test_two_packages_with_one_entry_name_are_both_loaded(crowd: Installed) -> None:
    rows = listed(crowd)
    assert rows["dataset", "hello", "llmft-plugin-hello"] == "loaded"
    assert rows["method", "same-entry", "llmft-test-same-entry"] == "loaded"


def test_a_conflict_names_both_and_the_way_out(crowd: Installed) -> None:
    rows = listed(crowd)
    assert "in conflict with llmft-test-same-name:mine" in rows["method", "full", "llmft"]
    assert "in conflict with llmft:full" in rows["method", "full", "llmft-test-same-name"]
    done = crowd.python("-c", RESOLVE, json.dumps(HELLO))
    assert done.returncode == 1
    assert "method full is offered by llmft-test-same-name:mine and llmft:full: disable one" in done.stderr


@pytest.mark.parametrize("what", ["llmft-test-same-name", "mine", "llmft-test-same-name:mine"])
def test_disabling_by_flag_ends_a_conflict(crowd: Installed, what: str) -> None:
    rows = listed(crowd, "--disable-plugin", what)
    assert rows["method", "full", "llmft"] == "loaded"
    assert rows["-", "mine", "llmft-test-same-name"] == "disabled"


def test_disabling_by_the_environment(crowd: Installed) -> None:
    rows = listed(crowd, LLMFT_DISABLED_PLUGINS="mine, llmft-test-broken-import")
    assert rows["method", "full", "llmft"] == "loaded"
    assert rows["-", "broken", "llmft-test-broken-import"] == "disabled"


def test_doctor_names_what_is_wrong_with_plugins(crowd: Installed) -> None:
    text = crowd.llmft("doctor").stdout
    assert "a_library_nobody_has" in text
    assert "in conflict with" in text


def test_the_examples_own_tests_pass_against_the_wheel(alone: Installed) -> None:
    tests = REPOSITORY / "examples" / "llmft-plugin-hello" / "tests"
    options = ("-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tests))
    done = alone.python("-m", "pytest", *options, str(tests), timeout=300, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stdout
