"""``python -m fluxlib.cli``: the same command, wherever the package can be imported."""

from fluxlib.cli import main

if __name__ == "__main__":
    main()
