"""The architecture of docs/architecture.md, held by parsing the imports of every module."""

import ast
import graphlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module imports from its own floor (without cycles) or from lower ones.
# A new module gets its place here.
FLOORS = (
    {"_compat", "formats"},
    {
        "blocks",
        "exact",
        "ggml_rounding",
        "interpret",
        "kquants",
        "microscaling",
        "activation",
        "qtensor",
        "quantizing",
        "rounding",
        "scaling",
        "sharding",
        "sizes",
        "spec",
        "trees",
    }
    | {"structural", "tracing"},
    {
        "algorithms",
        "matrices",
        "ops",
        "prepared",
        "prepared_products",
        "prepared_structural",
        "products",
        "rounded_products",
        "sites",
        "statistics",
        "token_masks",
    },
    {"exporting", "recipe", "recipes", "run", "solving"},
    {
        "calibration",
        "observing",
        "operands",
        "programs",
        "reporting",
        "tagged",
        "training",
        "transform",
    },
    {"evaluate", "io", "models", "sequential"},
    {"__main__", "cli"},
)
KERNEL_IMPORTERS = {
    "models",
    "prepared",
    "prepared_products",
    "prepared_structural",
    "rounded_products",
    "training",
}


class Import(NamedTuple):
    """`importer` (a dotted module name) imports `target` on a line."""

    importer: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules(root: Path, package: str) -> dict[str, Path]:
    """Returns {dotted name: file} of every module of a package."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path, package: str) -> Iterator[Import]:
    """Yields every absolute import of a package, those inside functions included.

    `from package import module` names the module, `from package import name` the package.
    """
    known = modules(root, package)
    for importer, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(importer, alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: use absolute imports"
                assert node.module is not None
                for alias in node.names:
                    dotted = f"{node.module}.{alias.name}"
                    yield Import(importer, dotted if dotted in known else node.module, node.lineno)


def component(module: str) -> str:
    """Returns what stands directly under qjax/: 'formats' for 'qjax.formats.base'."""
    return module.split(".")[1]


def floor(name: str) -> int:
    for index, names in enumerate(FLOORS):
        if name in names:
            return index
    raise AssertionError(f"qjax/{name} has no floor: add it to FLOORS in {Path(__file__).name}")


def floor_violations(root: Path) -> list[str]:
    """Lists the imports inside qjax that go up a floor or take from the public page."""
    bad = []
    for edge in imports(root, "qjax"):
        if edge.importer == "qjax" or not re.match(r"qjax(\.|$)", edge.target):
            continue
        importer = component(edge.importer)
        if edge.target == "qjax":
            if importer != "__main__":
                bad.append(f"{edge}: import from the module that defines the name")
        elif floor(component(edge.target)) > floor(importer):
            bad.append(f"{edge}: that is a higher floor")
    return bad


def kernel_violations(root: Path) -> list[str]:
    """Lists imports of pallas_kernels by others than KERNEL_IMPORTERS, and its own beyond jax."""
    bad = [
        f"{edge}: only {sorted(KERNEL_IMPORTERS)} may"
        for edge in imports(root, "qjax")
        if edge.target.split(".")[0] == "pallas_kernels"
        and (edge.importer == "qjax" or component(edge.importer) not in KERNEL_IMPORTERS)
    ]
    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    bad += [
        f"{edge}: kernels import jax and what it brings"
        for edge in imports(root, "pallas_kernels")
        if edge.target.split(".")[0] not in allowed
    ]
    return bad


def cycle(root: Path) -> list[str] | None:
    """Returns one import cycle among the modules of qjax, or None."""
    graph: dict[str, set[str]] = {name: set() for name in modules(root, "qjax")}
    for edge in imports(root, "qjax"):
        if edge.target in graph and edge.target != edge.importer:
            graph[edge.importer].add(edge.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def name_clashes(root: Path) -> set[str]:
    """Returns the public names of qjax that are also the name of a module they do not denote."""
    stems = {name.split(".")[1] for name in modules(root, "qjax") if "." in name}
    page = ast.parse((root / "qjax" / "__init__.py").read_text())
    public = {
        alias.asname or alias.name
        for node in page.body
        if isinstance(node, ast.ImportFrom) and node.module != "qjax"
        for alias in node.names
    }
    return stems & public


def distributions(requirements: list[str]) -> set[str]:
    """Returns the normalized distribution names of requirement strings."""
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in names if match}


def test_imports_go_down_the_floors():
    assert not floor_violations(ROOT)


def test_imports_have_no_cycle():
    assert cycle(ROOT) is None


def test_few_import_the_kernels_and_kernels_import_jax():
    assert not kernel_violations(ROOT)


def test_no_module_has_the_name_of_a_public_function():
    assert not name_clashes(ROOT)


def test_every_module_has_a_floor():
    for name in modules(ROOT, "qjax"):
        if "." in name:
            floor(component(name))


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = distributions(
        project["dependencies"] + extras["models"] + extras["gguf"] + extras["plot"]
    )
    providers = importlib.metadata.packages_distributions()
    for edge in imports(ROOT, "qjax"):
        top = edge.target.split(".")[0]
        if top in {"qjax", "pallas_kernels"} or top in sys.stdlib_module_names:
            continue
        provided_by = distributions(providers.get(top, [top]))
        assert provided_by & declared, f"{edge}: {top} is not a dependency in pyproject.toml"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project that keeps every rule; each test below breaks one."""
    files = {
        "qjax/__init__.py": "from qjax.qtensor import QTensor as QTensor\n",
        "qjax/formats/__init__.py": "from qjax.formats.base import Format as Format\n",
        "qjax/formats/base.py": "import jax\nclass Format: pass\n",
        "qjax/qtensor.py": "from qjax.formats import Format\nclass QTensor: pass\n",
        "qjax/ops.py": "from qjax import qtensor\n",
        "qjax/prepared.py": "import pallas_kernels\n",
        "qjax/run.py": "from qjax.ops import qtensor\n",
        "pallas_kernels/__init__.py": "import functools\nimport jax.numpy as jnp\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert not floor_violations(tmp_path)
    assert not kernel_violations(tmp_path)
    assert not name_clashes(tmp_path)
    assert cycle(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("qjax/qtensor.py", "from qjax.ops import dot_general\n"),
        ("qjax/qtensor.py", "from qjax import run\n"),
        ("qjax/qtensor.py", "def f():\n    import qjax.run\n"),
        ("qjax/run.py", "from qjax import QTensor\n"),
        ("qjax/run.py", "import qjax\n"),
    ],
)
def test_an_import_upwards_is_seen(tree: Path, file: str, text: str):
    (tree / file).write_text(text)
    assert len(floor_violations(tree)) == 1


