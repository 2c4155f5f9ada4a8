"""A server that says so, and never answers: it is up at once, since it imports next to nothing."""

import sys
import time

if __name__ == "__main__":
    print("serving", sys.argv[sys.argv.index("--model-path") + 1], flush=True)
    time.sleep(600)
