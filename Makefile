# `make demo` and `make test` do all set-up themselves, in .venv. PYTHON names the Python to build on.
PYTHON ?= python3

.PHONY: demo test clean

demo:
	@$(PYTHON) scripts/bootstrap run
	@.venv/bin/python -m hasten.demo

test:
	@$(PYTHON) scripts/bootstrap dev
	@scripts/check .venv/bin/python

clean:
	rm -rf .venv .venv-oldest out
