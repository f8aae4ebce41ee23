__version__ = "0.1.0"

from .lab.aliases import install

install()
