# Targets make what they need in a virtual environment, .venv unless VENV says otherwise.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint docs bench sanitize clean

demo: $(VENV)/demo.stamp
	rm -rf runs/demo
	$(BIN)/python -m clipfast.train --out runs/demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks report

lint: $(VENV)/dev.stamp
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files

docs: $(VENV)/dev.stamp
	rm -rf build/docs
	$(BIN)/python docs/make.py

# The compiled kernels by themselves: every instruction set that this processor has, over awkward shapes.
sanitize:
	mkdir -p build
	for check in address,undefined thread; do \
	  $(CXX) -std=c++17 -O1 -g -Wno-psabi -fno-sanitize-recover=all -fsanitize=$$check tests/sanitize.cpp \
	    $(filter-out csrc/bindings.cpp, $(wildcard csrc/*.cpp)) -o build/sanitize -pthread && build/sanitize || exit 1; \
	done

# torch comes first and alone: constraints.txt pins it, so that nothing pulls another build. The editable install lets
# the source tree find its compiled extension.
$(VENV)/%.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch numpy
	$(PIP_INSTALL) --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
