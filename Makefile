# SPDX-License-Identifier: Apache-2.0
# A few words, each one command. Every one sets up what it needs first.

SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
SEEDS ?= 1000
PYTEST_ARGS ?=

.PHONY: help setup demo test check docs sim bench sanitize fuzz wheel man deb xen clean

help:
	@echo 'make demo      build, and serve a real filesystem through a Xen ring'
	@echo 'make test      every test that needs no Xen'
	@echo 'make check     format, lint, types, stubs, generated files, layout'
	@echo 'make docs      check the pages, and build them as a site into build/site'
	@echo 'make sim       the simulator: SEED=n replays one, otherwise SEEDS=n new ones, and'
	@echo '               then both ends against each other in every combination of features'
	@echo 'make bench     the data path beside the limit, the storage and the peers, and the'
	@echo '               published experiments; writes docs/benchmarks.md; SUITE=trixie: beside'
	@echo '               xen-blkback and QEMU on real Xen, into the same page'
	@echo 'make sanitize  the data plane under ASan and UBSan'
	@echo 'make fuzz      long runs of the property tests'
	@echo 'make xen       the tests on real Xen, in software emulation, of two generations;'
	@echo '               SUITE=bookworm or trixie: of one; SUITE=arm64: on ARM64, with guests and'
	@echo '               dom0 of larger pages'
	@echo 'make wheel     build the wheel and try it in a clean environment; ARCH=arm64: build the'
	@echo '               one for ARM64 with Python 3.13 (PYTHON=3.11), into dist/arm64'
	@echo 'make man       the man pages, into build/man'
	@echo 'make deb       build the Debian package in a bare root, and try it in another one; SUITE=bookworm'
	@echo '               or trixie: for that Debian; as root'

setup:
	@tools/setup debug

demo:
	@tools/setup release
	@PATH=$(CURDIR)/build/venv-release/bin:$$PATH examples/demo

test: setup
	pytest -n 2 $(PYTEST_ARGS)

check: setup
	ruff format --check src tests tools
	ruff check src tests tools
	mypy
	python -m mypy.stubtest --mypy-config-file pyproject.toml --allowlist tools/stubtest_allowlist.txt $$(tools/compiled_modules)
	python tools/gen_abi.py --check
	python tools/print_api.py --check
	codespell
	pytest -q tests/test_tidy.py tests/test_pages.py

docs:
	@tools/docs

sim: setup
ifdef SEED
	xvd sim --seed $(SEED)
	xvd sim --world devices --seed $(SEED)
else
	xvd sim --seeds $(SEEDS)
	xvd sim --world devices --seeds $(SEEDS)
	XVD_MATRIX=all pytest -q -n 2 tests/matrix
endif

bench:
ifdef SUITE
	@tools/bench_xen $(SUITE)
else
	@tools/setup release
	@build/venv-release/bin/xvd bench --out docs/benchmarks.md
endif

sanitize:
	@tools/setup sanitize
	tools/sanitized pytest -q -p no:cacheprovider tests/dataplane tests/hostile tests/contract tests/sim

fuzz: setup
	HYPOTHESIS_PROFILE=long pytest -q -n 2 --timeout 1200 tests/differential tests/blkif $(PYTEST_ARGS)

wheel: setup
ifdef ARCH
	@tools/cross_wheel $(ARCH) $(or $(PYTHON),3.13) dist/$(ARCH)
else
	tools/try_wheel
endif

man: setup
	python tools/print_man.py build/man

deb:
	@tools/make_deb $(SUITE)

xen: setup
	@for suite in $(or $(SUITE),bookworm trixie); do xen-rig/test $$suite $(PYTEST_ARGS) || exit; done

clean:
	rm -rf build dist .venv .tools
