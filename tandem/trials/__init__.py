"""Live trials of the router on a cluster of their own: `python -m tandem.trials --json PATH`."""
