"""The headers of safetensors files on the Hugging Face hub, read by range requests: kilobytes of many gigabytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.errors import InputError
from checkpoints.hub import Listing, choose_weights, list_files
from checkpoints.hub_errors import Unreachable, label_of, one_line_errors, progress_bars

FIRST_RANGE_BYTES = 100_000  # holds the whole header of nearly every file, so that one request is enough
REQUEST_RETRIES = 2
PARALLEL_REQUESTS = 8


class RemoteHeader(NamedTuple):
    """The header of a safetensors file on the hub."""

    header_bytes: int
    """Length of the JSON text. It starts after the file's first 8 bytes, and the tensors right after it."""
    header: dict[str, Any]
    file_bytes: int
    tensors: Mapping[str, Any]
    """The header once more, checked, as `safetensors_format.StoredTensor`s."""


def read_remote_headers(repo_id: str, revision: str | None) -> dict[str, RemoteHeader]:
    """Read the headers of the safetensors files that a download would fetch; see `location.remote_headers`."""
    from huggingface_hub import constants, hf_hub_download

    label = label_of(repo_id, revision)

    def download_index(name: str) -> bytes:
        return Path(hf_hub_download(repo_id, name, revision=listing.commit)).read_bytes()

    try:
        if constants.is_offline_mode():
            raise Unreachable("HF_HUB_OFFLINE=1 forbids to ask the hub")
        with one_line_errors(repo_id, revision), progress_bars(False):
            listing = list_files(repo_id, revision)
            names = choose_weights(listing.sizes, download_index, label)
            if not all(name.endswith(".safetensors") for name in names):
                return {}
            with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
                return dict(zip(names, pool.map(partial(_read_header, repo_id, listing, label), names), strict=True))
    except Unreachable as error:
        raise InputError(f"{label}: {error}. Run again where there is a network, or give a folder.") from error


def _read_header(repo_id: str, listing: Listing, label: str, name: str) -> RemoteHeader:
    from huggingface_hub import hf_hub_url

    from checkpoints.safetensors_format import LENGTH_BYTES, MAX_HEADER_BYTES, parse_header

    where, size = f"{label}: {name}", listing.sizes[name]
    url = hf_hub_url(repo_id, name, revision=listing.commit)
    first = _read_range(url, 0, min(size, FIRST_RANGE_BYTES)) if size else b""
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise InputError(
            f"{where}: expected a safetensors header, got a file of {size} bytes whose header claims {length}. "
            "The file on the hub is damaged; tell the model's author."
        )
    end = LENGTH_BYTES + length
    raw = first[LENGTH_BYTES:end] + (_read_range(url, len(first), end) if len(first) < end else b"")
    tensors = parse_header(raw, size, where)
    return RemoteHeader(length, json.loads(raw), size, tensors)


def _read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file on the hub; reads no further even where the server sends the whole file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
    content = bytearray()
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout_s, max_retries=REQUEST_RETRIES) as response:
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= skip + stop - start:
                break
    return bytes(content[skip : skip + stop - start])
