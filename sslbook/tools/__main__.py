"""`python -m sslbook.tools NAME`."""

from sslbook.cli.common import run
from sslbook.tools import main

run(main)
