"""Inference engines behind one protocol. The only place that imports vLLM besides the KV connector."""
