help:  ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

install:  ## create .venv with gpt2cli and the packages that the tests need
	bin/install test

test:  ## run the tests; under five minutes on two cores
	bin/test

test-all:  ## run the slow tests too
	bin/test -m ''

TRUST = trust or paths or signals or faults or jobs or download or bad_input or closed or soak
trust:  ## run most tests of docs/promises.md in full (kills, full disks, flipped bits): an hour
	bin/test -m '' -k "$(TRUST)"

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

# From setup.py's ranges, choose one version of each package and list the checksums of its files.
# Leave out releases younger than a week: most malicious ones are found within days.
LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/uv pip compile --quiet --universal \
    --python-version 3.11 --generate-hashes --upgrade --exclude-newer "1 week" --extra serve setup.py

lock:  ## update the versions of the packages in the Docker images: requirements/
	bin/install supply
	$(LOCK) requirements/cpu.in --override requirements/cpu.in --output-file requirements/cpu.txt
	$(LOCK) --extra gpu --constraint requirements/cpu.txt --output-file requirements/gpu.txt
	$(LOCK) requirements/serve.in --override requirements/serve.in \
	    --constraint requirements/cpu.txt --output-file requirements/serve.txt

audit:  ## look for known vulnerabilities in the packages of the Docker images
	bin/install supply
	.venv/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes \
	    -r requirements/cpu.txt -r requirements/gpu.txt

PACKAGES = cpu

sbom:  ## list an image's packages and their licenses in build/; PACKAGES=gpu or serve for the others
	bin/install supply
	.venv/bin/uv venv --quiet --clear --python .venv/bin/python build/packages
	.venv/bin/uv pip install --quiet --python build/packages --only-binary :all: --require-hashes \
	    -r requirements/$(PACKAGES).txt
	.venv/bin/cyclonedx-py environment --output-reproducible build/packages \
	    --output-file build/sbom-$(PACKAGES).json
	.venv/bin/pip-licenses --python build/packages/bin/python --order license --format markdown \
	    | sed '/^|  /d' > build/licenses-$(PACKAGES).md
	@echo build/sbom-$(PACKAGES).json build/licenses-$(PACKAGES).md

bench:  ## measure speed and memory of a random 124M model beside other programs; ARGS="--rounds 1"
	bin/install
	.venv/bin/python benchmarks/run.py $(ARGS)

tiny:  ## train models/tiny again from scratch; about 15 minutes
	bin/install
	.venv/bin/python models/make_tiny.py

.PHONY: help install test test-all trust serve-proof fuzz lint lock audit sbom bench tiny
