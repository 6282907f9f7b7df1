"""The jobs of run.py: a module each, with `run(session)`."""
