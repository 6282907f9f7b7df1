"""Packaging of gpt2cli."""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = [
    "starlette>=0.49.1,<2",  # routes, responses, streams; older ones let Range cost much time
    # The HTTP server. connections.py overrides private methods, so only versions that were tried:
    # 0.34 and 0.54. With 0.30, a stream continues after its client has disconnected.
    "uvicorn>=0.34,<0.55",
    "h11>=0.16",  # HTTP/1.1; older ones let one request be smuggled in another
    "pydantic>=2.8,<3",  # checks requests and writes their JSON schema; tried: 2.8 and 2.14
    "jinja2>=3.1.6",  # the page, with everything escaped
    "prometheus-client>=0.20",  # /metrics
]

DATA = [
    "pyarrow>=15",  # .parquet files, a part at a time
    "zstandard>=0.22",  # .zst files
]

setup(
    name="gpt2cli",
    version="0.1.0",
    description="GPT-2 on the command line: download, encode, train, sample, interactive",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["gpt2cli", "gpt2cli.*"]),
    package_data={
        "gpt2cli": ["py.typed", "*.pyi"],  # types of the Python functions, for editors
        "gpt2cli.inference.engines": ["programs/*"],  # graphs of the known sizes, converted
        "gpt2cli.serving": ["web/*.html", "web/static/*"],  # the page of `serve`
    },
    python_requires=">=3.10,<3.14",  # the Pythons that TensorFlow has wheels for
    install_requires=[
        "tensorflow>=2.18,<2.22",  # the graph; the suite was run on both ends
        # Generation on a CPU, without importing TensorFlow; pinned, the programs that are shipped
        # were tried with it.
        "ai-edge-litert>=2.3,<2.4",
        "keras>=3.5,<3.16",  # the optimizers; pinned, private attributes of theirs are used
        "flatbuffers>=24.3",  # the converted graphs; TensorFlow's too
        "numpy>=1.26",  # arrays of ids, random numbers of samples
        "google-crc32c>=1.5",  # the checksums in a checkpoint, with the processor's instruction
        "ml-dtypes>=0.4",  # weights in bfloat16; TensorFlow's too
        "regex>=2023.12",  # where a long text may be cut before it is encoded
        "fire>=0.7,<0.8",  # command lines; pinned, its parsing hook is called experimental
        "tqdm>=4.66.3",  # progress bars
        # download; older ones can send a password from .netrc to another host (CVE-2024-47081)
        "requests>=2.32.4",
        # download (read1), and requests; older ones can unpack a small answer to gigabytes
        # (CVE-2026-21441)
        "urllib3>=2.6.3",
        "huggingface-hub>=0.26",  # download hf:OWNER/NAME: the token; tokenizers' too
        "safetensors>=0.4.3",  # convert: Hugging Face's weights
        "tiktoken>=0.9",  # byte-pair encoding, four times faster than any other
        "tokenizers>=0.20",  # BERT WordPiece; trains the vocabulary of models/tiny
    ],
    extras_require={
        "serve": SERVE,
        "data": DATA,
        "torch": ["torch>=2.6"],  # convert: weights in a .bin of PyTorch's
        # tokenizers in a spiece.model, like rinna's; a bad file crashes older ones (CVE-2026-1260)
        "sentencepiece": ["sentencepiece>=0.2.1"],
        "gpu": ["tensorflow[and-cuda]>=2.18,<2.22"],  # with CUDA's libraries from PyPI
        "test": [
            *SERVE,
            *DATA,
            "sentencepiece>=0.2.1",  # the tests train small models with it
            "openai>=1.50",  # `serve`, as its users' programs talk to it
            "httpx>=0.27",  # `serve`, as nobody should talk to it
            "pytest>=8",
            "pytest-xdist>=3.5",  # two tests at a time
            "hypothesis>=6.100",  # texts nobody would think of
            "pexpect>=4.9",  # `interactive` on a terminal
            "ruff>=0.6,<0.18",  # a newer one may format differently
            "mypy>=1.11,<3",  # types
        ],
        # make serve-proof: the page in a browser, requests made from the OpenAPI document
        "browser": ["playwright>=1.45", "schemathesis>=4,<5"],
        # make lock, audit, sbom: versions and checksums, known vulnerabilities, licenses
        "supply": ["uv>=0.9", "pip-audit>=2.9", "cyclonedx-bom>=7", "pip-licenses>=5"],
        "fuzz": ["atheris>=2.3"],  # make fuzz: noise that looks for new paths through the parsers
    },
    entry_points={"console_scripts": ["gpt2cli=gpt2cli.cli:main"]},
)
