"""``python -m pyro_ebm``: the command ``pyro-ebm``."""

from pyro_ebm.cli import main

if __name__ == "__main__":
    main()
