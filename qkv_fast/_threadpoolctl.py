"""Our pool as threadpoolctl sees it. Importing this module registers it there, once.

threadpoolctl looks through the libraries that the process has loaded, for file names and symbols that a registered
controller names. Ours are those of the extension module itself.
"""

import os

import threadpoolctl

from . import _core, _runtime

if not hasattr(threadpoolctl, "register"):
    raise ImportError("qkv_fast.integrations.threadpoolctl needs threadpoolctl 3.2 or newer")


class QkvFastController(threadpoolctl.LibController):
    """The number of threads of the current context: what :func:`qkv_fast.num_threads` sets for its block."""

    user_api = "qkv_fast"
    internal_api = "qkv_fast"
    filename_prefixes = (os.path.basename(os.path.realpath(_core.__file__)).lower(),)
    check_symbols = ("qkv_fast_threadpool",)

    def get_num_threads(self) -> int:
        return _runtime.get_num_threads()

    def set_num_threads(self, num_threads: int) -> None:
        _runtime.limit_context(num_threads)

    def get_version(self) -> str:
        from ._version import __version__

        return __version__

    def set_additional_attributes(self) -> None:
        self.architecture = _runtime.isa()


threadpoolctl.register(QkvFastController)
