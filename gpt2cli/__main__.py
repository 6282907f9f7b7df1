"""python -m gpt2cli"""

from gpt2cli.cli import main

main()
