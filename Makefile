help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

install:  ## make .venv with gpt2cli and what the tests need
	bin/install test

test:  ## the tests, under five minutes on two cores
	bin/test

test-all:  ## the long tests too
	bin/test -m ''

lint:  ## ruff's rules and format
	bin/install test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench:  ## speed and memory of a random 124M model, beside other programs; ARGS="--rounds 1"
	bin/install
	.venv/bin/python benchmarks/run.py $(ARGS)

tiny:  ## train models/tiny anew, about a quarter of an hour
	bin/install
	.venv/bin/python models/make_tiny.py

.PHONY: help install test test-all lint bench tiny
