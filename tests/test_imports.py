"""Imports go down only, kernels < svitt_ops < models < training, and so inside of these layers.

Integrations stand on svitt_ops and models/parts, and nothing on them.

`import svitt_ops` is light.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one folder may import besides itself and the standard library; None is anything."""

    packages: frozenset[str] | None
    packages_in_functions: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    layers_in_functions: frozenset[str] = frozenset()


RULES = {
    "kernels": Rule(
        packages=frozenset({"torch", "triton"}),
        packages_in_functions=frozenset({"cuxray"}),  # the compile check's
    ),
    "svitt_ops": Rule(packages=frozenset({"torch"}), layers_in_functions=frozenset({"kernels"})),
    "models": Rule(
        packages=frozenset({"torch", "transformers"}),
        layers=frozenset({"svitt_ops"}),
        layers_in_functions=frozenset({"training"}),  # AutoProcessor's
    ),
    "training": Rule(packages=None, layers=frozenset({"svitt_ops", "kernels", "models"})),
    "integrations": Rule(
        packages=frozenset({"torch", "transformers", "timm", "sentence_transformers"}),
        layers=frozenset({"svitt_ops", "models"}),
    ),
}
FOLDERS = frozenset({*RULES, "bench", "tests", "examples"} - {"svitt_ops"})
EVERY_OTHER = "*"
FLOORS: dict[str, dict[str, set[str]]] = {
    "models": {"parts": set(), EVERY_OTHER: {"parts"}},
    "training": {
        "data": set(),
        "engine": {"data"},
        "tasks": {"data", "engine"},
        "corpora": {"data"},
        "embeddings": {"data", "engine", "tasks"},
        "cli": {"data", "engine", "tasks", "corpora", "embeddings"},
    },
}
"""What the folders of a layer may import of it besides themselves; its own files, anything."""
SHARED = (["parts"], ["systems"])
"""Of models, what data, engine and tasks may import."""
PARENTS: dict[str, set[str]] = {"simla": {"albef"}, "softmask": {"albef"}}
"""Systems that derive from another, which they may import."""
SEARCHED = ("svitt_ops.training.tasks", "svitt_ops.training.tasks.")
"""Where modules are found by name, so that no file has to know one: it is named, they are not."""


def package_of(folder: str) -> str:
    package = folder.replace("/", ".")
    return package if package.split(".")[0] == "svitt_ops" else f"svitt_ops.{package}"


def layer_of(name: str) -> str | None:
    """The folder that an imported name lives in; None outside of svitt_ops."""
    first, *rest = name.split(".")
    if first != "svitt_ops":
        return None
    return rest[0] if rest and rest[0] in RULES else "svitt_ops"


def floor_of(name: str, layer: str) -> str:
    """The folder of a layer that an imported name lives in; "" is the layer itself."""
    inside = name.removeprefix(package_of(layer)).split(".")[1:2]
    return inside[0] if inside and (REPOSITORY / layer / inside[0]).is_dir() else ""


def is_below(name: str, folder: str) -> bool:
    """Whether a file in a folder of a layer may import this name of the same layer."""
    layer, *own = folder.split("/")
    if layer not in FLOORS or not own or (name in SEARCHED and own[0] == "engine"):
        return True
    floors, floor = FLOORS[layer], floor_of(name, layer)
    allowed = floors.get(own[0], floors.get(EVERY_OTHER, set())) | PARENTS.get(own[0], set())
    return floor == own[0] or floor in allowed


def names_a_system(name: str, folder: str) -> bool:
    """Whether data, the engine or an integration, which serve every system, import one."""
    serves_all = folder in ("training/data", "training/engine", "training/tasks")
    serves_all |= folder.startswith("integrations")
    named = name.split(".")
    return serves_all and named[:2] == ["svitt_ops", "models"] and named[2:3] not in SHARED


