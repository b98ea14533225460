"""The suite "dit-xl": sostenuto bench --suite dit-xl, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "dit-xl", *sys.argv[1:]]))
