"""`python -m petiole` is the `petiole` command."""

from .cli import main

# the workers of a data loader or launcher import this file again under another name
if __name__ == "__main__":
    main()