def imports(node: ast.AST, package: str, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Every name imported below a node, and whether inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - child.level + 1] if child.level else []
            base += [child.module] if child.module else []
            yield from ((".".join([*base, alias.name]), in_function) for alias in child.names)
        elif isinstance(child, ast.Call) and is_import_call(child):
            yield leading_text(child.args[0]) if child.args else "", in_function
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, package, in_function or is_function)


def is_import_call(call: ast.Call) -> bool:
    return ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")


def leading_text(argument: ast.expr) -> str:
    """What is known of an import_module argument: a string, or the start of an f-string."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    known = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    return argument.value if known else ""


def objections(source: str, folder: str) -> list[str]:
    """The imports that a file in a folder must not have."""
    own_layer = folder.split("/")[0]
    rule = RULES[own_layer]
    found = []
    for name, in_function in imports(ast.parse(source), package_of(folder)):
        top = name.split(".")[0]
        layer = layer_of(name)
        if layer == own_layer:
            allowed = is_below(name, folder)
        elif layer is not None:
            private = any(part.startswith("_") for part in name.split("."))
            lazy = in_function and folder == own_layer and layer in rule.layers_in_functions
            allowed = (layer in rule.layers or lazy) and not private
            allowed = allowed and not names_a_system(name, folder)
        elif rule.packages is None:
            allowed = bool(name) and top not in FOLDERS
        else:
            allowed = top in sys.stdlib_module_names or top in rule.packages
            allowed |= in_function and top in rule.packages_in_functions
        if not allowed:
            found.append(f"{name or 'a computed name'}{' in a function' if in_function else ''}")
    return found


@pytest.mark.parametrize("layer", RULES)
def test_imports_go_down_only(layer: str) -> None:
    found = []
    for path in sorted((REPOSITORY / layer).rglob("*.py")):
        folder = path.parent.relative_to(REPOSITORY).as_posix()
        found += [
            f"{path.relative_to(REPOSITORY)} imports {name}"
            for name in objections(path.read_text(), folder)
        ]
    assert not found


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "import svitt_ops"),
        ("kernels", "from svitt_ops import layout"),
        ("kernels", "from ..layout import BlockLayout"),
        ("kernels", "def launch():\n    from svitt_ops.layout import BlockLayout"),
        ("kernels", "import numpy"),
        ("kernels", "import cuxray"),
        ("svitt_ops", "import triton"),
        ("svitt_ops", "import numpy as np"),
        ("svitt_ops", "from svitt_ops.kernels import tiles"),
        ("svitt_ops", "from svitt_ops import kernels"),
        ("svitt_ops", "from .kernels import tiles"),
        ("svitt_ops", "if True:\n    import svitt_ops.kernels.tiles"),
        ("svitt_ops", "def f():\n    import triton"),
        ("svitt_ops", "def f():\n    from svitt_ops.models import svitt"),
        ("svitt_ops", "import importlib\nimportlib.import_module('svitt_ops.kernels.tiles')"),
        ("svitt_ops", "import importlib\ndef f(name):\n    importlib.import_module(name)"),
        ("models", "from svitt_ops.training import engine"),
        ("models", "from svitt_ops.kernels import tiles"),
        ("models", "from svitt_ops import _library"),
        ("models", "import accelerate"),
        ("models/parts", "from svitt_ops.models.svitt import model"),
        ("models/parts", "from svitt_ops.models import svitt"),
        ("models/parts", "from ..svitt.model import SViTTModel"),
        ("models/parts", "if TYPE_CHECKING:\n    from svitt_ops.models.svitt.model import X"),
        ("models/parts", "def f():\n    import svitt_ops.models.frozen.model"),
        ("models/parts", "from svitt_ops.models.systems import load_system"),
        ("models/parts", "from svitt_ops.models import SViTTConfig"),
        ("models/parts", "importlib.import_module(f'svitt_ops.models.{name}')"),
        ("models/svitt", "from svitt_ops.models.frozen import SYSTEM"),
        ("models/frozen", "if TYPE_CHECKING:\n    from svitt_ops.models.svitt.model import X"),
        ("models/frozen", "from svitt_ops.models import convert"),
        ("models/frozen", "import svitt_ops.models"),
        ("training", "import bench"),
        ("training", "from models import svitt"),
        ("training", "from svitt_ops._library import define"),
        ("training/data", "from svitt_ops.training.engine.recipes import Recipe"),
        ("training/data", "from svitt_ops.training import read_frames"),
        ("training/engine", "from svitt_ops.training.tasks import pretrain"),
        ("training/engine", "def f():\n    import svitt_ops.training.tasks.retrieval"),
        ("training/engine", "importlib.import_module('svitt_ops.training.tasks.qa')"),
        ("training/tasks", "if TYPE_CHECKING:\n    from svitt_ops.training.cli import demo"),
        ("training/corpora", "from svitt_ops.training.engine import run"),
        ("training/data", "from svitt_ops.training import tasks"),
        ("training/engine", "from svitt_ops.models.svitt.model import SViTTModel"),
        ("training/engine", "from svitt_ops.models import SViTTForPreTraining"),
        ("training/tasks", "def f():\n    import_module('svitt_ops.models.svitt')"),
        ("svitt_ops", "def f():\n    import svitt_ops.integrations.timm"),
        ("models", "from svitt_ops.integrations.transformers import sparsify"),
        ("integrations", "from svitt_ops.training import engine"),
        ("integrations", "import numpy"),
        ("integrations/transformers", "from svitt_ops.models.svitt.model import SViTTModel"),
        ("integrations/transformers", "from svitt_ops import _validation"),
    ],
)
def test_a_wrong_import_is_objected_to(folder: str, source: str) -> None:
    assert len(objections(source, folder)) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "import math\nimport torch\nimport triton.language as tl"),
        ("kernels", "from svitt_ops.kernels import tiles\nfrom .tiles import row"),
        ("svitt_ops", "from torch import Tensor\nfrom svitt_ops import _library\nfrom . import nn"),
        ("svitt_ops", "def f():\n    from svitt_ops.kernels import tiles"),
        ("svitt_ops", "def f(m):\n    importlib.import_module(f'svitt_ops.kernels.{m}')"),
        ("models", "import transformers\nimport svitt_ops as so\nfrom svitt_ops.nn import X"),
        ("models", "from svitt_ops.models.svitt import SYSTEM\nfrom . import parts, systems"),
        ("models/parts", "from svitt_ops.models.parts import text\nfrom .video import VideoTower"),
        ("models/svitt", "from svitt_ops.models.parts.text import X\nfrom . import model"),
        ("models/svitt", "if TYPE_CHECKING:\n    from ..parts.system import System"),
        ("training", "import av\nfrom svitt_ops.models import svitt\nimport svitt_ops"),
        ("training/engine", "from svitt_ops.training import tasks"),
        ("training/engine", "def f(n):\n    import_module(f'svitt_ops.training.tasks.{n}')"),
        ("training/tasks", "from svitt_ops.training.tasks.parts import ranks"),
        ("training/cli", "from svitt_ops.training.engine import run\nfrom . import demo"),
        ("integrations", "import torch\nimport timm\nfrom svitt_ops.randomness import seeded"),
        (
            "integrations/transformers",
            "import transformers\nfrom svitt_ops.models.parts import clips",
        ),
    ],
)
def test_a_right_import_is_not(folder: str, source: str) -> None:
    assert objections(source, folder) == []


def test_import_is_light() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import svitt_ops
new = {name.split(".")[0] for name in set(sys.modules) - before}
new = {name for name in new if not name.startswith("_sysconfigdata")}
print(*sorted(new - set(sys.stdlib_module_names) - {"svitt_ops", "torch"}))
print(*sorted({"triton", "transformers"} & set(sys.modules)))
print(torch.cuda.is_initialized())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr == ""
    heavier, forbidden, cuda_context = run.stdout.split("\n")[:3]
    assert heavier == ""
    assert forbidden == ""
    assert cuda_context == "False"
