"""``python -m fluxlib.app.cli``: the same command, wherever the package can be imported."""

from fluxlib.app.cli import main

if __name__ == "__main__":
    main()
