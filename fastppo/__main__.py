"""`python -m fastppo` is the `fastppo` command."""

from fastppo.cli import main

if __name__ == "__main__":
    main()
