"""The suite "demo-quality": sostenuto bench --suite demo-quality, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "demo-quality", *sys.argv[1:]]))
