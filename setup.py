"""The build: folders mapped to packages, and the compiled extensions where a compiler is found.

Metadata is in pyproject.toml. Both extensions use torch's stable ABI and Python's limited API, so
one wheel serves every later torch and Python. `SVITT_SANITIZE=address` builds the CPU extension
with AddressSanitizer; `python setup.py cuda_check` compiles the CUDA sources without a GPU,
`python setup.py header_check` each header alone.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, find_packages, setup
from torch import __file__ as torch_file
from torch import version as torch_version
from torch.utils.cpp_extension import (
    COMMON_NVCC_FLAGS,
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    library_paths,
)

ROOT = Path(__file__).parent
os.chdir(ROOT)

# Package -> folder. A folder that does not exist, or is not a package, is left out.
FOLDERS = {
    "svitt_ops": "svitt_ops",
    "svitt_ops.kernels": "kernels",
    "svitt_ops.models": "models",
    "svitt_ops.training": "training",
    "svitt_ops.integrations": "integrations",
}
FOLDERS = {name: folder for name, folder in FOLDERS.items() if Path(folder, "__init__.py").exists()}
PACKAGES = [
    package
    for name, folder in FOLDERS.items()
    for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))
]

CPU_SOURCES = sorted(glob("csrc/cpu/**/*.cpp", recursive=True))
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CPU_HEADERS = sorted(glob("csrc/cpu/**/*.h", recursive=True))
CUDA_HEADERS = sorted(glob("csrc/cuda/**/*.*h", recursive=True))
TORCH_INCLUDE = str(Path(torch_file).parent / "include")

MACROS = [
    ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # torch 2.11, the oldest that can load it
    ("Py_LIMITED_API", "0x030A0000"),  # Python 3.10
]
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast"]
CXX_FLAGS += ["-Wall", "-Wextra", "-isystem", TORCH_INCLUDE]  # torch's own headers are not to warn
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
]


def find_compiler() -> str | None:
    """The first C++ compiler that turns a C++20 file into a shared library; $CXX alone if set."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <span>\nint probe(std::span<int> x) { return x[0]; }\n")
        flags = ["-std=c++20", "-shared", "-fPIC", str(source), "-o", str(Path(folder, "probe.so"))]
        for compiler in candidates:
            if runs([*shlex.split(compiler), *flags]) is None:
                return compiler
    return None


