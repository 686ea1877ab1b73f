"""`python -m protoclip` is `protoclip`."""

import os
import signal

from protoclip import signals


def main() -> None:
    """Run the command. Ctrl-C ends it in one line, during imports and at its very end too."""
    os.environ["MPLBACKEND"] = "agg"  # figures are files; an unknown name would end its import
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as after "&"
        signal.signal(signal.SIGINT, lambda *_: signals.end_process(signal.SIGINT))
    from protoclip import cli

    cli.main()


if __name__ == "__main__":
    main()
