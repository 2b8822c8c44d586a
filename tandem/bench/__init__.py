"""The load test: an open-loop generator against any endpoint, `tandem bench`. Must not be imported by the platform."""
