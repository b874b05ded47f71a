"""Every module and every public name can be what a program imports first."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import jaxpeft
from jaxpeft.command.verbs import VERBS, command_line
from tests.conftest import ROOT

PACKAGE = ROOT / "jaxpeft"
FORKS = """
import os, sys
import flax.linen, flax.nnx, jax, ml_collections, numpy, optax
failed = []
for statement in sys.stdin.read().splitlines():
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            assert not [name for name in sys.modules if name.startswith("jaxpeft")]
            exec(statement)
        except BaseException as error:
            os.write(writer, f"{statement}: {type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    failed.append(os.read(reader, 4096).decode())
print("\\n".join(filter(None, failed)), end="")
"""
"""Runs each statement in a process of its own, where nothing of jaxpeft is imported, and other
packages are.
"""


def modules() -> dict[str, Path]:
    """Return the file of every module of the package, by its name."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_at_once(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when a module is imported: those of functions, and for type
    checkers alone, do not.
    """
    todo: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def needs(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules that have to be there before a module is; of the packages around it those
    that it names.
    """
    wanted: set[str] = set()
    for node in imported_at_once(path):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        else:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            wanted |= inside & known.keys()
            wanted |= {str(node.module)} if inside - known.keys() else set()
    around = {".".join(one.split(".")[:n]) for one in wanted for n in range(1, one.count(".") + 1)}
    return (wanted | {one for one in around if not name.startswith(f"{one}.")}) & known.keys() - {
        name
    }


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that are left when those that need none of the rest are taken away, again
    and again.
    """
    left = dict(graph)
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_module_needs_one_that_needs_it() -> None:
    known = modules()
    graph = {name: needs(name, path, known) for name, path in known.items()}
    assert len(graph) > 150
    assert graph["jaxpeft.core.targets"] >= {
        "jaxpeft.kernels",
        "jaxpeft.core.paths",
        "jaxpeft.errors",
    }
    assert cycles(graph) == []
    # it finds one where there is one
    assert cycles({**graph, "jaxpeft.core.paths": {"jaxpeft.methods"}})


def packages() -> dict[str, set[str]]:
    """Return the packages and single modules directly under `jaxpeft`, each with those that it
    imports, in functions too.
    """
    graph = grimp.build_graph("jaxpeft", exclude_type_checking_imports=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        own = ".".join(module.split(".")[:2])
        others = {
            ".".join(to.split(".")[:2]) for to in graph.find_modules_directly_imported_by(module)
        }
        found.setdefault(own, set()).update(others - {own})
    return found


def test_no_package_needs_one_that_needs_it() -> None:
    graph = packages()
    assert len(graph) > 20
    assert graph["jaxpeft.hub"] >= {
        "jaxpeft.core",
        "jaxpeft.models",
        "jaxpeft.methods",
        "jaxpeft.quant",
    }
    assert cycles(graph) == []
    assert cycles({**graph, "jaxpeft.core": graph["jaxpeft.core"] | {"jaxpeft.methods"}})
    assert graph["jaxpeft.core"] == {"jaxpeft.errors", "jaxpeft.kernels"}
    assert graph["jaxpeft.kernels"] == {"jaxpeft.lazy"}


MOVED = {"supervise": "chat", "dialogs": "chat", "templates": "chat", "columns": "rows"}
"""Modules of `data` that keep their old names for a while, and the folders that they are in now."""
OF_A_COMMAND = {"report", "plot"}
"""Modules of several commands that do the same for each."""


def test_no_two_modules_have_one_name() -> None:
    old = {PACKAGE / "data" / f"{name}.py" for name in MOVED}
    paths = [path for path in PACKAGE.rglob("*.py") if path not in old and path.stem[0] != "_"]
    names = Counter(path.stem for path in paths)
    assert {name for name, count in names.items() if count > 1} == OF_A_COMMAND


@pytest.mark.parametrize("name", MOVED)
def test_a_module_that_moved_is_there_by_its_old_name_with_a_warning(name: str) -> None:
    new = importlib.import_module(f"jaxpeft.data.{MOVED[name]}.{name}")
    said = f"jaxpeft.data.{name} is called jaxpeft.data.{MOVED[name]}.{name} now"
    sys.modules.pop(f"jaxpeft.data.{name}", None)
    with pytest.warns(DeprecationWarning, match=said):
        old = importlib.import_module(f"jaxpeft.data.{name}")
    public = {key for key in vars(new) if key[0] != "_"}
    assert {key for key in public if getattr(old, key) is getattr(new, key)} == public


def test_every_command_is_a_folder_with_a_command_line() -> None:
    for verb in VERBS:
        module = command_line(verb)
        assert Path(str(module.__file__)) == PACKAGE / verb / "__main__.py"
        assert f"`python -m jaxpeft.{verb} " in str(module.__doc__).splitlines()[0]
        assert callable(module.main) and dataclasses.is_dataclass(module.ARGUMENTS)


@pytest.mark.slow
def test_every_public_name_can_be_imported_first() -> None:
    # one name of each module stands for the others of it, and one method for all: they come from
    # one table
    names = {where: name for name, where in jaxpeft._WHERE.items()} | {"": "LoRA"}
    lines = [
        "from jaxpeft import *; LoRA, rewrite, Quant, load_adapter",
        "import jaxpeft.core.targets, jaxpeft.quant.quantize",
    ]
    lines += [f"from jaxpeft import {name}" for name in names.values()]
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def methods() -> set[str]:
    return {cls.__name__ for cls in jaxpeft.METHODS.values()}


@pytest.mark.parametrize(("old", "new"), jaxpeft._RENAMED.items())
def test_a_public_name_that_is_renamed_still_works_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"jaxpeft.{old} is deprecated; use jaxpeft.{new}"):
        found = getattr(jaxpeft, old)
    assert found is getattr(jaxpeft, new)
    assert old not in jaxpeft.__all__


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'jaxpeft' has no attribute 'Lora'"):
        jaxpeft.Lora  # noqa: B018 - the access is the test
    assert methods() <= set(dir(jaxpeft)) == set(jaxpeft.__all__)


DEFAULTS = {("jaxpeft.config.candidates", "full")}
"""Modules that name a method as a default: what others are a share of, where a comparison does not
say it.
"""


def test_no_module_outside_of_the_methods_has_a_case_for_one_of_them() -> None:
    known = {
        text
        for name, method in jaxpeft.METHODS.items()
        for text in (name, method.peft.type)
        if text
    }
    found: set[tuple[str, str]] = set()
    for module, path in modules().items():
        if module.startswith("jaxpeft.methods"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                asks = any(
                    isinstance(side, ast.Attribute) and side.attr in ("name", "peft_type")
                    for side in sides
                )
                texts = {side.value for side in sides if isinstance(side, ast.Constant)} & known
                found |= {(module, str(text)) for text in texts if asks}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                classes = {word.id for word in ast.walk(node.args[1]) if isinstance(word, ast.Name)}
                found |= {
                    (module, name)
                    for name in classes & {method.__name__ for method in jaxpeft.METHODS.values()}
                }
    assert found == DEFAULTS
