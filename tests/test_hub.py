"""The package for Hugging Face's kernel hub: built as they want it, loaded by their library.

Without `SVITT_HUB`, the folder of a whole package (`make hub-check`), a small one is compiled here,
with the kernels of two ops for any processor.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
LIBRARY = next(REPOSITORY.glob("build/kernels-*/"), None)
"""Theirs, outside of the environment: transformers calls it wherever it can import it."""
PARTS = ("entry", "generic")
OPS = """
import os, sys, warnings, torch
warnings.simplefilter("error", RuntimeWarning)  # of ops without compiled kernels

def assert_right(so, compiled=lambda function: function):
    generator = torch.Generator().manual_seed(0)
    layout = so.BlockLayout.local_random(100, block_size=16, num_random=2, generator=generator)
    inputs = [torch.randn(2, 3, 101, 32, generator=generator).requires_grad_() for _ in range(3)]
    rows = [torch.randn(20, 16, generator=generator).requires_grad_() for _ in range(2)]
    attention = lambda so: so.block_sparse_attention(*inputs, layout).square().sum()
    loss = lambda so: so.info_nce(*rows, 0.2, label_smoothing=0.1)
    for function, leaves in ((attention, inputs), (loss, rows)):
        found, expected = compiled(function)(so), function(so.reference)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)
        )
