"""The suite "efficiency": sostenuto bench --suite efficiency, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "efficiency", *sys.argv[1:]]))
