"""The simulator: the live router's core in simulated time, against a stated model of engines, caches and network."""
