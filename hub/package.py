"""Writes the package for Hugging Face's kernel hub, which `kernels.get_local_kernel` loads.

    python hub/package.py build/hub

The folder is a project of theirs: what kernel-builder compiles (`build.toml`, `csrc/`,
`torch-ext/`), the card, and in `build/` the variant for the torch, processor and system at hand,
compiled here. The variants that one publishes are compiled by kernel-builder, in its sandbox with
old C libraries.

The Python code is that of svitt_ops and kernels but for two things: imports are relative, since the
hub names the package anew for each build, and `_ops.py` holds the namespace of the build.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / "hub"
LEFT_OUT = (
    "__main__.py",
    "info.py",
    "testing.py",
    "compile_check.py",
    "machine_code.py",
    "_ops.py",
)
"""Modules of commands and tests, and the one that each build has its own of."""
ALLOWED = sys.stdlib_module_names | {"torch", "triton"}
BACKEND = "cuda" if torch.version.cuda else "cpu"


def python_files() -> Iterator[tuple[str, str]]:
    """Name and text of each module, as the package has it."""
    for folder, inside in (("svitt_ops", ""), ("kernels", "kernels/")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in LEFT_OUT:
                name = inside + path.relative_to(ROOT / folder).as_posix()
                yield name, with_relative_imports(path.read_text(), name)


def with_relative_imports(source: str, name: str) -> str:
    """A module's text for a package whose name is not known.

    Args:
        source: the text.
        name: of its file, relative to the package.

    Raises:
        ValueError: where it still imports what is not torch, triton or the standard library, or
            calls ops in the namespace that is not the package's.
    """
    dots = "." * (name.count("/") + 1)
    source = re.sub(r"(?m)^( *from )svitt_ops\.", rf"\1{dots}", source)
    source = re.sub(r"(?m)^( *from )svitt_ops import", rf"\1{dots} import", source)
    source = source.replace('import_module(f"svitt_ops.', 'import_module(f"{__package__}.')
    for node in ast.walk(ast.parse(source)):
        found = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        found += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
        for module in found:
            if module.split(".")[0] not in ALLOWED:
                raise ValueError(f"{name}: imports must be relative, or of torch, got {module}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.svitt_ops":
            raise ValueError(f"{name}: ops must be those of _ops, got torch.ops.svitt_ops")
    return source


def csrc_files(pattern: str) -> list[str]:
    """Names of the files below the repository that match."""
    return sorted(x.relative_to(ROOT).as_posix() for x in ROOT.glob(pattern) if x.is_file())


def namespace() -> str:
    """The name of this build: of the extension, of the package, of the ops' namespace."""
    digest = hashlib.sha1()
    for name, text in python_files():
        digest.update(f"{name}\0{text}\0".encode())
    for name in csrc_files("csrc/**/*"):
        digest.update(f"{name}\0".encode() + (ROOT / name).read_bytes() + b"\0")
    return f"_svitt_ops_{BACKEND}_{digest.hexdigest()[:10]}"


def write_project(out: Path) -> None:
    """What kernel-builder takes, in an empty folder."""
    shutil.copytree(ROOT / "csrc", out / "csrc")
    shutil.copytree(TEMPLATES / "torch-ext", out / "torch-ext")
    for name in ("CARD.md", "flake.nix"):
        shutil.copy(TEMPLATES / name, out)
    shutil.copy(ROOT / "LICENSE", out)
    text = (TEMPLATES / "build.toml").read_text()
    library = csrc_files("csrc/*.h")
    for kind in ("cpu", "cuda"):
        names = ",\n    ".join(json.dumps(x) for x in library + csrc_files(f"csrc/{kind}/**/*.*"))
        text = text.replace(f'["${kind}"]', f"[\n    {names},\n]")
    (out / "build.toml").write_text(text)
    write_python(out / "torch-ext" / "svitt_ops")  # with an _ops.py that kernel-builder generates


def write_python(folder: Path) -> None:
    """The modules of the package."""
    for name, text in python_files():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_variant(out: Path, name: str, extension: Path) -> Path:
    """One build of the package; its folder.

    Args:
        out: the project's folder.
        name: of the build, see `namespace`.
        extension: the compiled kernels, registered in the namespace of that name.
    """
    text = (TEMPLATES / "build.toml").read_text()
    given = dict(re.findall(r'(?m)^(\w+) = "?([^"\s]+)"?$', text))
    abi = given[BACKEND].replace(".", "")
    device = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    system = f"{platform.machine()}-{platform.system().lower()}"
    folder = out / "build" / f"torch-stable-abi{abi}-{device}-{system}"
    write_python(folder)
    (folder / "_ops.py").write_text(
        f'"""The ops of this build, in a namespace of their own."""\n\n'
        f"from pathlib import Path\n\nimport torch\n\n"
        f'torch.ops.load_library(Path(__file__).parent / "{name}.abi3.so")\n'
        f"ops = torch.ops.{name}\n\n\n"
        f"def add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    return f"{name}::{{op_name}}"\n'
    )
    shutil.copy(extension, folder / f"{name}.abi3.so")
    archs = re.findall(r"(?m)^cuda-capabilities = (.*)$", text)[0]
    metadata = {
        "id": name,
        "name": given["name"],
        "version": int(given["version"]),
        "license": given["license"],
        "python-depends": [],
        "backend": {"type": BACKEND} | ({"archs": json.loads(archs)} if BACKEND == "cuda" else {}),
        "digest": {"algorithm": "sha256", "files": hashes(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in base64, as the hub's library compares it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
    }


def compile_extension(name: str, folder: Path) -> Path:
    """All kernels, registered in the namespace of this name; the file, below a folder."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    command += ["--build-temp", str(folder / "temp")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "SVITT_HUB_NAME": name}, check=True)
    path = folder / "svitt_ops" / f"{name}.abi3.so"
    if not path.exists():
        sys.exit("hub/package.py: no C++20 compiler was found")
    return path


def main() -> None:
    """Write a project, with one variant."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"hub/package.py: {out} exists")
    name = namespace()
    with tempfile.TemporaryDirectory() as folder:
        extension = compile_extension(name, Path(folder))
        out.mkdir(parents=True)
        write_project(out)
        print(write_variant(out, name, extension))


if __name__ == "__main__":
    main()
