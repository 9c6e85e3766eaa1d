# Two commands on a fresh machine with Python and git: `make demo` and `make test`. Each also works alone and again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The library of csrc/cpu/ lies beside the package, as in a wheel.
BUILT := $(VENV)/.built
DOCS_INSTALLED := $(VENV)/.installed-docs

.PHONY: demo test lint bench docs clean

demo: $(INSTALLED) $(BUILT)
	$(BIN)/attnreg demo

test: $(INSTALLED) $(BUILT)
	$(BIN)/python -m pytest --numprocesses auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) $(BUILT)
	$(BIN)/python -m pytest benchmarks/test_overhead.py -s --benchmark-storage=benchmarks/results --benchmark-save=overhead
	$(BIN)/python -m pytest benchmarks/test_speed.py --benchmark-storage=benchmarks/results --benchmark-save=speed

docs: $(DOCS_INSTALLED)
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --fresh-env docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info backends/attnreg_cpu/lib

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(BUILT): $(wildcard csrc/cpu/*) backends/attnreg_cpu/build.py $(INSTALLED)
	rm -rf backends/attnreg_cpu/lib
	$(BIN)/python -m attnreg_cpu --output backends/attnreg_cpu/lib || echo "attnreg_cpu is not built: on the CPU torch_block runs"
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
