"""The caller's API key: where clients take it from, and how it travels.

Must not put it into a message, a log line or a representation.
"""

import os
from collections.abc import Mapping

from tandem.errors import ConfigError

KEY_VARIABLE = "TANDEM_API_KEY"


def key_metadata(api_key: str | None = None, environ: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
    """gRPC metadata of the argument, else of TANDEM_API_KEY; none where neither is given. Raises ConfigError where it cannot travel."""
    environ = os.environ if environ is None else environ
    source = KEY_VARIABLE if api_key is None else "api_key"
    key = environ.get(KEY_VARIABLE, "") if api_key is None else api_key
    if not key:
        return ()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{source} must have printable ASCII characters only, and no space")
    return (("authorization", f"Bearer {key}"),)
