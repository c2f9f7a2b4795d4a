"""Commits and files on the Hugging Face hub; every error is one line that says what to do.

HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and a stored token mean what they mean to the hub's own client.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from negcore.errors import NegError, one_line

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]

_ANSWER_S = 10
_TRIES = 5
_LONGEST_WAIT_S = 60
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(NegError):
    """A repository, revision or file cannot be had from the hub, nor from its cache."""


class Commit(NamedTuple):
    """State of a repository: all files of a model or dataset are taken from the same one."""

    id: str
    """Hash of the commit."""
    problem: str | None
    """Reason why the hub could not be asked, so that only files in its cache can be had; None if it answered."""


def commit_of(name: str, revision: str | None = None, *, kind: Kind = "model") -> Commit:
    """Return the commit that a revision stands for now, or stood for when the hub was last reached.

    A branch such as `main` moves; results are recorded under the commit.

    Parameters
    ----------
    name : str
        `organisation/name` of the repository.
    revision : str, optional
        Branch, tag or commit; by default the main branch.

    Raises
    ------
    HubError
        If there is no such repository or revision, it may not be read, or the hub cannot be reached and its cache
        does not know the revision.
    """
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import RevisionResolutionError

    with _in_one_line(name, revision, kind):
        problem = _ask(name, revision, kind)
        try:
            resolved = resolve_revision(name, repo_type=kind, revision=revision, local_files_only=problem is not None)
        except RevisionResolutionError as error:
            raise _unreachable(name, kind, problem) from error
    commit = Commit(str(resolved.resolved), problem)
    if problem is not None:
        logger.warning("%s; %s %s is taken from the cache, commit %s", problem, kind, name, commit.id)
    return commit


def file_of(name: str, path: str, commit: Commit, *, kind: Kind) -> Path | None:
    """Download one file of a repository, once; return None if the commit has no such file.

    Raises
    ------
    HubError
        If it cannot be had for another reason.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _in_one_line(name, commit.id, kind):
        try:
            cached = commit.problem is not None
            return Path(hf_hub_download(name, path, repo_type=kind, revision=commit.id, local_files_only=cached))
        except LocalEntryNotFoundError as error:
            problem = commit.problem or _no_answer(download_problem(error))
            raise _unreachable(name, kind, problem, f"{path!r} of ") from error
        except EntryNotFoundError:
            return None


def upload_folder(folder: Path, name: str, *, kind: Kind = "dataset") -> str:
    """Upload a folder to a repository, which is made as a private one if there is none; return the page to see it on.

    Hidden files stay here. Files that are there already are not sent again, so that an upload that ended goes on.

    Parameters
    ----------
    name : str
        `organisation/name` of the repository.

    Raises
    ------
    HubError
        If the hub cannot be reached, or does not let this user write there.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{kind} {name!r} cannot be uploaded: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise HubError(f"{kind} {name!r} cannot be uploaded without a token: {_LOGIN}")
    with _in_one_line(name, None, kind):
        try:
            api = HfApi()
            api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
            message, hidden = "Publish with neg-at-scale", [".*", "*/.*"]
            api.upload_folder(
                repo_id=name, repo_type=kind, folder_path=folder, commit_message=message, ignore_patterns=hidden
            )
        except Exception as error:
            if _status(error) != 403:
                raise
            refusal = f"{constants.ENDPOINT} does not let your token write to {kind} {name!r}"
            raise HubError(f"{refusal}: name another, or {_LOGIN} with one that may") from error
    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"


def files_of(name: str, commit: Commit, *, kind: Kind) -> list[str]:
    """Return the paths of a repository's files; none if the hub cannot be asked.

    Raises
    ------
    HubError
        If they cannot be had for another reason.
    """
    from huggingface_hub import HfApi

    if commit.problem is not None:
        return []
    with _in_one_line(name, commit.id, kind):
        return sorted(HfApi().list_repo_files(name, repo_type=kind, revision=commit.id))


def download_problem(error: BaseException) -> str:
    """Return the reason behind an exception of a library that loads from the hub: that of the first in its chain."""
    from huggingface_hub import constants

    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    offline = "; HF_HUB_OFFLINE is set, so that only its cache was asked" if constants.HF_HUB_OFFLINE else ""
    return f"{one_line(error):.200}{offline}"


def _ask(name: str, revision: str | None, kind: Kind) -> str | None:
    """Return the reason why the hub cannot be reached, or None if it answers.

    The client's own resolving of a revision neither waits for a busy hub nor gives up on a silent one.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    for number in range(1, _TRIES + 1):
        try:
            HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_ANSWER_S)
        except Exception as error:  # the client's own, its HTTP library's, the operating system's
            status = _status(error)
            if status is not None and (status == 429 or status >= 500) and number < _TRIES:
                time.sleep(_wait_s(error))
                continue
            if status is not None and status < 500 or isinstance(error, ValueError) or _is_of_cache(error):
                raise
            return _no_answer(one_line(error))
        return None
    return None


def _wait_s(error: Any) -> float:
    """Return how long a busy hub asks to wait; one that fails says nothing, and is asked again soon."""
    asked = error.response.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdigit() else 5 if _status(error) == 429 else 1, _LONGEST_WAIT_S)


def _is_of_cache(error: BaseException) -> bool:
    """Tell whether an exception is about a file on this machine."""
    return isinstance(error, OSError) and error.filename is not None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _in_one_line(name: str, revision: str | None, kind: Kind) -> Iterator[None]:
    """Turn whatever the hub's client raises into a `HubError`."""
    from huggingface_hub import constants, errors

    place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(f"{kind} {name!r} is gated: ask for access at {place} and {_LOGIN}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{kind} {name!r} has no revision {revision!r}; its revisions are listed at {place}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"there is no {kind} {name!r} at {constants.ENDPOINT}; if it is private, {_LOGIN}") from error
    except Exception as error:
        if _status(error) == 429:
            busy = f"{constants.ENDPOINT} refuses {kind} {name!r}: too many requests"
            raise HubError(f"{busy}; wait some minutes, or {_LOGIN}") from error
        if _status(error) == 401:
            raise HubError(f"{constants.ENDPOINT} does not know your token: {_LOGIN}, or do without") from error
        if _is_of_cache(error):
            cache = f"the cache {constants.HF_HUB_CACHE} cannot be used ({one_line(error):.200})"
            raise HubError(f"{kind} {name!r}: {cache}; mend that, or set HF_HOME") from error
        raise HubError(f"{kind} {name!r} could not be had from {constants.ENDPOINT}: {one_line(error):.200}") from error


def _unreachable(name: str, kind: Kind, problem: str | None, part: str = "") -> HubError:
    from huggingface_hub import constants

    cache = f"{part}{kind} {name!r} is not in the cache {constants.HF_HUB_CACHE}"
    return HubError(f"{problem}, and {cache}; mend that, or fetch it elsewhere and set HF_HOME")


def _no_answer(reason: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT} cannot be reached ({reason.partition(' for url ')[0]:.120})"
