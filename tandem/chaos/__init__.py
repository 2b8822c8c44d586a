"""`tandem chaos`: a load test that breaks parts of a platform of its own and checks every token. Must not touch any other platform."""
