"""Finds and loads `libfastppo_native.so`, the C++ part that CMakeLists.txt builds."""

import ctypes
from functools import cache
from importlib.resources import files
from pathlib import Path

LIBRARY_NAME = "libfastppo_native.so"
ABI_VERSION = 10
_POINTER, _INT64, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def library_path() -> Path:
    """Path of the shared library.

    In an editable install the library lies in site-packages while this file lies in the source tree, so
    `Path(__file__).parent` does not find it; `importlib.resources` searches both.

    Raises:
        FileNotFoundError: the C++ part was not built, with the command that builds it.
    """
    path = Path(str(files("fastppo_kernels") / LIBRARY_NAME))
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: build it with `pip install --no-build-isolation --no-deps -e .`, "
            "or run without it by setting FASTPPO_BACKEND=reference"
        )
    return path


@cache
def load() -> ctypes.CDLL:
    """The library, loaded once per process.

    Raises:
        FileNotFoundError: it was not built.
        RuntimeError: it was built from other sources than this file.
    """
    library = ctypes.CDLL(str(library_path()))
    if (version := library.fastppo_abi_version()) != ABI_VERSION:
        raise RuntimeError(
            f"{library_path()} has ABI version {version}, this package needs {ABI_VERSION}: "
            "rebuild it with `pip install --no-build-isolation --no-deps -e .`"
        )
    library.fastppo_isa_name.restype = ctypes.c_char_p
    library.fastppo_ppo_rows.argtypes = [_POINTER] * 4
    library.fastppo_logprob_rows.argtypes = library.fastppo_logprob_rows_backward.argtypes = [_POINTER] * 3
    for op in (library.fastppo_ppo_rows, library.fastppo_logprob_rows, library.fastppo_logprob_rows_backward):
        op.restype = _INT64
    library.fastppo_ppo_tokens.argtypes = [_INT64, *[_POINTER] * 4, ctypes.c_int, _POINTER]
    library.fastppo_ppo_tokens.restype = None
    return library
