"""Let `python -m gpt2cli` run the command line."""

from gpt2cli.cli import main

main()
