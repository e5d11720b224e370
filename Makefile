# Everything runs in .venv, which is made and filled at first use and again when pyproject.toml changes.
PYTHON ?= python3
PORT ?= 30000
MODEL ?=

# TPU's compiler, as this jax wants it; apart from the other packages, since JAX would look for a TPU if it were one
LIBTPU := 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if "libtpu" in r))'

.PHONY: serve test test-clients test-fuzz test-ray test-research check clean

serve: .venv/serve
	.venv/bin/jaxrank serve $(MODEL) --port $(PORT)

# files in their order: with the fullest first, those of few slow tests are left for one process at the end
test: .venv/test
	.venv/bin/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Other servers' clients, in an environment of their own: they pin what they need
test-clients: .venv/serve .venv-clients/done
	cd tests/clients && PATH="$(CURDIR)/.venv/bin:$$PATH" "$(CURDIR)/.venv-clients/bin/python" -m pytest -q -c /dev/null --rootdir . --confcutdir .

# The server and jobs on Ray, whose packages are many: in an environment on top of the tests' own; RAY_TESTS for some
RAY_TESTS ?= .
test-ray: .venv-ray/done
	cd tests/ray && "$(CURDIR)/.venv-ray/bin/python" -m pytest -q --disable-warnings -c /dev/null --rootdir . --confcutdir . $(RAY_TESTS)

# CrossEncoder and the model for MTEB beside what they stand in for
test-research: .venv-research/done
	cd tests/research && "$(CURDIR)/.venv-research/bin/python" -m pytest -q -c /dev/null --rootdir . --confcutdir .

# schemathesis against the server's own OpenAPI, in an environment on top of the tests' own; REQUESTS=20000 for more
REQUESTS ?= 4000
test-fuzz: .venv-fuzz/done
	PYTHONPATH="$(CURDIR):$(CURDIR)/benchmarks" .venv-fuzz/bin/python tests/fuzz/run.py --requests $(REQUESTS)

check: .venv/check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/pyright $$(find jaxrank/convert/ jaxrank/server/ -name '*.py')  # it does not follow links to folders by itself
	.venv/bin/python tests/check_wheel.py
	.venv/bin/python tests/check_deploy.py

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

.venv-clients/done: Makefile
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet 'litellm>=1.80' 'cohere>=5' 'pytest>=8'
	touch $@

.venv-ray/done: .venv/test
	$(PYTHON) -m venv .venv-ray
	echo "import site; site.addsitedir('$$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')')" \
	    >"$$(.venv-ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	.venv-ray/bin/pip install --quiet -e ".[ray]"
	touch $@

.venv-research/done: .venv/test Makefile
	$(PYTHON) -m venv .venv-research
	echo "import site; site.addsitedir('$$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')')" \
	    >"$$(.venv-research/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	.venv-research/bin/pip install --quiet -e ".[mteb]" 'sentence-transformers==6.2.*' 'qdrant-client>=1.15'
	touch $@

.venv-fuzz/done: .venv/test
	$(PYTHON) -m venv .venv-fuzz
	echo "import site; site.addsitedir('$$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')')" \
	    >"$$(.venv-fuzz/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	.venv-fuzz/bin/pip install --quiet 'schemathesis>=4.32'
	touch $@

.venv/check: .venv/test
	.venv/bin/pip install --quiet -e ".[test,bench,dev]"
	touch $@

clean:
	rm -rf .venv .venv-clients .venv-fuzz .venv-ray .venv-research build dist *.egg-info
