"""The suite "peers": sostenuto bench --suite peers, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "peers", *sys.argv[1:]]))
