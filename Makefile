help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

install:  ## make .venv with gpt2cli and what the tests need
	bin/install test

test:  ## the tests, under five minutes on two cores
	bin/test

test-all:  ## the long tests too
	bin/test -m ''

trust:  ## the long form of README's promises: kills, full disks, flipped bits, about twenty minutes
	bin/test -m '' -k "trust or jobs or download or bad_input"

serve-proof:  ## `serve` in a browser (apt-get install chromium), under requests made from its OpenAPI document
	bin/install test,browser
	SCREENSHOTS=$(SCREENSHOTS) bin/test -m '' -rs -k "serve or browser"

fuzz:  ## a minute of coverage-guided noise for each parser that is ours
	bin/install test,fuzz
	for target in $$(.venv/bin/python tests/fuzz.py list); do \
	    .venv/bin/python tests/fuzz.py $$target -max_total_time=60 || exit 1; done

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

.PHONY: help install test test-all trust serve-proof fuzz lint bench tiny
