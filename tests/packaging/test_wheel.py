"""What is in the wheel, and that the wheel is what runs."""

from __future__ import annotations

import zipfile
from pathlib import Path

from wheels import REPOSITORY, Wheels


def test_the_wheel_holds_both_packages_and_nothing_else(wheels: Wheels) -> None:
    with zipfile.ZipFile(wheels.files["llmft"]) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llmft_core", "llmft_plugins"}
    for expected in ("llmft_core/py.typed", "llmft_plugins/py.typed", "llmft_plugins/storage/local.py"):
        assert expected in names
    assert [name for name in names if name.endswith((".pyc", ".so"))] == []


def test_every_module_of_the_source_is_in_the_wheel(wheels: Wheels) -> None:
    with zipfile.ZipFile(wheels.files["llmft"]) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    sources = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "llmft_core").rglob("*.py")}
    plugins = REPOSITORY / "plugins"
    sources |= {path.relative_to(plugins) for path in (plugins / "llmft_plugins").rglob("*.py")}
    assert {path.as_posix() for path in sources} <= packed


def test_the_wheel_is_what_is_imported_and_loaded_once(wheels: Wheels) -> None:
    """Also where an editable install of llmft lies further back on the path."""
    script = """
import llmft_core, llmft_plugins
from llmft_core.loading import load_plugins
print(llmft_core.__file__)
print(llmft_plugins.__file__)
plugins = load_plugins()
print(len(plugins.records) - len({record.id for record in plugins.records}))
for _, module in plugins.manager.list_name_plugin():
    print(module.__file__)
"""
    done = wheels.with_packages().python("-c", script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    folder = wheels.folders["llmft"]
    assert lines.pop(2) == "0"
    assert len(lines) > 2
    assert [line for line in lines if not Path(line).is_relative_to(folder)] == []


def test_every_entry_point_of_the_wheel_is_there(wheels: Wheels) -> None:
    with zipfile.ZipFile(wheels.files["llmft"]) as archive:
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        modules = [
            line.split(" = ")[1].replace(".", "/") + ".py"
            for line in archive.read(entry_points).decode().splitlines()
            if " = llmft_plugins." in line
        ]
        assert modules
        assert [module for module in modules if module not in archive.namelist()] == []


def test_the_command_says_its_version(wheels: Wheels) -> None:
    done = wheels.with_packages().llmft("--version")
    assert done.returncode == 0, done.stderr
    assert "0." in done.stdout
