# The two commands a newcomer needs: `make test` and `make demo`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
# DeepSpeed without its CUDA kernels: ZeRO does without them.
export DS_BUILD_OPS := 0
INSTALLED := $(VENV)/.installed

# The modules, and trained weights against plain PyTorch: what every set of versions has to pass (docs/versions.md).
CORE := tests/unit tests/parity

.PHONY: install test test-all test-quantized test-triton test-newest test-lowest test-docker test-axolotl demo docs gpu lint dist clean

install: $(INSTALLED)

# torch first and by itself: its exact version decides between a CPU and a CUDA build, and all others follow it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_fsam needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(shell grep '^torch==' constraints.txt)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Each test keeps to one thread: a file of tests for each of two cores.
test: install lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# With the long runs that `make test` leaves out.
test-all: install lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m 'slow or not slow' $(PYTEST_ARGS)

# QLoRA's. bitsandbytes stays out of the environment, where PEFT would load it in every process of every test.
test-quantized: install
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --target $(VENV)/quantized --upgrade bitsandbytes
	PYTHONPATH=$(VENV)/quantized $(VENV)/bin/python -m pytest tests/parity/test_qlora.py $(PYTEST_ARGS)

# The kernels for GPUs: compiled, and run in Triton's interpreter, where tests with millions of numbers take minutes. In a
# folder of its own, because torch and others change their ways where Triton is installed.
test-triton: install
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --target $(VENV)/triton --upgrade triton
	PYTHONPATH=$(VENV)/triton $(VENV)/bin/python -m pytest tests/unit/test_kernels.py $(PYTEST_ARGS)
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(VENV)/bin/python -m pytest tests/unit/test_perturbation.py -k 'not million and not keeps_the_radius and not passes_in_bfloat16' $(PYTEST_ARGS)

# With the newest releases that pyproject.toml admits, in an environment of its own: 6 GB, with PyPI's torch for CUDA.
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(VENV)-newest/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# With the lowest releases that pyproject.toml admits: 5 GB. uv finds them, so that they stand nowhere else.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --python $(VENV)-lowest --quiet --resolution lowest-direct --editable '.[dev]'
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile $(CORE) $(PYTEST_ARGS)

# With the packages of the Docker image, which has Python 3.12: make PYTHON=python3.12 test-docker. 5 GB.
test-docker:
	$(PYTHON) -m venv $(VENV)-docker
	$(VENV)-docker/bin/python -m pip install --quiet uv
	$(VENV)-docker/bin/uv pip install --python $(VENV)-docker --quiet --constraint docker/constraints-gpu.txt \
	    --editable '.[recipes,deepspeed]' sentence-transformers pytest pytest-timeout pytest-xdist
	$(VENV)-docker/bin/python -m pytest -n 2 --dist loadfile $(CORE) $(PYTEST_ARGS)

# The plugin with Axolotl itself, which needs Python 3.12: make PYTHON=python3.12 test-axolotl. 7 GB.
test-axolotl:
	$(PYTHON) -m venv $(VENV)-axolotl
	$(VENV)-axolotl/bin/python -m pip install --quiet uv
	$(VENV)-axolotl/bin/uv pip install --python $(VENV)-axolotl --quiet --editable . axolotl==0.21.0 pytest pytest-timeout
	$(VENV)-axolotl/bin/python -m pytest tests/tools/test_axolotl.py $(PYTEST_ARGS)

demo: install
	$(VENV)/bin/python recipes/demo.py

# The site, into site/. Strictly: a broken link or a reference to nothing fails. (With --quiet nothing would.)
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# What only a GPU can show. No installation comes first: a machine with a GPU has a torch of its own, and maybe no network.
gpu:
	$(or $(wildcard $(VENV)/bin/python),$(PYTHON)) -m benchmarks.gpu $(GPU_ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The sdist and, made from it, the wheel. Their page may have no link to a file beside it. A few tests then run in the
# unpacked sdist, which shows that nothing is missing.
dist: install
	rm -rf dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet build twine
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/twine check --strict dist/*
	rm -rf $(VENV)-dist/sdist && mkdir $(VENV)-dist/sdist
	tar --extract --file dist/*.tar.gz --directory $(VENV)-dist/sdist --strip-components 1
	! grep --line-number --perl-regexp '(\]\(|src="|href=")(?!https?:|#)' $(VENV)-dist/sdist/PKG-INFO
	cd $(VENV)-dist/sdist && $(CURDIR)/$(VENV)/bin/python -m pytest tests/promises/test_layout.py tests/unit/test_arguments.py

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest $(VENV)-docker $(VENV)-axolotl $(VENV)-dist dist outputs site
