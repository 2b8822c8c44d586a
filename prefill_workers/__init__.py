"""Prefill workers: compute a prompt's KV, publish it, and give the first token."""
