"""What tests/integration/test_daemon.py starts: ends by itself, should a test not end it."""

import time

if __name__ == "__main__":
    time.sleep(60.0)
