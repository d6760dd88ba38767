"""The command line, one file per command: parse, one library call, print.

Results go to stdout, everything else to stderr. A user's mistake is one line and exit status 2.
"""

from vitrail.cli.app import main

__all__ = ["main"]
