# Everything runs in .venv, which is made and filled at first use and again when pyproject.toml changes.
PYTHON ?= python3
PORT ?= 30000
MODEL ?=

# TPU's compiler, as this jax wants it; apart from the other packages, since JAX would look for a TPU if it were one
LIBTPU := 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if "libtpu" in r))'

.PHONY: serve test check clean

serve: .venv/serve
	.venv/bin/jaxrank serve $(MODEL) --port $(PORT)

test: .venv/test
	.venv/bin/pytest

check: .venv/check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/pyright jaxrank/convert/*.py jaxrank/server/*.py  # it does not follow links to folders by itself
	.venv/bin/python tests/check_wheel.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxrank needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/serve: .venv/bin/python pyproject.toml
	.venv/bin/pip install --quiet -e .
	touch $@

.venv/test: .venv/serve
	.venv/bin/pip install --quiet -e ".[test]"
	.venv/bin/pip install --quiet --no-deps --upgrade --target .venv/tpu "$$(.venv/bin/python -c $(LIBTPU))"
	touch $@

.venv/check: .venv/test
	.venv/bin/pip install --quiet -e ".[test,bench,dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
