"""Shares compact modules on the Hugging Face Hub, or in a folder: weights with a recipe, a config and a model card.

The functions are shaped like the methods of ``huggingface_hub.PyTorchModelHubMixin``. No pickle is involved. Folders
need no further package; repositories need ``huggingface_hub``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from plasticnet.errors import PlasticError, first_line
from plasticnet.files.card import LIBRARY, describe, model_card
from plasticnet.files.disk import read_bytes, replace_file
from plasticnet.files.modules import load, save

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # the files of a folder


def save_pretrained(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    factory: Callable[[], nn.Module] | None = None,
    example: Any = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    card: bool = True,
) -> None:
    """Write a compact module into a folder, as a repository of the Hub holds it.

    The folder then has ``model.safetensors`` (what `plasticnet.save` writes), ``config.json`` (sizes, and a checksum of
    the weights) and ``README.md``, the model card: how wide and how large the module is, and was before the cut, and
    the lines that load it. Of a card that is there already, only what lies between this library's two marks is
    replaced; without the marks it stays as it is.

    Args:
        module: A plain module, such as `PlasticNet.compact` returns.
        folder: The folder, which is made if it does not exist.
        factory: A function without arguments that builds the original architecture. It is called once, so that the
            sizes before the cut are known; if it can be imported, the card imports it.
        example: Example inputs, as `PlasticNet` takes them: the module runs on them once, and its multiply-adds are
            counted. They are not stored.
        license: The identifier of a licence for the card, such as ``"apache-2.0"``.
        tags: More tags for the card.
        card: Whether a model card is written.

    Raises:
        PlasticError: The module cannot be saved (see `plasticnet.save`), does not run on the example, or the factory
            does not build a module: nothing was written. Or the folder cannot be written.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> import plasticnet.hub as pn_hub
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(build(), (torch.randn(3, 4),))
        >>> net.resize({"0": [0, 1, 5]})  # keeps three of the eight units
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn_hub.save_pretrained(net.compact(), folder, factory=build)
        ...     again = pn_hub.from_pretrained(folder, build)
        >>> again[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    _write(module, Path(folder), str(Path(folder).name), factory, example, license, tags, card)


def push_to_hub(
    module: nn.Module,
    repo_id: str,
    *,
    factory: Callable[[], nn.Module] | None = None,
    example: Any = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    card: bool = True,
    commit_message: str = "Push a compact module with plasticnet",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Write a compact module into a repository of the Hub, in one commit.

    Args:
        module: A plain module, such as `PlasticNet.compact` returns.
        repo_id: The repository, such as ``"me/small"``. It is made if it does not exist.
        factory: What builds the original architecture, as in `save_pretrained`, and so are the next four arguments.
        example: Example inputs.
        license: The identifier of a licence.
        tags: More tags.
        card: Whether a model card is written. The card of the repository is replaced; leave it alone with False.
        commit_message: The message of the commit.
        private: Whether a repository that is made is private; by default as the organisation wants it.
        token: The token; by default the one of ``hf auth login``.
        revision: The branch to commit to; by default the main one.
        create_pr: Whether to open a pull request instead.

    Returns:
        The address of the commit.

    Raises:
        PlasticError: The module cannot be saved; ``huggingface_hub`` is missing; or the Hub refuses the upload or
            cannot be reached.

    Example:
        >>> import torch
        >>> import plasticnet.hub as pn_hub
        >>> small = torch.nn.Linear(3, 2)
        >>> url = pn_hub.push_to_hub(small, "me/small", private=True)  # doctest: +SKIP
    """
    hub = _hub("push_to_hub")
    with tempfile.TemporaryDirectory() as partial:
        _write(module, Path(partial), repo_id, factory, example, license, tags, card)
        try:
            api = hub.HfApi(token=token)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name, folder_path=partial, commit_message=commit_message, revision=revision, create_pr=create_pr
            )
        except Exception as error:  # of huggingface_hub and what it calls, which may raise anything
            raise PlasticError(f"{repo_id} cannot be pushed: {first_line(error)}") from error
    return str(getattr(commit, "commit_url", commit))


def from_pretrained(
    name: str | os.PathLike[str],
    factory: Callable[[], nn.Module],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> nn.Module:
    """Build the module in a folder, or in a repository of the Hub.

    Nothing that was downloaded is run. The weights must have the checksum in ``config.json``, and are checked as
    `plasticnet.load` does it.

    Args:
        name: A folder, if there is one of this name, or else a repository, such as ``"me/small"``.
        factory: A function without arguments that builds the original architecture.
        revision: The branch, tag or commit of the repository.
        token: The token; by default the one of ``hf auth login``.
        cache_dir: Where downloads are kept.
        force_download: Whether to download what is there already.
        local_files_only: Whether to take only what was downloaded before.

    Returns:
        The module, in evaluation mode.

    Raises:
        PlasticError: There is no such folder or repository, or it cannot be reached; ``huggingface_hub`` is missing;
            the files do not belong together, or are not from this library; or as `plasticnet.load` raises it.

    Example:
        >>> import tempfile, torch
        >>> import plasticnet.hub as pn_hub
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn_hub.save_pretrained(build(), folder)
        ...     model = pn_hub.from_pretrained(folder, build)
        >>> model.training
        False
    """
    folder = Path(name)
    if not folder.is_dir():
        hub = _hub("from_pretrained of a repository")
        try:
            folder = Path(
                hub.snapshot_download(
                    str(name), revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
                    local_files_only=local_files_only, allow_patterns=[WEIGHTS, CONFIG],
                )
            )  # fmt: skip
        except Exception as error:  # of huggingface_hub and what it calls, which may raise anything
            raise PlasticError(f"{name} is no folder, and cannot be downloaded: {first_line(error)}") from error
    try:
        config = json.loads(read_bytes(folder / CONFIG))
        digest = hashlib.sha256(read_bytes(folder / WEIGHTS)).hexdigest()
    except PlasticError as error:
        raise PlasticError(
            f"{name} does not hold a module of {LIBRARY} ({error}); save_pretrained writes one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlasticError(f"{name}: {CONFIG} is damaged") from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise PlasticError(f"{name}: {CONFIG} is not one that {LIBRARY} wrote")
    if config.get("sha256") != digest:
        raise PlasticError(f"{name}: {WEIGHTS} is damaged, or is not the one that {CONFIG} describes; write both anew")
    return load(folder / WEIGHTS, factory)


def _write(
    module: nn.Module,
    folder: Path,
    name: str,
    factory: Callable[[], nn.Module] | None,
    example: Any,
    license: str | None,
    tags: Sequence[str],
    card: bool,
) -> None:
    """Write the files of a module into a folder.

    Args:
        module: The module.
        folder: The folder.
        name: What the card calls the folder or repository.
        factory: As in `save_pretrained`, and so are the others.
        example: Example inputs.
        license: The identifier of a licence.
        tags: More tags.
        card: Whether a card is written.
    """
    with tempfile.TemporaryDirectory() as partial:
        save(module, Path(partial) / WEIGHTS)  # refuses what is no plain module
        weights = (Path(partial) / WEIGHTS).read_bytes()
    data = {**describe(module, factory, example), "sha256": hashlib.sha256(weights).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = read_bytes(folder / CARD).decode() if (folder / CARD).exists() else None
    except (OSError, ValueError) as error:
        raise PlasticError(f"{folder} cannot be written: {error}") from error
    replace_file(folder / WEIGHTS, weights)
    replace_file(folder / CONFIG, f"{json.dumps(data, indent=2, sort_keys=True)}\n".encode())
    if card:
        replace_file(folder / CARD, model_card(data, name, license, tags, old).encode())


def _hub(what: str) -> Any:
    """Return the package ``huggingface_hub``. Raises `PlasticError` where it is missing, and names what needs it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise PlasticError(f"{what} needs the package huggingface_hub: pip install 'plasticnet[hub]'") from error
    return huggingface_hub
