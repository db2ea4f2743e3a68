"""Generators of text for the real model's experts: three domains that any machine can make, the same on every machine.

from examples.real.domains import DOMAINS, make_documents
make_documents("sql", "test", 3)      # three Documents, no content of which is in another split
"""

from examples.real.domains.documents import Document, Split, make_documents
from examples.real.domains.registry import DOMAINS

__all__ = ["DOMAINS", "Document", "Split", "make_documents"]
