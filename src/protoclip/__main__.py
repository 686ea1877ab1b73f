"""`python -m protoclip` is `protoclip`.

The commands themselves are in `cli/`.
"""

from protoclip.cli import main

main()