"""


@pytest.fixture(scope="session")
def package() -> ModuleType:
    """hub/package.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("hub_package", REPOSITORY / "hub/package.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def project(package: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with one variant, for this machine."""
    if LIBRARY is None:
        pytest.skip("needs the library of the kernel hub: make hub-check")
    if "SVITT_HUB" in os.environ:
        return Path(os.environ["SVITT_HUB"])
    out = tmp_path_factory.mktemp("hub")
    name = package.namespace()
    extension = tmp_path_factory.mktemp("extension") / f"{name}.abi3.so"
    torch_folder = Path(torch.__file__).parent
    parts = [f"{op}/{part}" for op in ("block_sparse_attention", "info_nce") for part in PARTS]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC"]
    command += ["-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-DCPU_KERNEL", f"-DTORCH_EXTENSION_NAME={name}"]
    command += ["-isystem", str(torch_folder / "include"), "-o", str(extension)]
    command += [str(REPOSITORY / f"csrc/cpu/{part}.cpp") for part in ["common/capability", *parts]]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("needs a C++ compiler")
    package.write_project(out)
    package.write_variant(out, name, extension)
    return out


def run(code: str, folder: Path, **environment: str) -> str:
    """What a new process says that has the hub's library, and is outside of the repository."""
    environment = {"PYTHONPATH": str(LIBRARY), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", OPS + code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_right_where_there_is_no_other(project: Path, tmp_path: Path) -> None:
    run(
        f"""
sys.modules["svitt_ops"] = None  # importing it fails
from importlib import import_module
from importlib.util import find_spec
from kernels import get_local_kernel
from pathlib import Path
so = get_local_kernel(Path({str(project)!r}))
assert_right(so)
assert_right(so, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
names = torch._C._dispatch_get_all_op_names()
assert f"{{so.__name__}}::info_nce" in names
assert not [name for name in names if name.startswith("svitt_ops::")]
assert not set(so.__all__) - set(dir(so))
for name, (_, module) in import_module(f"{{so.__name__}}._library").implementations.items():
    if find_spec("triton"):
        assert hasattr(import_module(f"{{so.__name__}}.kernels.{{module}}"), name), name
    full = f"{{so.__name__}}::{{name}}"
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU")
    assert compiled or "SVITT_HUB" not in os.environ, name
""",
        tmp_path,
    )


def test_it_stands_beside_ours(project: Path, tmp_path: Path) -> None:
    """Each with its own ops, FLOP formulas and layouts."""
    run(
        """
import svitt_ops
from kernels import get_kernel
so = get_kernel("someone/svitt-ops", version=0)
assert_right(so)
assert_right(svitt_ops)
from torch.utils.flop_counter import FlopCounterMode
from torch.utils import _pytree
counts = []
for each in (so, svitt_ops):
    with FlopCounterMode(display=False) as counter:
        each.info_nce(torch.randn(8, 4), torch.randn(8, 4), 0.1)
    counts.append(counter.get_total_flops())
assert counts[0] == counts[1] > 0, counts
layouts = [x.BlockLayout.local_random(32, block_size=16) for x in (so, svitt_ops)]
text = [_pytree.treespec_dumps(_pytree.tree_structure(x)) for x in layouts]
assert [_pytree.treespec_loads(x).type for x in text] == [type(x) for x in layouts]
""",
        tmp_path,
        LOCAL_KERNELS=f"someone/svitt-ops={project}",
    )


def test_the_builder_takes_it(project: Path, tmp_path: Path) -> None:
    """`build.toml` by their parser, the variant by their hashes, and files where they want them."""
    said = run(
        f"""
from pathlib import Path
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from kernels.variants import parse_variant
project = Path({str(project)!r})
print(*Build.open(project).general.backends)
(variant,) = (project / "build").iterdir()
parse_variant(variant.name)
digest = Metadata.read_from_file(variant / "metadata.json").digest
digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
""",
        tmp_path,
    )
    assert said == "cpu cuda\n"
    for name in ("CARD.md", "flake.nix", "LICENSE", "torch-ext/svitt_ops/__init__.py"):
        assert (project / name).is_file(), name
    for name in ("_ops.py", "svitt_ops"):  # generated by the builder, refused by it
        assert not (project / "torch-ext/svitt_ops" / name).exists(), name
    sources = [x for x in (project / "build.toml").read_text().split('"') if x.startswith("csrc/")]
    assert {project / x for x in sources} == {x for x in project.glob("csrc/**/*") if x.is_file()}


def test_the_extension_asks_for_the_stable_abis_alone(project: Path, tmp_path: Path) -> None:
    """Of torch and, as they check it, of Python 3.9; and for no libraries but torch's."""
    (path,) = project.glob("build/*/*.abi3.so")
    run(
        f"""
from kernel_abi_check import ObjectFile
assert ObjectFile({str(path)!r}).check_python_abi("3.9") == []
""",
        tmp_path,
    )
    said = subprocess.run(["readelf", "-dsW", path], check=True, capture_output=True, text=True)
    needed = re.findall(r"NEEDED.*\[([\w+-]+)\.so", said.stdout)
    system = {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert {*needed} - system <= {
        "libc10",
        "libtorch",
        "libtorch_cpu",
        "libtorch_cuda",
        "libcudart",
    }
    asked = re.findall(r" UND (\w+)", said.stdout)
    assert "torch_parallel_for" in asked
    assert not [name for name in asked if re.match("_ZN?K?(2at|3c10|5torch)", name)]


def test_what_is_written_twice_agrees(package: ModuleType) -> None:
    """The oldest torch in setup.py and build.toml, and the version's first number."""
    text = (REPOSITORY / "hub/build.toml").read_text()
    assert 'cpu = "2.11"' in text and 'cuda = "2.11"' in text
    assert '"0x020b000000000000"' in (REPOSITORY / "setup.py").read_text()
    from svitt_ops import __version__

    assert f"\nversion = {__version__.split('.')[0]}\n" in text


def test_imports_become_relative(package: ModuleType) -> None:
    source = "from svitt_ops import nn\nif x:\n    from svitt_ops.layout import BlockLayout\n"
    found = package.with_relative_imports(source, "reference/token_pruning.py")
    assert found == source.replace("svitt_ops.", "..").replace("svitt_ops", "..")
    load = 'import importlib\nimportlib.import_module(f"svitt_ops.kernels.{name}")\n'
    assert 'f"{__package__}.kernels.{name}"' in package.with_relative_imports(load, "_library.py")


@pytest.mark.parametrize(
    "source", ["import svitt_ops", "import numpy as np", "import torch, svitt_ops.layout as x"]
)
def test_an_import_that_the_hub_has_not_is_an_error(package: ModuleType, source: str) -> None:
    with pytest.raises(ValueError, match=r"nn\.py: imports must be relative, or of torch, got "):
        package.with_relative_imports(source, "nn.py")


def test_so_are_ops_of_another_namespace(package: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"nn\.py: ops must be those of _ops"):
        package.with_relative_imports("torch.ops.svitt_ops.info_nce(x)", "nn.py")


def test_the_name_is_of_the_content(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = package.namespace()
    assert before.isidentifier() and before == package.namespace()
    monkeypatch.setattr(package, "csrc_files", lambda pattern: [])
    assert package.namespace() != before
