"""`python -m vdusefast`: the command line."""

from vdusefast.cli.app import main

if __name__ == "__main__":
    main()
