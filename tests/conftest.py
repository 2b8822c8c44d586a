"""What all tests share. pytest-randomly prints the seed of each run."""

from hypothesis import settings

# How long an example takes says nothing on a shared machine.
settings.register_profile("tandem", deadline=None)
settings.load_profile("tandem")
