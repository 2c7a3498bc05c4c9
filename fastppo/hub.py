"""Whether a checkpoint can be had at all, asked once: transformers would try for half a minute, then blame a file.

A name is a local folder, or a model on the Hugging Face hub that is in the local cache or can be fetched.
"""

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from fastppo.checks import InputError, require


def require_there(path: str) -> None:
    """
    Raises:
        ValueError: there is no such folder, the hub has no such model or keeps it private, or it cannot be reached.
    """
    if Path(path).is_dir():
        return
    is_hub_name = path.count("/") < 2 and not path.startswith((".", "/", "~"))
    require(is_hub_name, f"there is no folder {path!r}")
    try:
        if not isinstance(try_to_load_from_cache(path, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(path, "config.json"))
    except EntryNotFoundError:
        return  # the repository is there; what it lacks is said by what needs it
    except Exception as error:  # of the network: whatever its library raises
        raise InputError(f"cannot load {path!r}: it is not a local folder, and {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return "the Hugging Face hub has no such names"
    if isinstance(error, GatedRepoError):
        return "the Hugging Face hub gives it to those only who were granted access: ask on its page, `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hugging Face hub has no model of that name, or keeps it private: `hf auth login`"
    return f"{_failure(error)}: give a local folder, or a hub name that is in the cache"


def _failure(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    happened = "answers with an error" if isinstance(error, HfHubHTTPError) else "cannot be reached"
    return f"{constants.ENDPOINT} {happened} ({(str(error).splitlines() or [type(error).__name__])[0]})"
