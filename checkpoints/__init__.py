"""What a model is on disk: the only package that opens or writes weight files."""

VERSION = "0.1.0"
