# Targets make what they need in a virtual environment, .venv unless VENV says otherwise.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)

.PHONY: demo test test-triton fuzz lint docs bench sanitize clean

demo: $(VENV)/demo.stamp
	rm -rf runs/demo
	$(BIN)/python -m clipfast.emoji --out runs/demo

# Several tests run at a time: OpenMP's threads must not wait by spinning, and NumPy, which Triton's interpreter computes
# with, takes one thread.
PYTEST = OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --benchmark-disable

test: $(VENV)/test.stamp
	$(PYTEST)

test-triton: $(VENV)/test-triton.stamp
	$(PYTEST) tests/test_triton.py tests/test_triton_compile.py tests/test_tuning.py

# Random cases against the dense formula in float64; a line for each that is wrong repeats it.
CASES ?= 20000
SEED ?= 0
fuzz: $(VENV)/test.stamp
	OMP_WAIT_POLICY=passive $(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED)

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks report runs/benchmarks/*.json

lint: $(VENV)/dev.stamp
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files

docs: $(VENV)/dev.stamp
	rm -rf build/docs
	$(BIN)/python docs/make.py

# The compiled kernels by themselves: every instruction set that this processor has, AMX emulated, over awkward shapes.
# Two jobs at a time, so that one sanitizer's files compile while the other runs.
sanitize:
	$(MAKE) --jobs 2 sanitize-address,undefined sanitize-thread

# Each file by itself; -g1 has the lines that a report names, in two thirds of the time that -g takes. A null pointer
# stops the program without UBSan's checks for one, which take a seventh of the time.
SANITIZED = tests/sanitize.cpp $(filter-out csrc/bindings.cpp, $(wildcard csrc/*.cpp))
SANITIZE_FLAGS = -std=c++17 -O1 -g1 -Wno-psabi -fno-sanitize-recover=all -fsanitize=$(SANITIZER) -fno-sanitize=null -DCLIPFAST_EMULATE_AMX -pthread

sanitize-%:
	$(MAKE) SANITIZER=$* build/sanitize/$*/run
	build/sanitize/$*/run

build/sanitize/$(SANITIZER)/run: $(SANITIZED:%.cpp=build/sanitize/$(SANITIZER)/%.o)
	$(CXX) $(SANITIZE_FLAGS) $^ -o $@

build/sanitize/$(SANITIZER)/%.o: %.cpp $(wildcard csrc/*.h tests/*.h)
	mkdir -p $(@D)
	$(CXX) $(SANITIZE_FLAGS) -c $< -o $@

# torch comes first and alone: constraints.txt pins it, so that nothing pulls another build. The editable install lets
# the source tree find its compiled extension, which each install compiles; the one for dev brings what test needs.
$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch numpy
	$(PIP_INSTALL) --editable ".[$*]"
	touch $@ $(if $(filter dev,$*),$(VENV)/test.stamp)

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
