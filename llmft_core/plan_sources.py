"""Where a plan comes from beside flags: `llmft.yaml`, `--plan run.yaml` and the environment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, Problem, close_match
from llmft_core.options import leaves
from llmft_core.plan import SINGLE_KINDS, RunPlan
from llmft_core.plan_layers import Layer, chosen_options

PREFIX = "LLMFT_"
RESERVED = {
    "LLMFT_CACHE": "folder of node-local caches",
    "LLMFT_DISABLED_PLUGINS": "plugins that are not loaded, separated by commas",
}
"""Variables with our prefix that are not part of a plan."""

PROJECT_FILE = "llmft.yaml"


def read_plan_file(path: Path, source: str = "") -> Layer:
    """A YAML file as a layer, called `source` in errors about it. Raises InputError naming file and line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give --plan an existing YAML file") from None
    return parse_plan(content, str(path), source)


def parse_plan(content: bytes, path: str, source: str = "") -> Layer:
    """YAML from `path`, a file or URI, as a layer, called `source` in errors about it. Raises InputError naming the
    line."""
    import yaml

    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
        _refuse_keys_given_twice(yaml.compose(text, Loader=yaml.SafeLoader))
        data = yaml.load(text, Loader=_loader())
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: is not YAML: {getattr(error, 'problem', None) or error}") from None
    if data is None:
        return Layer(source or path, {})
    if not isinstance(data, dict):
        raise InputError(f"{path}: a plan is a mapping of options, this is a {type(data).__name__}")
    return Layer(source or path, {str(key): value for key, value in data.items()})


def _loader() -> Any:
    """PyYAML's SafeLoader, but that 1:2 is text, as in YAML 1.2; YAML 1.1 reads it as 62, in base 60."""
    import yaml

    class PlanLoader(yaml.SafeLoader):
        """Of its own, because constructors belong to the class."""

        def construct_number(self, node: Any) -> Any:
            """An int, or text where there is a colon."""
            return node.value if ":" in node.value else self.construct_yaml_int(node)

    PlanLoader.add_constructor("tag:yaml.org,2002:int", PlanLoader.construct_number)
    return PlanLoader


def _refuse_keys_given_twice(node: Any) -> None:
    """YAML forbids them; PyYAML takes the last without a word. Raises yaml.MarkedYAMLError."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
            _refuse_keys_given_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_keys_given_twice(value)


def known_fields(catalog: Catalog, merged: Mapping[str, Any]) -> Iterator[tuple[str, FieldInfo]]:
    """Every path that a plan with these choices can set, with its field: the core's first, then the plugins'."""
    kinds = (*SINGLE_KINDS, "tracker", "backends")
    for path, field in leaves(RunPlan):
        if path not in kinds:
            yield path, field
    for kind in SINGLE_KINDS:
        yield f"{kind}.name", RunPlan.model_fields[kind]
    yield "tracker", RunPlan.model_fields["tracker"]
    for prefix, options in chosen_options(catalog, merged).items():
        yield from leaves(options, prefix)


def variable(path: str) -> str:
    """The environment variable of a path: `storage.endpoint-url` → `LLMFT_STORAGE_ENDPOINT_URL`, `model.name` →
    `LLMFT_MODEL`."""
    return PREFIX + path.removesuffix(".name").replace(".", "_").replace("-", "_").upper()


def environment_layer(
    environ: Mapping[str, str], paths: Iterable[str], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> tuple[Layer, list[Problem]]:
    """The environment as a layer, and a problem for each variable with our prefix that sets nothing. `elsewhere`: path
    → why it sets nothing in this plan."""
    why = {variable(path): reason for path, reason in elsewhere.items()}
    by_variable = {variable(path): path for path in paths}
    data: dict[str, Any] = {}
    problems = []
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in RESERVED:
            continue
        if name in by_variable:
            path = by_variable[name]
            set_path(data, path, [part.strip() for part in value.split(",")] if path == "tracker" else value)
        elif name in why:
            problems.append(Problem(name, f"{why[name]}: unset it, or choose that"))
        else:
            candidates = [*by_variable, *RESERVED]
            problems.append(
                Problem(name, f"this variable sets nothing{close_match(name, candidates)}: correct or unset it")
            )
    return Layer("the environment", data), problems


def set_path(data: dict[str, Any], path: str, value: Any) -> None:
    """`set_path(data, "storage.bucket", "b")` makes `{"storage": {"bucket": "b"}}`."""
    *parents, last = path.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
    data[last] = value
