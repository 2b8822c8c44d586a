"""Finds the parts of Tandem that are written in C: compiled where it was set up, done without where not."""

import ctypes
import importlib.util


def try_load(module: str, abi_name: str, abi: int, kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL | None:
    """The library of extension `module`; None where it was not compiled, cannot be loaded here, or its `abi_name()` says another version.

    `kind` is ctypes.CDLL, which lets other threads run meanwhile, or ctypes.PyDLL, which does not.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None or not found.origin.endswith(".so"):
        return None
    try:
        library = kind(found.origin)
    except OSError:
        return None
    return library if library[abi_name]() == abi else None
