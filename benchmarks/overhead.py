"""The suite "overhead": sostenuto bench --suite overhead, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "overhead", *sys.argv[1:]]))
