"""Decode workers: drive the hand-off and stream the tokens."""
