"""``python -m lightning_atrous``."""

from lightning_atrous.cli import main

if __name__ == "__main__":
    main()
