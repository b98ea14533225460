"""The suite "partial": sostenuto bench --suite partial, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "partial", *sys.argv[1:]]))
