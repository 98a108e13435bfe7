PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
WORKERS ?= 2

.PHONY: run test test-all test-oldest lint demo clean

# The default sweep: table on the terminal, report with plots in results/.
run: $(VENV)/.ready-run
	$(BIN)/visiontok sweep

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q

# Every reducer on every variant of every backbone.
test-all: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m "full or not full"

# The oldest supported versions, in an environment of their own.
test-oldest: $(VENV)-oldest/.ready
	$(VENV)-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile -q

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

demo: $(VENV)/.ready-demo
	$(BIN)/visiontok demo classify

clean:
	rm -rf $(VENV) $(VENV)-oldest results

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[timm,bench]'
	@touch $@

$(VENV)/.ready-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[timm,clip,mllm,bench,demo,test]'
	@touch $@

$(VENV)/.ready-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[timm,demo]'
	@touch $@

$(VENV)/.ready-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[timm,clip,mllm,bench,demo,test,dev]'
	@touch $@

$(VENV)-oldest/.ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -q -e '.[timm,clip,mllm,bench,demo,test]' -r tests/oldest.txt
	@touch $@
