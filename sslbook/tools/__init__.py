"""Small programs around a run; each is `python -m sslbook.tools.NAME --help`."""
