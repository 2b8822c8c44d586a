"""The router: takes requests, decides where each one runs, relays its tokens."""
