# Every target makes the virtual environment when it is missing and reuses it otherwise.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test bench lint sanitize wheel clean

demo: $(INSTALLED)
	$(BIN)/fdda-fast demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

bench: $(PEERS)
	$(BIN)/python bench/operators.py
	$(BIN)/python bench/step.py
	$(BIN)/python bench/inference.py --networks resnet18 --batch 1 --rows 1 128 --rounds 3
	$(BIN)/python -m pytest bench --benchmark-only

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

# The compiled operators' tests with a build that checks addresses and undefined behaviour.
sanitize: $(INSTALLED)
	FDDA_FAST_SANITIZE=1 FDDA_FAST_CUDA=0 $(BIN)/python setup.py -q build --build-base build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=$$(echo build/sanitize/lib.*) \
	$(BIN)/pytest --capture=sys tests/ops tests/deploy

wheel: $(INSTALLED)
	$(BIN)/python -m build --no-isolation --wheel

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision setuptools wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# By the name of what is installed already: it is not built again.
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt 'fdda-fast[bench]'
	touch $@

clean:
	rm -rf build dist *.egg-info fdda_fast/*.so
