"""What can go wrong with the Hugging Face hub, in words for the person who typed the model's name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from checkpoints.errors import InputError


class Unreachable(Exception):
    """No answer from the hub. The message says why, as part of a sentence; callers turn it into an InputError."""


@contextmanager
def one_line_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into InputError, and a hub that gives no answer into Unreachable."""
    import httpx2
    from huggingface_hub import constants, errors

    label = label_of(repo_id, revision)
    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        yield
    except errors.GatedRepoError as error:
        advice = f"Accept them at {page}, log in with `hf auth login`, and run again."
        raise InputError(f"{label}: its authors want their terms accepted first. {advice}") from error
    except errors.RevisionNotFoundError as error:
        advice = f"Give a branch, a tag or a commit of those at {page}/commits."
        raise InputError(f"{label}: the hub has no revision '{revision or 'main'}' of {repo_id}. {advice}") from error
    except errors.LocalEntryNotFoundError as error:  # the network went away while files were fetched
        raise Unreachable(_cannot_reach(error.__cause__ or error)) from error
    except errors.RemoteEntryNotFoundError as error:
        raise InputError(f"{label}: changed on the hub while it was read. Run the command again.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            advice = "Check the spelling; for a private model log in with `hf auth login`."
            where = "no such folder, and no such model on the hub, or a private one"
            raise InputError(f"{label}: {where}. {advice}") from error
        if status >= 500 or status in (408, 429):
            raise Unreachable(f"the hub answers with status {status}") from error
        # Not the error's own text: that may quote a signed address.
        reason = (error.server_message or error.response.reason_phrase).split("\n")[0].rstrip(".")
        advice = "If you have a token, check its permissions."
        raise InputError(f"{label}: the hub refuses with status {status}: {reason}. {advice}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError, TimeoutError, RuntimeError) as error:
        # hf_xet, which large files come through, raises RuntimeError.
        raise Unreachable(_cannot_reach(error)) from error
    except OSError as error:
        advice = "Set HF_HOME to a folder that you may write, with space in it."
        cache = constants.HF_HUB_CACHE
        raise InputError(f"{label}: cannot be stored in {cache}: {_first_line(error)}. {advice}") from error


def progress_bars(show: bool) -> AbstractContextManager[object]:
    """A context without huggingface_hub's progress bars unless `show`, or unless the environment decides about them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    return nullcontext() if show or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None else disable_progress_bars()


def label_of(repo_id: str, revision: str | None) -> str:
    """How messages name a model of the hub."""
    return repo_id if revision is None else f"{repo_id}@{revision}"


def few(names: Collection[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _cannot_reach(error: BaseException) -> str:
    return f"the hub cannot be reached ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return next((line.strip().rstrip(".:") for line in text.splitlines() if line.strip()), type(error).__name__)
