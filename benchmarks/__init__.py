"""Every figure on speed has a script here."""