def runs(command: list[str]) -> str | None:
    """None if a command succeeds, else the last line that it says."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        return said.splitlines()[-1] if said else f"{command[0]} fails"
    return None


def cuda_fault(nvcc: str, compiler: str) -> str | None:
    """Why a CUDA source cannot be compiled and linked as the extension would be; None: it can."""
    with tempfile.TemporaryDirectory() as folder:
        source, objects = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text(
            "#include <cuda_runtime.h>\n__global__ void probe() {}\n"
            "int device(int *found) { return cudaGetDevice(found); }\n"
        )
        flags = [*NVCC_FLAGS, "-Xcompiler", "-fPIC", "-c", str(source), "-o", str(objects)]
        if said := runs([nvcc, "-ccbin", shlex.split(compiler)[0], *flags]):
            return f"nvcc cannot compile ({said})"
        places = [f"-L{place}" for place in library_paths("cuda")]
        link = ["-shared", str(objects), *places, "-lcudart", "-o", str(Path(folder, "probe.so"))]
        if said := runs([*shlex.split(compiler), *link]):
            return f"libcudart cannot be linked ({said})"
    return None


def cuda_release(nvcc: str | None) -> str | None:
    """The CUDA release of an nvcc, such as 13.0; None where there is no nvcc."""
    if nvcc is None or not os.access(nvcc, os.X_OK):
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:  # of another machine, or a script without an interpreter
        return None
    match = re.search(r"release (\d+\.\d+)", text)
    return match and match[1]


def cpu_extension() -> Extension:
    sanitize = os.environ.get("SVITT_SANITIZE")
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"] if sanitize else []
    return CppExtension(
        "svitt_ops._C_cpu",
        CPU_SOURCES,
        depends=CPU_HEADERS,
        define_macros=MACROS,
        extra_compile_args={"cxx": CXX_FLAGS + flags},
        extra_link_args=flags,
        py_limited_api=True,
    )


def cuda_extension() -> Extension:
    return CUDAExtension(
        "svitt_ops._C_cuda",
        CUDA_SOURCES,
        depends=CUDA_HEADERS,
        define_macros=[*MACROS, ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """What can be built here; each one left out is named on stderr with the reason."""
    compiler = find_compiler()
    if compiler is None:
        print("svitt_ops: no C++20 compiler found: installing pure Python", file=sys.stderr)
        return []
    os.environ["CXX"] = compiler
    os.environ.setdefault("CC", compiler)  # setuptools takes the linker from it
    built = [cpu_extension()] if CPU_SOURCES else []
    nvcc = CUDA_HOME and str(Path(CUDA_HOME, "bin", "nvcc"))
    release = cuda_release(nvcc)
    reason: str | None
    if not CUDA_SOURCES:
        reason = "there are no CUDA sources"
    elif torch_version.cuda is None:
        reason = "this torch is built without CUDA"
    elif release is None:
        reason = "no nvcc was found"
    elif release.split(".")[0] != torch_version.cuda.split(".")[0]:
        reason = f"torch is built for CUDA {torch_version.cuda}, nvcc is of CUDA {release}"
    else:
        reason = cuda_fault(str(nvcc), compiler)
    if reason is None:
        return [*built, cuda_extension()]
    print(f"svitt_ops: no CUDA extension: {reason}", file=sys.stderr)
    return built


class Check(Command):
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...


class CudaCheck(Check):
    description = "compile every csrc/cuda/*.cu; needs nvcc, but no GPU and no CUDA build of torch"

    def run(self) -> None:
        nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
        if not CUDA_SOURCES:
            print("cuda_check: there are no CUDA sources yet, nothing compiled")
        elif nvcc is None:
            print("cuda_check: no nvcc on the PATH, nothing compiled")
        else:
            macros = [f"-D{name}={value}" for name, value in MACROS] + ["-DUSE_CUDA"]
            flags = [*COMMON_NVCC_FLAGS, *NVCC_FLAGS, *macros, "-isystem", TORCH_INCLUDE]
            flags += ["-Werror=all-warnings", "-Xptxas=--warn-on-spills,--warning-as-error"]
            out = Path("build", "cuda-check")
            out.mkdir(parents=True, exist_ok=True)
            for source in CUDA_SOURCES + [alone(header, out) for header in CUDA_HEADERS]:
                target = str(out / f"{Path(source).stem}.o")
                if subprocess.run([nvcc, *flags, "-c", source, "-o", target]).returncode:
                    sys.exit(f"cuda_check: {source} does not compile")
                print(f"cuda_check: {source} compiles for sm_80 and sm_90a ({cuda_release(nvcc)})")


class HeaderCheck(Check):
    description = "compile every header of csrc/cpu alone, for each instruction set that it is for"

    def run(self) -> None:
        compiler = find_compiler()
        if compiler is None:
            sys.exit("header_check: no C++20 compiler found")
        macros = [f"-D{name}={value}" for name, value in MACROS]
        command = [*shlex.split(compiler), *CXX_FLAGS, *macros, "-Werror", "-fsyntax-only"]
        out = Path("build", "header-check")
        out.mkdir(parents=True, exist_ok=True)

        sources = {header: alone(header, out) for header in CPU_HEADERS}

        def fault(job: tuple[str, str]) -> str | None:
            """What the compiler says of a header; without a set, as an editor opens it."""
            header, isa = job
            chosen = [f"-DSVITT_ISA={isa}"] if isa else []
            done = subprocess.run(
                [*command, *chosen, sources[header]], capture_output=True, text=True
            )
            words = f"header_check: {header} does not compile alone for {isa or 'its own set'}"
            return done.stderr + words if done.returncode else None

        jobs = [(header, isa) for header in CPU_HEADERS for isa in ("", *other_sets(header))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            if faults := [said for said in pool.map(fault, jobs) if said]:
                sys.exit("\n".join(faults))
        print(f"header_check: {len(sources)} headers compile alone, {len(jobs)} with those of sets")


def other_sets(header: str) -> list[str]:
    """The sets that kernels compile for, beside generic; none if a header is for those it names."""
    text = Path("csrc/cpu/common/isa.h").read_text()
    _, *others = re.findall(r"^  SET\((\w+), ", text, re.MULTILINE)
    if Path(header).stem.startswith("pair"):
        return others[others.index("avx512_bf16") :]
    named = any(f"{Path(header).stem}_".startswith(f"{isa}_") for isa in others)
    return [] if named or "SVITT_" not in Path(header).read_text() else others


def alone(header: str, folder: Path) -> str:
    """A source that includes nothing but a header, twice."""
    source = folder / (header.replace("/", "-") + (".cu" if "cuda" in header else ".cpp"))
    source.write_text(f'#include "{ROOT / header}"\n' * 2)
    return str(source)


MODULES = [] if {"cuda_check", "header_check"} & set(sys.argv) else extensions()
setup(
    packages=PACKAGES,
    py_modules=["svitt_cli"],  # beside the packages: importing them takes the time that torch does
    package_dir=FOLDERS,
    ext_modules=MODULES,
    cmdclass={"build_ext": BuildExtension, "cuda_check": CudaCheck, "header_check": HeaderCheck},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if MODULES else {},
)
