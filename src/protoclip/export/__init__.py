"""Models as folders that other libraries load.

The package bears the name of the function `protoclip.export`, so it can be called as that.
"""

import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """See `protoclip.export.run.export`."""
        from protoclip.export.run import export

        return export(*arguments, **settings)


sys.modules[__name__].__class__ = CallablePackage
