"""The command line. Each command has a file: it parses, makes one call of the library, and prints.

Results go to stdout, everything else to stderr. A person's mistake is one line and exit status 2.
"""

from vitrail.cli.app import main

__all__ = ["main"]
