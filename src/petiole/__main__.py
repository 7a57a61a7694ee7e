"""`python -m petiole` is the `petiole` command."""

from .cli import main

main()
