"""Every public module says what it offers, and nothing that it has not."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import wavecast.runtime
import wavecast.scheduler


def modules() -> list[str]:
    """The names of all modules of both packages; packages that only hold others are left out."""
    found: list[str] = []
    for package in (wavecast.runtime, wavecast.scheduler):
        found.append(package.__name__)
        found += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]

    return [name for name in found if not name.endswith(".__main__") and tree_of(name).body]


def file_of(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def tree_of(name: str) -> ast.Module:
    return ast.parse(file_of(name).read_text(encoding="utf-8"))


MODULES = modules()
#: Triton comes with torch for CUDA; without it this one is never imported.
KERNELS = "wavecast.runtime.transfer.kernels"
IMPORTABLE = [name for name in MODULES if name != KERNELS or importlib.util.find_spec("triton") is not None]


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 50
    assert {
        "wavecast.runtime",
        "wavecast.runtime.group",
        "wavecast.runtime.transfer.agent",
        "wavecast.scheduler.task",
    } <= {*MODULES}


@pytest.mark.parametrize("name", IMPORTABLE)
def test_a_module_lists_its_names_in_a_tuple_and_has_them_all(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__
    assert isinstance(listed, tuple)
    assert all(isinstance(each, str) for each in listed)
    assert len(set(listed)) == len(listed)
    assert [each for each in listed if not hasattr(module, each)] == []
    assert [each for each in listed if each.startswith("_") and not each.startswith("__")] == []


@pytest.mark.parametrize("name", IMPORTABLE)
def test_a_module_lists_every_class_and_function_it_makes_public(name: str) -> None:
    """What is not listed is private, and its name says so. The commands of the command line are nobody's to call."""
    public = {
        node.name
        for node in tree_of(name).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not any(
            "click" in ast.dump(decorator) or "command" in ast.dump(decorator) for decorator in node.decorator_list
        )
    }
    assert sorted(public - {*importlib.import_module(name).__all__}) == []


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_for(name: str) -> None:
    tree = tree_of(name)
    assert ast.get_docstring(tree)
    if any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in tree.body):
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        assert [alias.name for node in imports for alias in node.names] == ["annotations"]


def test_a_star_import_gives_what_is_listed() -> None:
    for package in (wavecast.runtime, wavecast.scheduler):
        names: dict[str, object] = {}
        exec(f"from {package.__name__} import *", names)
        assert {*package.__all__} <= names.keys()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'wavecast\.runtime' has no attribute 'Trainer'"):
        _ = wavecast.runtime.Trainer


def test_packages_only_gather_what_others_define() -> None:
    for package in (wavecast.runtime, wavecast.scheduler):
        defined = [node for node in tree_of(package.__name__).body if isinstance(node, ast.ClassDef)]
        assert defined == []


#: What may be missing where Wavecast is installed: what it reads, and what only its tests and benches use.
OPTIONAL = ("megatron", "transformers", "vllm", "safetensors", "peft", "numpy", "networkx", "matplotlib", "hypothesis")


def test_every_module_imports_without_the_frameworks_it_can_read() -> None:
    script = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *(name for name in MODULES if name != KERNELS)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_scheduler_knows_nothing_of_the_runtime_or_of_torch_and_ray() -> None:
    script = """
import sys, wavecast.scheduler
heavy = [name for name in sys.modules if name.partition(".")[0] in ("torch", "ray", "numpy")]
print([*heavy, *(name for name in sys.modules if name == "wavecast.runtime")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.strip() == "[]"
