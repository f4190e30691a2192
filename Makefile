# Needs only Python 3.11+, make and a network. Everything is installed into .venv and removed with it.
#
#   make up ARGS="--port 9000"      options of `behest up`
#   make test ARGS="-k budget"      options of pytest
#   PYTHON=/path/to/python3 make up another Python than the newest one found

.POSIX:
.SUFFIXES:
.DEFAULT_GOAL := help

VENV = .venv
BIN = $(VENV)/bin
ARGS =
BENCH = bench/run.py

# pip may not complain about itself, nor about root: .venv is ours.
PIP_ENVIRONMENT = PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

# The newest usable Python. `command -v` is not enough: the shims of pyenv exist and fail. One that can make a
# virtual environment is preferred, so that the error below is shown only where there is none.
FIND_PYTHON = \
	found=; old=; \
	for name in $${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do \
	  command -v "$$name" >/dev/null 2>&1 || continue; \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { old="$$old $$name"; continue; }; \
	  [ -n "$$found" ] || found=$$name; \
	  if "$$name" -c 'import ensurepip, ssl, venv' >/dev/null 2>&1; then found=$$name; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "behest: no Python 3.11 or newer was found$${old:+ (too old or broken:$$old)};" \
	       "install one (apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  version=$$("$$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "behest: $$found has no venv module;" \
	       "install it: apt install python3-venv (or python$$version-venv)" >&2; \
	  exit 1; \
	fi

# $(call install,EXTRAS,STAMP,FURTHER): install this tree with extras, and further trees; only a complete installation
# leaves its stamp.
define install
	@echo "Installing Behest [$(1)] into $(VENV) (the first time takes a minute) ..."
	@$(PIP_ENVIRONMENT) $(BIN)/python -m pip install --quiet --progress-bar off -e '.[$(1)]' $(3) || { \
	  echo "behest: pip could not install the packages (see above); check the network and its proxy" \
	       "(HTTPS_PROXY, PIP_INDEX_URL), then run make again" >&2; \
	  exit 1; }
	@touch $(2)
endef

.PHONY: always help up down chat install-dev test test-sdk test-simulation test-outages test-cluster test-image test-focus test-finops test-fronts test-browser bench-page screenshots torture check bench soak clean-venv

help: ## show this list
	@echo "Behest: an OpenAI-compatible streaming gateway whose budgets hold, to the last token."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Options: make up ARGS=\"--port 9000\"    make test ARGS=\"-k budget\""

up: $(VENV)/.installed-up ## start everything on this machine (Ctrl-C stops it)
	@exec $(BIN)/behest up $(ARGS)

down: ## stop what `make up` started; the data stay
	@if [ -x $(BIN)/behest ]; then exec $(BIN)/behest down $(ARGS); else echo "Nothing was ever started here."; fi

chat: examples/chat/node_modules/.made ## serve the chat of examples/chat, beside a running `make up` (needs node and npm)
	@cd sdk/typescript && npm run --silent build
	@cd examples/chat && exec node server.mjs

install-dev: $(VENV)/.installed-dev ## make .venv with everything that the tests and checks need

test: $(VENV)/.installed-dev ## run every test that needs no cluster and no browser
	@$(BIN)/python -Im pytest -n 3 --dist loadfile $(ARGS)

test-sdk: $(VENV)/.installed-dev ## run the tests of the clients (those for TypeScript need node and npm)
	@$(BIN)/python -Im pytest sdk/python/tests tests/sdk -n 2 --dist loadfile $(ARGS)
	@$(BIN)/python -Im pytest tests/clients $(ARGS)
	@$(BIN)/python -Im pytest tests/typescript $(ARGS)

test-simulation: $(VENV)/.installed-dev ## play 2,000 small worlds and 20 of 300 sidecars in simulated time (a minute)
	@$(BIN)/python -Im pytest tests/simulation -n 2 --dist loadfile $(ARGS)

test-outages: $(VENV)/.installed-dev ## run the tests that take the database away in every way (minutes of waiting)
	@$(BIN)/python -Im pytest tests/outages -n 2 --dist loadfile $(ARGS)

test-cluster: $(VENV)/.installed-dev ## run the tests that need a Kubernetes API server (made here, once, where Go is)
	@$(BIN)/python -Im pytest tests/cluster $(ARGS)

test-image: $(VENV)/.installed-dev ## build the image, run the sidecar in a container of it (as root; buildah, containerd)
	@$(BIN)/python -Im pytest tests/images -s $(ARGS)

test-focus: $(VENV)/.installed-dev ## let the official FOCUS validator judge a bill (needs Python 3.12, made ready here, once)
	@$(BIN)/python -Im pytest tests/focus $(ARGS)

test-fronts: $(VENV)/.installed-bench ## run the sidecar behind nginx and Envoy (Debian: apt install nginx-light)
	@$(BIN)/python -Im pytest tests/fronts -s $(ARGS)

test-finops: $(VENV)/.installed-dev ## let a real Prometheus look on, and try every query of the dashboards and every alert (Debian: apt install prometheus)
	@$(BIN)/python -Im pytest tests/finops $(ARGS)

test-browser: $(VENV)/.installed-dev ## run the tests that need a browser (Debian: apt install chromium)
	@$(BIN)/python -Im pytest tests/browser $(ARGS)

bench-page: $(VENV)/.installed-dev ## measure the frames of the chat while 50,000 tokens stream into it (needs a browser)
	@PYTHONPATH=tests $(BIN)/python -m browser.long_answer $(ARGS)

screenshots: $(VENV)/.installed-dev ## take the pictures of the documents anew (needs a browser, too)
	@PYTHONPATH=tests $(BIN)/python -m browser.screenshots $(ARGS)

torture: $(VENV)/.installed-dev ## kill -9 sidecars and PostgreSQL for a while, then look at the books
	@PYTHONPATH=tests $(BIN)/python -m torture.run $(ARGS)

check: $(VENV)/.installed-dev ## lint, format, types, architecture, tests: what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -Im pytest -n 3 --dist loadfile $(ARGS)

bench: $(VENV)/.installed-bench ## measure the figures of docs/performance.md
	@$(BIN)/python $(BENCH) $(ARGS)

soak: $(VENV)/.installed-dev ## mixed load for half an hour: memory and descriptors must come to rest (ARGS="--minutes 30")
	@$(BIN)/python -m bench.soak $(ARGS)

clean-venv: ## remove .venv
	rm -rf $(VENV)

# Looked at every time, and touched only when it is made: a .venv whose Python is gone, or which was moved with the
# folder (it holds absolute paths), is made anew. One that somebody made by hand is used as it is.
$(VENV)/.made: always
	@if [ -e $(VENV) ]; then \
	  if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "$(VENV) has no working Python 3.11 or newer: making it anew."; rm -rf $(VENV); \
	  elif [ -e $@ ] && [ "$$(cat $@)" != "$$(pwd)" ]; then \
	    echo "$(VENV) was moved: making it anew."; rm -rf $(VENV); \
	  fi; \
	fi; \
	if [ ! -e $(VENV) ]; then \
	  $(FIND_PYTHON); \
	  echo "Making $(VENV) with $$("$$found" --version) ..."; \
	  "$$found" -m venv $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "behest: $$found could not make $(VENV); install its venv module (apt install python3-venv)" >&2; \
	    exit 1; }; \
	fi; \
	if [ ! -e $@ ]; then \
	  $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null || exit 1; \
	  pwd > $@; \
	fi

$(VENV)/.installed-up: $(VENV)/.made pyproject.toml
	$(call install,embedded$(comma)demo,$@)

# All that `up` needs is part of it.
$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml sdk/python/pyproject.toml
	$(call install,dev,$@,-e ./sdk/python)
	@touch $(VENV)/.installed-up

# The peers that the figures are measured against.
$(VENV)/.installed-bench: $(VENV)/.made pyproject.toml sdk/python/pyproject.toml
	$(call install,dev$(comma)bench,$@,-e ./sdk/python)
	@touch $(VENV)/.installed-up $(VENV)/.installed-dev

# The client is a folder of this checkout, linked here: `chat` builds it anew each time, from what it is then.
examples/chat/node_modules/.made: examples/chat/package-lock.json sdk/typescript/package-lock.json
	@command -v npm >/dev/null || { echo "behest: npm was not found: install Node.js 20.19 or newer" >&2; exit 1; }
	@echo "Installing the chat's packages (the first time takes a minute) ..."
	@cd sdk/typescript && npm ci --silent --ignore-scripts
	@cd examples/chat && npm ci --silent --ignore-scripts
	@touch $@

comma := ,
