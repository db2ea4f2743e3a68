"""The channel between a program and the test that judges it: messages of JSON, each with its length in front."""

from __future__ import annotations

import json
import os
from typing import Any

from .values import BadValue

MESSAGE_BYTES = 8 << 20
HEADER_BYTES = 4


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One end of a stream socket; messages are whole, at most MESSAGE_BYTES long, and read one at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._incoming = open(descriptor, "rb", closefd=False)  # noqa: SIM115

    def send(self, message: Any) -> None:
        """Raises: BadValue: too long. Closed: nobody reads."""
        text = json.dumps(message).encode("ascii")
        if len(text) > MESSAGE_BYTES:
            raise BadValue(f"expected at most {MESSAGE_BYTES} bytes, got {len(text)}")
        left = memoryview(len(text).to_bytes(HEADER_BYTES, "big") + text)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            raise Closed from error

    def receive(self) -> Any:
        """Raises: BadValue: too long, or no JSON. Closed: nobody writes."""
        try:
            header = self._incoming.read(HEADER_BYTES)
            length = int.from_bytes(header, "big")
            if length > MESSAGE_BYTES:
                raise BadValue(f"expected at most {MESSAGE_BYTES} bytes, got {length}")
            text = self._incoming.read(length)
        except OSError as error:
            raise Closed from error
        if len(header) < HEADER_BYTES or len(text) < length:
            raise Closed
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadValue("expected JSON") from error
