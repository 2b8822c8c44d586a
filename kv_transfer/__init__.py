"""The KV block store and the engine connector that fills and reads it."""
