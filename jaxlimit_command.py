"""The command `jaxlimit`, which Ctrl-C ends quietly from the first moment on.

It stands outside the package, whose import takes a second or two: the answer to Ctrl-C is there before.
"""

import os
import signal
import sys

INTERRUPTED = 130


def main() -> int:
    """Runs `jaxlimit.cli.main`, and returns its exit code; 130 if interrupted before that has begun."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else nobody is to be heard
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from jaxlimit import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
