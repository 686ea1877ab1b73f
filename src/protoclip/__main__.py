"""The command `protoclip`, which is `python -m protoclip` too.

The commands themselves are in `cli/`.
"""

import os
import signal
from contextlib import suppress


def main() -> None:
    """Run the command. Ctrl-C ends it in one line, during imports and at its very end too."""
    command = os.getpid()

    def interrupt(*_: object) -> None:
        if os.getpid() == command:  # and none of its workers
            with suppress(OSError):
                os.write(2, b"protoclip: interrupted\n")
        os._exit(128 + signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as after "&"
        signal.signal(signal.SIGINT, interrupt)
    from protoclip import cli

    cli.main()


if __name__ == "__main__":
    main()
