"""The demonstration: `make demo`. Its callers and prompts serve tests too."""

from tandem.demo.calls import DirectCaller, Prompts, Run, interleave, run_through_sdk

__all__ = ["DirectCaller", "Prompts", "Run", "interleave", "run_through_sdk"]
