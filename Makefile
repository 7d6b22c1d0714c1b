VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

# What to build: make engine MODEL=path-or-hub-id QUANT=int4 TP=4 CONFIG=configs/x.yaml
# Without QUANT the form is the config file's, else int4 for the sample model, else the source's.
MODEL  ?=
QUANT  ?= $(if $(CONFIG)$(MODEL),,int4)
TP     ?=
PP     ?=
BACKEND ?=
GPU     ?=
SM      ?=
FORMAT  ?=
CONFIG ?=
OUTPUT ?=

# Test files run in as many processes; a file stays in one, which shares its engines. They keep the
# order that tests/conftest.py gives them: sorted by their number of tests, the longest would run
# last, alone.
TEST_PROCESSES ?= 2

# What to judge, by what, and where reports go: make regress ENGINE=engines/new BASELINE=engines/old OUT=report
BASELINE  ?=
REFERENCE ?=
OUT       ?=

# What to serve, and where: make serve ENGINE=engines/x HOST=0.0.0.0 PORT=9000
SAMPLE := engines/smollm2-135m-instruct-int4_awq
ENGINE ?= $(SAMPLE)
HOST   ?= 127.0.0.1
PORT   ?= 8000

export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.PHONY: help ready install engine plan doctor serve regress test clients agents fuzz faults test-others test-xgrammar resolve audit lint format build clean compiled

help: ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: [^#]*##/\t/' | expand -t 12

# An environment of any fitting Python is kept, unless PYTHON asks for another.
INSTALL = scripts/install.sh $(VENV) $(if $(filter file,$(origin PYTHON)),any,$(PYTHON))

ready:
	@$(INSTALL)

install: ## create the virtual environment and install everything into it
	@$(INSTALL) '[test,lint]'

BUILD = $(BIN)/enginehouse-build $(MODEL) $(if $(OUTPUT),-o $(OUTPUT)) $(if $(QUANT),--quant $(QUANT)) \
	  $(if $(TP),--tp $(TP)) $(if $(PP),--pp $(PP)) $(if $(BACKEND),--backend $(BACKEND)) \
	  $(if $(FORMAT),--format $(FORMAT)) $(if $(CONFIG),--config $(CONFIG)) \
	  $(if $(GPU),--gpu $(GPU)) $(if $(SM),--sm $(SM)) $(if $(WORKERS),--workers $(WORKERS))

engine: ready ## compile an engine: make engine MODEL=... TP=4 QUANT=fp8 GPU=l40s CONFIG=...
	$(BUILD)

plan: ready ## what an engine takes per GPU: make plan MODEL=... TP=4 QUANT=fp8 GPU=h100
	$(BIN)/enginehouse-build $(MODEL) --plan $(if $(GPU),--gpu $(GPU)) $(if $(BACKEND),--backend $(BACKEND)) \
	  $(if $(TP),--tp $(TP)) $(if $(PP),--pp $(PP)) $(if $(CONFIG),--config $(CONFIG)) $(if $(QUANT),--quant $(QUANT))

# Status 3: everything but TensorRT-LLM works here, which is no error of make's.
doctor: ready ## what works on this machine, and how to mend what does not
	@$(BIN)/enginehouse-build doctor || test $$? -eq 3

# What a build prints on standard output is the engine's path, then two spaces and what became of it.
serve: ready ## build if need be, and serve: make serve [MODEL=... QUANT=... | ENGINE=...] PORT=...
ifneq ($(MODEL)$(CONFIG),)
	@engine=$$($(BUILD)) || { status=$$?; printf '%s\n' "$$engine"; exit $$status; }; \
	  exec $(BIN)/enginehouse serve "$${engine%%  (*}" --host $(HOST) --port $(PORT)
else
ifeq ($(ENGINE),$(SAMPLE))
	$(BIN)/enginehouse-build --quant int4_awq -o $(SAMPLE)
endif
	exec $(BIN)/enginehouse serve $(ENGINE) --host $(HOST) --port $(PORT)
endif

regress: ready ## judge an engine against an older one: make regress ENGINE=engines/new BASELINE=engines/old
	$(BIN)/enginehouse regress run $(ENGINE) $(if $(BASELINE),--baseline $(BASELINE)) \
	  $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(OUT),--out $(OUT))

test: install ## run the test suite: make test [THOROUGH=1] PYTHON=python3.12 VENV=.venv-3.12
	$(if $(THOROUGH),ENGINEHOUSE_THOROUGH=1) $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

compiled: install ## what the tests import, compiled once for the processes that run them
	$(BIN)/python -m pytest --collect-only -q > /dev/null

clients: install ## other people's clients and judges against a server with a scripted engine
	$(BIN)/python scripts/client_transcripts.py --scripted --jobs $(TEST_PROCESSES)

agents: install ## Codex and Claude Code against the same server: 0.7 GB of npm's
	$(BIN)/python scripts/agent_transcripts.py

faults: ready ## break a running server in one way after another: make faults [QUICK=1 | SOAK=minutes]
	$(BIN)/python scripts/faults.py $(if $(QUICK),--quick) $(if $(SOAK),--soak $(SOAK) --plot .cache/soak.png) \
	  $(if $(filter file,$(origin ENGINE)),,--engine $(ENGINE))

FUZZ ?= 20
FUZZERS := tests/server/http/test_any_request.py tests/server/launch/test_raw_http.py \
	   tests/server/test_openapi.py tests/runtime/schemas/test_hostile.py \
	   tests/build/sources/test_any_bytes.py tests/regress/test_any_bytes.py

fuzz: install ## the tests that draw their input, FUZZ times as long and anew each time: make fuzz FUZZ=100
	ENGINEHOUSE_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q -o timeout=0 -o faulthandler_timeout=0 $(FUZZERS)

test-others: install ## what needs no torch on Python 3.10, and a part of it on 3.12, where they are installed
	scripts/test_others.sh $(BIN)/uv

test-xgrammar: install ## the tests of constraints with xgrammar 0.1.25
	scripts/test_xgrammar.sh $(BIN)/python $(TEST_PROCESSES)

audit: install ## bandit over the code, pip-audit over the lock
	scripts/audit.sh $(BIN)/uv

resolve: install ## do the CPU and the TensorRT-LLM set of packages resolve on every Python they are for
	$(BIN)/python scripts/check_resolve.py

# mypy and pyright follow folders, not import hooks: five links give them the namespace.
.cache/links/enginehouse: Makefile
	@mkdir -p $@ && ln -sfn ../../../build ../../../runtime ../../../server ../../../scripts/regress ../../../scripts/verbs $@/

lint: install .cache/links/enginehouse ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

build: install ## wheel into dist/
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean: ## remove everything this Makefile made, but for the engines and the virtual environment
	rm -rf .cache dist enginehouse.egg-info
