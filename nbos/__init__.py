"""The front door of NBOS: the `nbos` command."""

__version__ = "0.1.0"
