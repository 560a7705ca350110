# make demo    install, then a complete run on the bundled images
# make test    install, then the test suite            (make test ARGS="-k parquet -x"; ARGS="-m long": what takes minutes)
# make lint    style, types and the layering of the package
# make docs    the documentation site into site/, strictly: a broken link fails; needs no network
# make clean   remove the environment and every cache (runs/ stays)
#
# Needs python3 >= 3.11 with venv, make, and a package index. Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Where HOME cannot be written, tools that keep files there would fail or complain; only then they are sent elsewhere.
ifneq ($(shell test -d "$$HOME" && test -w "$$HOME" && echo writable),writable)
export XDG_CACHE_HOME ?= $(CURDIR)/.home/cache
export PIP_CACHE_DIR ?= $(CURDIR)/.home/cache/pip
export MPLCONFIGDIR ?= $(CURDIR)/.home/matplotlib
# Ray makes a token for a cluster of its own and would save it under HOME; one given in the environment is not saved.
ifeq ($(RAY_AUTH_TOKEN)$(RAY_AUTH_TOKEN_PATH),)
export RAY_AUTH_TOKEN := $(shell od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
endif
endif

.PHONY: demo test lint docs install clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/raypipe demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadscope $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean
	@echo "site/index.html is the site; to read it: $(BIN)/python -m http.server --directory site"

install: $(STAMP)

# One complete install serves every target; it is repeated only when what it depends on changes.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: raypipe needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = ".".join(map(str, sys.version_info[:3])); \
	  sys.exit(0 if sys.version_info >= (3, 11) else "raypipe needs Python 3.11 or newer, and $(PYTHON) is " + v \
	  + "; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear .venv \
	  || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .home build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find raypipe jobs tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
