"""Check who may import whom: rooms see only what stands above them, and each seam has one place."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Modules of the runtime in the order in which they may build on each other; a folder counts as one.
RUNTIME = (
    "errors",
    "undisturbed",
    "collector",
    "layout",
    "presets",
    "files",
    "safetensors",
    "checkpoint",
    "plan",
    "shared_memory",
    "naming",
    "options",
    "transfer",
    "carriers",
    "selection",
    "preparation",
    "notices",
    "cluster",
    "connection",
    "model_group",
    "members",
    "report",
    "versions",
    "stopwatch",
    "request",
    "known",
    "lineup",
    "opening",
    "ahead",
    "transferring",
    "integrity",
    "commit",
    "reporting",
    "sync_run",
    "runner",
    "turns",
    "group",
    "demo_memory",
    "demo",
    "model",
    "plan_job",
    "sync_job",
    "cli",
    "__init__",
    "__main__",
)
ONLY_RAY = "runtime/cluster/"
#: What a plan must do without, and the rooms that keep to that.
HEAVY = {"ray", "torch"}
LIGHT = ("runtime/plan/", "runtime/plan_job.py", "runtime/model.py", "runtime/presets.py", "runtime/options.py")


def main() -> int:
    """Print each import that breaks a rule; return 1 if there was one."""
    broken = [
        f"{path}:{line}: {message}"
        for folder in ("scheduler", "runtime")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, message in check(path.relative_to(ROOT))
    ]
    broken += unlisted_packages()
    print("\n".join(broken) if broken else "boundaries: every import is in its place")
    return 1 if broken else 0


def unlisted_packages() -> list[str]:
    """Return a line for each folder of modules that pyproject.toml does not list: it would be missing in the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = sorted(
        f"wavecast.{path.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for folder in ("scheduler", "runtime")
        for path in (ROOT / folder).rglob("__init__.py")
    )
    return [f"pyproject.toml does not list the package {name}" for name in found if name not in listed]


def check(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and message of each import in ``path`` that breaks a rule."""
    name = path.as_posix()
    for line, module, top_level in imports(ROOT / path):
        package = module.partition(".")[0]
        if path.parts[0] == "scheduler":
            own = module == "wavecast.scheduler" or module.startswith("wavecast.scheduler.")
            if not (own or package == "anyio" or package in sys.stdlib_module_names):
                yield line, f"the scheduler knows only itself, anyio and the standard library, not {module}"

        if package == "ray" and not name.startswith(ONLY_RAY):
            yield line, "only runtime/cluster imports ray"

        if package in HEAVY and top_level and name.startswith(LIGHT):
            yield line, f"a plan does without {package}"

        if path.parts[0] == "runtime" and module.startswith("wavecast.runtime."):
            here, there = room(path.parts[1]), room(module.split(".")[2])
            if RUNTIME.index(there) > RUNTIME.index(here):
                yield line, f"{here} stands above {there} and must not import it"


def room(part: str) -> str:
    """Return the room a path's or a module's part names."""
    name = part.removesuffix(".py")
    if name not in RUNTIME:
        raise SystemExit(f"boundaries: runtime/{part} has no place in the order; give it one")

    return name


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield line, module and whether it is imported when the file is, leaving out what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, top_level in walk(tree, top_level=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, top_level
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module, top_level


def walk(node: ast.AST, *, top_level: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield all nodes below ``node`` but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue

        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield child, top_level
        yield from walk(child, top_level=top_level and not inside)


if __name__ == "__main__":
    sys.exit(main())
