# make demo | test | lint | bench, and the checks of .ci/run. Each target sets up .venv first.
#   make setup PYTHON=python3.12 TORCH=torch==2.11.0     another Python, another torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The newest of these that the Python and the torch at hand accept.
TRITON ?= triton>=3.6,<=3.9.0
OLD_TRITON := 3.6.0
# The library of Hugging Face's kernel hub; not for .venv, since transformers uses it where it can.
KERNELS := 0.17.2
PYTEST_ARGS ?=
# The tests over all cores, up to eight: each worker takes half a gigabyte. -n 0 for one process.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(CURDIR)/.venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' 2>/dev/null)

.PHONY: setup demo test lint format bench compile-check compile-check-newest compile-check-oldest \
  cuda-check header-check asan isa-check interpreter-check fuzz wheel-check hub-check guides docs clean
.DELETE_ON_ERROR:

setup: .venv/installed

# torch comes first and alone, so that nothing after it can choose another one.
.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10 or missing: make setup PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot create environments: install its venv package" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt setuptools wheel ninja numpy '$(TORCH)'
	touch $@

.venv/installed: .venv/torch pyproject.toml setup.py $(CSRC)
	$(PIP) install -q -c constraints.txt --no-build-isolation \
	  "$(TRITON); sys_platform == 'linux'" -e '.[dev,bench,train,data,app]'
	touch $@

demo: .venv/installed
	$(BIN)/svitt demo $(DEMO_ARGS)

test: .venv/installed
	$(BIN)/pytest $(PARALLEL) $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(wildcard svitt_cli.py svitt_ops models training integrations)
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))
	$(BIN)/codespell

format: .venv/installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

bench: .venv/installed
	$(BIN)/python -m bench $(BENCH_ARGS)

# Every Triton kernel for sm_80 and sm_90, by the newest Triton and, at the same time, by the oldest
# supported one.
compile-check: .venv/installed build/triton-$(OLD_TRITON)
	$(MAKE) --no-print-directory -j2 --output-sync compile-check-newest compile-check-oldest

compile-check-newest:
	$(BIN)/python -m svitt_ops.kernels.compile_check --kept kernels/machine_code.json

compile-check-oldest:
	PYTHONPATH=$(CURDIR)/build/triton-$(OLD_TRITON) $(BIN)/python -m svitt_ops.kernels.compile_check

build/triton-$(OLD_TRITON): | .venv/installed
	rm -rf $@.part
	$(PIP) install -q --no-deps --target $@.part triton==$(OLD_TRITON)
	mv $@.part $@

cuda-check: .venv/installed
	$(BIN)/python setup.py -q cuda_check

header-check: .venv/installed
	$(BIN)/python setup.py -q header_check

# The ops' tests on a CPU extension built with gcc's AddressSanitizer, which the interpreter is not.
asan: .venv/installed
	SVITT_SANITIZE=address $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	ldd build/asan/lib/svitt_ops/_C_cpu.abi3.so | grep -oE '/\S*lib(asan|stdc\+\+)\.so\S*' > build/asan/preload
	LD_PRELOAD="$$(paste -sd: build/asan/preload)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(CURDIR)/build/asan/lib \
	  $(BIN)/pytest -p no:cacheprovider --capture=sys tests/ops $(PYTEST_ARGS)

# The instruction sets of older processors: the ops against fp64, and with NaN, in C++.
isa-check: .venv/installed
	for isa in generic avx2 avx512 avx512_bf16; do \
	  SVITT_CPU_CAPABILITY=$$isa $(BIN)/pytest -p no:cacheprovider tests/ops \
	    -k 'cpp and (fp64 or not_finite)' $(PYTEST_ARGS) || exit 1; \
	done

# The reader of videos and pictures on 2,000 mutated files.
fuzz: .venv/installed
	$(BIN)/python tests/training/data/fuzz.py --count 2000

# The interpreted kernels where numpy, torch and the C++ ops round as on the oldest processors, and
# with every access to memory watched.
interpreter-check: .venv/installed
	OPENBLAS_CORETYPE=Nehalem ATEN_CPU_CAPABILITY=default SVITT_CPU_CAPABILITY=generic \
	  $(BIN)/pytest $(PARALLEL) -p no:cacheprovider --watch-memory tests/ops tests/kernels -k triton \
	  $(PYTEST_ARGS)

# sdist -> wheel -> an environment that has nothing but the wheel and, by a path file, torch.
wheel-check: .venv/installed
	rm -rf build/wheel
	$(BIN)/python setup.py -q sdist --dist-dir build/wheel
	$(PIP) wheel -q --no-build-isolation --no-deps --wheel-dir build/wheel build/wheel/*.tar.gz
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install -q --disable-pip-version-check --no-deps build/wheel/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$(build/wheel/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
	mkdir build/wheel/outside
	cd build/wheel/outside && ../venv/bin/svitt info && ../venv/bin/python $(CURDIR)/tests/smoke.py

# The package for the kernel hub, whole: loaded by their library, alone and beside ours.
hub-check: .venv/installed build/kernels-$(KERNELS)
	rm -rf build/hub
	$(BIN)/python hub/package.py build/hub
	SVITT_HUB=$(CURDIR)/build/hub $(BIN)/pytest -p no:cacheprovider tests/test_hub.py $(PYTEST_ARGS)

build/kernels-$(KERNELS): | .venv/installed
	rm -rf $@.part
	$(PIP) install -q --no-deps --target $@.part kernels==$(KERNELS) kernel-abi-check==0.14.1
	mv $@.part $@

# Every documented command, in an environment that has the wheel and its extra `train` alone.
guides: .venv/installed
	rm -rf build/guides
	$(BIN)/python setup.py -q sdist --dist-dir build/guides
	$(PIP) wheel -q --no-build-isolation --no-deps --wheel-dir build/guides build/guides/*.tar.gz
	$(PYTHON) -m venv build/guides/venv
	build/guides/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt '$(TORCH)'
	build/guides/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  "$$(echo build/guides/*.whl)[train]"
	build/guides/venv/bin/python tests/guides build/guides/venv/bin build/guides/reader

# The site of README.md and docs/, in build/docs/html: without a warning, and loading nothing from elsewhere.
docs: .venv/installed build/docs-tools
	rm -rf build/docs
	PYTHONPATH=$(CURDIR)/build/docs-tools $(BIN)/python -m sphinx -q -n -W --keep-going \
	  -c docs -d build/docs/doctrees . build/docs/html
	$(BIN)/python docs/check.py build/docs/html

build/docs-tools: docs/requirements.txt | .venv/installed
	rm -rf $@ $@.part
	$(PIP) install -q --target $@.part -r docs/requirements.txt
	mv $@.part $@

clean:
	rm -rf .venv build dist *.egg-info svitt_ops/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
