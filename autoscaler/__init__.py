"""The autoscaler: how many replicas each pool should have, decided from what is seen."""
