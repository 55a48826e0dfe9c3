# What a user or a developer of Ionian types. Each target installs what it misses, on Debian, as root.
#
#   make demo     start a platform, deploy an app with the official client, call it     (KEEP=1 leaves it running)
#   make test     all tests that CI runs; the last line counts them
#   make lint     formats, lints and dependency arrows, checked
#   make help     all targets

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: help setup build demo test test-rust test-python test-e2e test-all bench bench-durability bench-neighbours simulate mutants chaos fuzz lint fmt clean

PYTHON := .venv-1.6.4/bin/python

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: ## Install what is missing: Debian packages, test runner, virtual environments with the client
	@scripts/setup system venvs nextest npm

build: ## The release binary, target/release/ionian
	@scripts/setup system
	cargo build --release --locked -p ionian-server

demo: ## Deploy the FastAPI app of the README on a fresh server, call it, show answer, URL and logs
	@scripts/setup system venvs
	@cargo build --release --locked -p ionian-server
	@$(PYTHON) scripts/demo

test: setup build ## Rust, Python and end-to-end tests
	@$(PYTHON) scripts/test python e2e rust

test-rust: build ## Only the Rust tests
	@scripts/setup venvs nextest
	@$(PYTHON) scripts/test rust

test-python: ## Only the tests of what runs inside containers
	@scripts/setup venvs
	@$(PYTHON) scripts/test python

test-e2e: build ## Only the end-to-end tests; PYTEST='-k name' chooses
	@scripts/setup venvs npm
	@$(PYTHON) scripts/test e2e

test-all: setup build ## What takes long, too
	@scripts/setup fuzz guest
	@IONIAN_LONG_TESTS=1 $(PYTHON) scripts/test python e2e rust fuzz cgroup2

fuzz: ## Fuzz every decoder that strangers reach; FUZZ_SECONDS=600 for each, FUZZ='grpc oci' chooses
	@scripts/setup system fuzz
	@scripts/fuzz $(FUZZ)

simulate: ## The scheduler against worlds in which everything dies; IONIAN_SIM_SEEDS=200000 says how many
	@IONIAN_SIM_SEEDS=$${IONIAN_SIM_SEEDS:-200000} cargo test --release --locked -p ionian-scheduler --lib \
		-- --exact tests::simulation::every_seed_keeps_the_invariants_and_comes_to_rest --nocapture

mutants: ## Mutation testing of the scheduler: changes that no test notices (half an hour)
	@scripts/mutants

bench: setup build ## Ratios against bare programs, taken in one run
	@$(PYTHON) benches/run

bench-durability: setup build ## Acknowledged inputs per second against the disk's syncs, taken in one run
	@cargo build --release --locked -p ionian-loadgen
	@$(PYTHON) benches/durability

bench-neighbours: setup build ## What a greedy function costs another one, taken in one run
	@$(PYTHON) benches/neighbours

chaos: setup build ## Kill server, workers and containers under load, and look for what was lost; CHAOS='--rounds 50'
	@cd e2e && ../$(PYTHON) -m chaos.matrix $(CHAOS)

lint: ## What must hold before a commit
	@scripts/setup venvs
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo xtask check-deps
	.venv-1.6.4/bin/ruff check .
	.venv-1.6.4/bin/ruff format --check .

fmt: ## Format everything
	@scripts/setup venvs
	cargo fmt --all
	.venv-1.6.4/bin/ruff check --fix .
	.venv-1.6.4/bin/ruff format .

clean: ## Remove what was built; layers of images and environments stay (they are in .cache and .venv-*)
	cargo clean
	rm -rf fuzz/target
	rm -rf e2e/.state
