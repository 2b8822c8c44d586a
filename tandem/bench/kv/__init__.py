"""`tandem kv bench`: the KV block store against memcpy and other stores, in one interleaved run."""
