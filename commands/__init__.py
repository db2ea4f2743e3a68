"""The four commands: flags to values, values to the packages, and back to the terminal. Nothing imports this but them."""

from checkpoints import early  # noqa: F401 - an installed command imports nothing before this
