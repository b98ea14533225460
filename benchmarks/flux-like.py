"""The suite "flux-like": sostenuto bench --suite flux-like, with whatever options are given here too."""

import sys

from sostenuto.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--suite", "flux-like", *sys.argv[1:]]))
