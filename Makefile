PYTHON ?= python3
PY := .venv/bin/python
# UCI's Covertype travels in this wheel, which is unpacked and never installed.
WHEEL := scikit-multiflow==0.4.1 --no-deps --only-binary=:all: --python-version 3.7 --platform manylinux1_x86_64
SHA256 := ea35ca6820fcbe0bdc6707e9ed31e11a9de84f07d88da73b511c737383c271a6

help:
	@echo "make demo     N-pair without and with i-Mix on CovType, side by side (minutes on a CPU)"
	@echo "make test     the tests"
	@echo "make bench    the benchmarks, on the device at hand"
	@echo "make study    the runs of the README's results (a day on two cores; on a card the paper's scale)"
	@echo "make covtype  UCI's Covertype into data/"
	@echo "make setup    .venv with what requirements.txt lists (the targets above do it where they need it)"
	@echo "make clean    remove .venv, runs/demo-* and caches; data/ and other runs stay"

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

covtype: data/covtype.csv

data/covtype.csv: | .venv/installed
	rm -rf data/.covtype
	mkdir -p data/.covtype
	$(PY) -m pip download -q -d data/.covtype $(WHEEL)
	$(PY) -m zipfile -e data/.covtype/*.whl data/.covtype
	mv data/.covtype/skmultiflow/data/datasets/covtype.csv data/.covtype/csv
	$(PY) -c 'import hashlib, sys; sys.exit(hashlib.file_digest(open("data/.covtype/csv", "rb"), "sha256").hexdigest() != "$(SHA256)" and "covtype.csv: the digest differs")'
	mv data/.covtype/csv $@
	rm -rf data/.covtype
	@echo "data/covtype.csv: Copyright Jock A. Blackard and Colorado State University; reuse unlimited with this notice"

demo: setup
	@rm -rf runs/demo-alpha0 runs/demo-alpha2
	@$(MAKE) -s covtype || echo "CovType can't be had now: the demo takes scikit-learn's digits"
	@if ls data/covtype.* >/dev/null 2>&1; then flags="--dataset covtype --width 8 --epochs 40"; \
	else flags="--dataset digits --width 8 --epochs 100 --batch-size 128"; fi; \
	for alpha in 0 2; do $(PY) npair_tabular.py $$flags --alpha $$alpha --out runs/demo-alpha$$alpha || exit 1; done
	@$(PY) -c 'import json; a, b = (json.load(open(f"runs/demo-alpha{a}/result.json"))["test_accuracy"] for a in (0, 2)); \
	print(f"\nLinear evaluation, test accuracy: N-pair {a:.1%}, N-pair + i-Mix {b:.1%} ({100 * (b - a):+.1f} points).\n" \
	"Both encoders were trained without labels; the only difference is --alpha 0 or 2. The accuracy is that of a\n" \
	"linear classifier on the frozen encoder. One seed of a small encoder: the README has more seeds and the recipe.")'

test: setup
	$(PY) -m pytest -q tests

study: setup covtype
	$(PY) tests/study.py

bench: setup
	for bench in tests/bench_*.py; do $(PY) $$bench || exit 1; done

clean:
	rm -rf .venv .pytest_cache __pycache__ tests/__pycache__ runs/demo-alpha0 runs/demo-alpha2 data/.covtype

.PHONY: help setup covtype demo test study bench clean
