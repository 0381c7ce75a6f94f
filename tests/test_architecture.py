"""The plan of the packages, in docs/architecture.md, is what the imports say."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rococap

ROOT = Path(rococap.__file__).parent

PLAN = (
    {"answers", "errors", "recipe", "figures", "flags", "open_files", "progress", "tables"},
    {"files", "prompts", "urls"},
    {"db"},
    {"data"},
    {"engines"},
    {"queue"},
    {"results"},
    {"review"},
    {"scores", "training", "transfer", "worker"},
    {"doctor", "launch", "web"},
    {"demo"},
    {"cli"},
)
"""A module imports from its own package and from those that stand before it."""

MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def package_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(module: str, nodes: Iterator[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rococap"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("rococap")}
    return found


def all_imports(module: str) -> set[str]:
    return imports(module, ast.walk(ast.parse(MODULES[module].read_text())))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_of_a_package_that_stands_after_its_own(module):
    places = {package: place for place, packages in enumerate(PLAN) for package in packages}
    mine = package_of(module)
    if mine in ("", "__main__"):  # rococap itself and `python -m rococap`
        return
    assert mine in places, f"{mine} has no place in the plan"
    others = {package_of(other) for other in all_imports(module)} - {"", mine}
    assert {other for other in others if places[other] >= places[mine]} == set()


def test_the_architecture_page_draws_the_plan():
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    drawing = page.partition("```text\n")[2].partition("```")[0]
    layers = [set(layer.split()) for layer in re.split("─+", drawing)]
    assert len(layers) == len(PLAN)
    assert [layer - words for layer, words in zip(PLAN, layers, strict=True) if layer - words] == []


def test_no_module_imports_itself_even_by_way_of_others():
    top = {module: imports(module, iter(ast.parse(path.read_text()).body)) for module, path in MODULES.items()}
    # A package and its modules are loaded in one go: what its __init__ hands on is no import of theirs.
    graph = {
        module: {other for other in others if other != module.rpartition(".")[0]} for module, others in top.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_what_a_worker_holds_knows_neither_who_fills_nor_who_empties_it():
    holdings, fetcher, store = (f"rococap.worker.{name}" for name in ("holdings", "fetcher", "store"))
    assert {other for other in all_imports(holdings) if "worker" in other} == {"rococap.worker.clock"}
    assert holdings in all_imports(fetcher) & all_imports(store)
    assert store not in all_imports(fetcher)
    assert fetcher not in all_imports(store)


def test_only_the_commands_and_the_demo_know_of_training():
    importers = {package_of(module) for module in MODULES if any(".training" in other for other in all_imports(module))}
    assert importers - {"training"} <= {"cli", "demo"}
