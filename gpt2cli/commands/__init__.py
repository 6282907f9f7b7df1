"""One module a subcommand: its options on top, then its story `run(options)`.

At its top a command imports only what its options need, so that --help and a wrong flag wait for
nothing; `run` imports the rest.

May import: formats, jobs, remote, serving, training.
"""
