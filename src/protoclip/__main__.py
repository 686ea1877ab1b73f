"""`python -m protoclip` is `protoclip`."""

from protoclip.cli import main

main()
