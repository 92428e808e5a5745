"""Who may import whom: the layers of the design, no circles, and one door to the kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = {"lesam_dist": ROOT / "lesam_dist", "lesam_kernels": ROOT / "kernels" / "lesam_kernels"}

# From the top down: a layer imports what is below it. Parts of one layer may import each other, but not in circles.
LAYERS = [
    {"cli"},
    {"report", "guide", "doctor", "compat", "lightning", "transformers", "accelerate"},
    {"experiments", "analysis", "planning"},
    {"train"},
    {"tasks"},
    {"optim", "data", "models", "config"},
    {"parallel"},
    {"errors"},
]
# What stands outside of the layers: a way in, or names that moved.
DOORS = {"lesam_dist", "lesam_dist.__main__", "lesam_dist.train.__main__", "lesam_dist.wrapping"}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


class Import(NamedTuple):
    """``names`` are what is taken out of a module, none where the module itself is; ``typing``: for types alone."""

    source: str
    target: str
    names: tuple[str, ...]
    typing: bool


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports() -> list[Import]:
    return [found for name, path in MODULES.items() for found in imports_of(name, path)]


def imports_of(source: str, path: Path) -> Iterator[Import]:
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while pending:
        node, typing = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    yield Import(source, alias.name, (), typing)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module and node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield Import(source, *((inner, ()) if inner in MODULES else (node.module, (alias.name,))), typing)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, True) for child in node.body] + [(child, typing) for child in node.orelse]
        else:
            pending += [(child, typing) for child in ast.iter_child_nodes(node)]


IMPORTS = imports()


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_imports_go_downwards() -> None:
    """Those in functions and for types as well: they are how a layer comes to know what is above it."""
    upwards = []
    for found in IMPORTS:
        if found.source in DOORS or not found.source.startswith("lesam_dist"):
            continue
        source, target = part_of(found.source), part_of(found.target)
        if found.target.startswith("lesam_kernels") or source == target or target == "recipes":
            continue
        if found.target == "lesam_dist" and found.names == ("__version__",):
            continue
        if found.target in DOORS or LEVEL[source] > LEVEL[target]:
            upwards.append(f"{found.source} imports {'.'.join((found.target, *found.names))}")
    assert sorted(upwards) == []


def test_every_module_has_a_layer() -> None:
    strange = {m for m in MODULES if m.startswith("lesam_dist") and m not in DOORS and part_of(m) not in LEVEL}
    assert {part_of(module) for module in strange} <= {"recipes"}  # of which no module imports anything
    assert not [found for found in IMPORTS if part_of(found.source) == "recipes"]


def circle(edges: list[Import]) -> list[str]:
    """One circle of modules, or nothing."""
    graph: dict[str, set[str]] = {}
    for found in edges:
        if found.source != found.target:
            graph.setdefault(found.source, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circles() -> None:
    """Neither when files are read nor later, in functions; an annotation may name what imports its file."""
    edges = [found for found in IMPORTS if not found.typing and found.source not in DOORS]
    assert circle(edges) == []


def test_no_circles_of_folders() -> None:
    edges = {(part_of(e.source), part_of(e.target)) for e in IMPORTS if e.source not in DOORS and e.target not in DOORS}
    assert circle([Import(source, target, (), False) for source, target in edges]) == []


def test_the_kernels_know_nothing_of_us_and_one_file_knows_them() -> None:
    ours = {found.source for found in IMPORTS if found.target.startswith("lesam_dist")}
    assert not [module for module in ours if module.startswith("lesam_kernels")]
    users = {found.source for found in IMPORTS if found.target.startswith("lesam_kernels")}
    assert {module for module in users if module.startswith("lesam_dist")} == {"lesam_dist.optim.engine.triton_backend"}


def test_no_private_name_is_imported() -> None:
    """What begins with an underscore is of its own file; of modules so named, of its own folder."""
    reached = []
    for found in IMPORTS:
        private_name = any(name.startswith("_") and not name.startswith("__") for name in found.names)
        folder = found.target.rpartition(".")[0]
        private_module = "._" in found.target and not found.source.startswith(f"{folder}.")
        if private_name or private_module:
            reached.append(f"{found.source} imports {'.'.join((found.target, *found.names))}")
    assert reached == []


def test_methods_do_not_lean_on_the_inside_of_each_other() -> None:
    """A method imports the engine, what another method's file offers to all, and nothing above."""
    methods = {m for m in MODULES if m.startswith("lesam_dist.optim.") and not m.startswith("lesam_dist.optim.engine")}
    allowed = methods | {m for m in MODULES if m.startswith(("lesam_dist.optim.engine", "lesam_dist.parallel"))}
    strange = [found for found in IMPORTS if found.source in methods and found.target not in allowed]
    assert strange == []
    back = [
        found
        for found in IMPORTS
        if found.source.startswith("lesam_dist.optim.engine") and found.target in methods | {"lesam_dist.optim"}
    ]
    assert back == [], "the engine must not know its methods"


def test_circles_are_found() -> None:
    edges = [Import("a", "b", (), False), Import("b", "c", (), False), Import("c", "a", (), False)]
    assert len(circle(edges)) == 4
    assert circle(edges[:2]) == []
