"""The suite "growth": sostenuto bench --suite growth, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "growth", *sys.argv[1:]]))
