help:  ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

install:  ## create .venv with gpt2cli and the packages that the tests need
	bin/install test

test:  ## run the tests; under five minutes on two cores
	bin/test

test-all:  ## run the slow tests too
	bin/test -m ''

trust:  ## run the full-length tests of docs/promises.md: kills, full disks, flipped bits; 20 minutes
	bin/test -m '' -k "trust or jobs or download or bad_input"

serve-proof:  ## test the server in a browser (apt-get install chromium) and with generated requests
	bin/install test,browser
	SCREENSHOTS=$(SCREENSHOTS) bin/test -m '' -rs -k "serve or browser"

fuzz:  ## fuzz each of our parsers for a minute
	bin/install test,fuzz
	for target in $$(.venv/bin/python tests/fuzz.py list); do \
	    .venv/bin/python tests/fuzz.py $$target -max_total_time=60 || exit 1; done

lint:  ## check the code with ruff
	bin/install test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench:  ## measure speed and memory of a random 124M model beside other programs; ARGS="--rounds 1"
	bin/install
	.venv/bin/python benchmarks/run.py $(ARGS)

tiny:  ## train models/tiny again from scratch; about 15 minutes
	bin/install
	.venv/bin/python models/make_tiny.py

.PHONY: help install test test-all trust serve-proof fuzz lint bench tiny
