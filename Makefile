# The project's commands; see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO := proto/modelaverage/v1/parameter_server.proto
GENERATE = $(BIN)/python -m grpc_tools.protoc -I proto $(PROTO) --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1)

CLIENTS := python node cpp go

# Tests run in this many processes: one for each core, and at least two, since many tests wait. 1: in pytest itself.
CORES := $(shell getconf _NPROCESSORS_ONLN)
JOBS := $(or $(filter-out 1,$(CORES)),2)
PYTEST = $(BIN)/pytest --numprocesses $(patsubst 1,0,$(JOBS))

.PHONY: help demo bench chaos conformance docs fuzz study test test-long lint types proto proto-check unit

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

# One stamp per set of packages: a second run of a command installs nothing.
$(VENV)/%.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch-model-average[$*] into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: $(VENV)/demo.stamp ## train the digits with a parameter server and two workers, or PS=2 WORKERS=3
	@$(BIN)/ma-launch --ps $(or $(PS),1) --workers $(or $(WORKERS),2) -- digits

bench: $(VENV)/dev.stamp ## compare a round with gloo's all-reduce and PyTorch's own averaging; QUICK=--quick for two minutes
	@$(BIN)/python -m bench.round $(QUICK)
	@$(BIN)/python -m bench.average $(QUICK)
	@$(BIN)/python -m bench.many $(QUICK)
	@$(BIN)/python -m bench.links $(QUICK)
	@$(if $(QUICK),,$(BIN)/pytest -m slow)

study: $(VENV)/dev.stamp $(VENV)/study.stamp ## train every arm beside synchronous training, on all processors; goes on where it was stopped (two hours); QUICK=1 for three minutes
	@$(BIN)/python -m study $(if $(QUICK),--quick)

chaos: $(VENV)/dev.stamp ## kill and stop processes for 200 rounds, check that nothing is lost; SEED=1, SQUEEZE=--squeeze, OUTER="sgd:lr=0.7,momentum=0.9,nesterov" (2 workers)
	@$(BIN)/python -m chaos --seed $(or $(SEED),0) $(SQUEEZE) $(if $(OUTER),--workers 2 --outer $(OUTER)) $(if $(COMPRESSION),--compression $(COMPRESSION))

fuzz: $(VENV)/dev.stamp ## send a million hostile inputs to handlers and data connections; INPUTS=10000 for fewer
	@$(BIN)/python -m fuzz --inputs $(or $(INPUTS),1000000)

conformance: $(VENV)/dev.stamp ## run the clients in Python, Node.js, C++ and Go through every case; CLIENTS=go for one
	@status=0; for client in $(CLIENTS); do \
	  echo; echo "== $$client"; command=examples/clients/$$client/client; \
	  if [ $$client = python ]; then command="$(BIN)/python $$command.py"; \
	  else examples/clients/$$client/build || { status=1; continue; }; fi; \
	  $(BIN)/python -m modelaverage.conformance $$command conform || status=1; \
	done; exit $$status

docs: $(VENV)/dev.stamp ## build the pages of docs/ and the API reference as a site in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

test: lint types proto-check unit ## check and test everything that a change may break; JOBS=1 for one process

test-long: $(VENV)/dev.stamp ## the tests that `make test` leaves out: many kills, Ray, trainers, clients in Node.js, C++ and Go
	$(PYTEST) --dist loadfile -m long

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint

types: $(VENV)/dev.stamp
	$(BIN)/mypy

unit: $(VENV)/dev.stamp
	$(PYTEST) --dist worksteal

proto: $(VENV)/dev.stamp ## regenerate the protobuf code
	$(call GENERATE,proto)

proto-check: $(VENV)/dev.stamp
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(call GENERATE,"$$dir") && for f in pb2.py pb2.pyi pb2_grpc.py; do \
	  diff -u proto/modelaverage/v1/parameter_server_$$f "$$dir"/modelaverage/v1/parameter_server_$$f \
	    || { echo "the generated code does not match $(PROTO): run 'make proto'"; exit 1; }; done
	@echo "generated code matches $(PROTO)"