def test_a_module_without_a_floor_is_seen(tree: Path):
    (tree / "qjax/newcomer.py").write_text("from qjax import qtensor\n")
    with pytest.raises(AssertionError, match="newcomer has no floor"):
        floor_violations(tree)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("qjax/run.py", "from pallas_kernels.dispatch import choose\n"),
        ("qjax/__init__.py", "import pallas_kernels\n"),
        ("pallas_kernels/dispatch.py", "import flax\n"),
        ("pallas_kernels/dispatch.py", "from qjax import formats\n"),
    ],
)
def test_a_forbidden_kernel_import_is_seen(tree: Path, file: str, text: str):
    (tree / file).write_text(text)
    assert len(kernel_violations(tree)) == 1


def test_a_cycle_on_one_floor_is_seen(tree: Path):
    (tree / "qjax/trees.py").write_text("from qjax import qtensor\n")
    (tree / "qjax/qtensor.py").write_text("def f():\n    from qjax.trees import partition\n")
    assert not floor_violations(tree)
    found = cycle(tree)
    assert found is not None
    assert {"qjax.trees", "qjax.qtensor"} <= set(found)


def test_a_name_clash_is_seen(tree: Path):
    (tree / "qjax/__init__.py").write_text("from qjax.qtensor import QTensor as ops\n")
    assert name_clashes(tree) == {"ops"}
