"""The commands ``push`` and ``pull``: checkpoints to and from a remote.

Everything but typer is imported inside the commands.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sllm_vllm.store.transfer import OnProgress, Transferred

Url = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        help="file:///dir/NAME, http(s)://host/path/NAME, s3://bucket/prefix/NAME or hf://org/name[@revision][/NAME].",
    ),
]
StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store-dir", help="Directory of the checkpoints. Default: SLLM_STORE_DIR, else in the user's cache."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_transfer_commands(app: typer.Typer) -> None:
    """Give the command line ``push`` and ``pull``."""
    app.command()(push)
    app.command()(pull)


def push(
    checkpoint: Annotated[str, typer.Argument(help="Directory of a checkpoint, or its name in the store.")],
    url: Url,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a different checkpoint at URL.")] = False,
    store_dir: StoreDir = None,
    as_json: Json = False,
) -> None:
    """Copy CHECKPOINT to URL. Every byte is verified; the last part of URL becomes the checkpoint's name."""
    from sllm_vllm.checkpoint.reader import open_checkpoint
    from sllm_vllm.store.transfer import push_checkpoint

    directory = Path(checkpoint).expanduser()
    if not directory.is_dir() and directory.name == checkpoint:
        directory = _store_root(store_dir) / checkpoint
    opened = open_checkpoint(directory.absolute())
    done = _watched("pushing", lambda told: push_checkpoint(opened, url, overwrite=overwrite, on_progress=told))
    _say(done, "pushed", as_json=as_json)


def pull(
    url: Url,
    store_dir: StoreDir = None,
    redirect_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Other host that URL may redirect to; *.example.com for all its subdomains. Repeatable.",
        ),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Copy the checkpoint at URL into the store. An interrupted copy resumes where it stopped."""
    from sllm_vllm.config import StoreConfig
    from sllm_vllm.store.transfer import pull_checkpoint

    def transfer(told: OnProgress) -> Coroutine[Any, Any, Transferred]:
        root = _store_root(store_dir)
        limits = StoreConfig(store_dir=root, redirect_hosts=tuple(redirect_host or ()))
        return pull_checkpoint(url, root, limits=limits, on_progress=told)

    done = _watched("pulling", transfer)
    _say(done, "pulled", as_json=as_json)


def _watched(title: str, transfer: Callable[[OnProgress], Coroutine[Any, Any, Transferred]]) -> Transferred:
    """Run a transfer with a bar."""
    import asyncio

    from sllm_vllm.cli.output import progress_bar

    with progress_bar() as progress:
        bar = progress.add_task(title, total=None)
        return asyncio.run(transfer(lambda done, total: progress.update(bar, completed=done, total=total)))


def _say(done: Transferred, verb: str, *, as_json: bool) -> None:
    from sllm_vllm.cli.output import print_done
    from sllm_vllm.units import format_nbytes

    told = "already there" if done.was_there else verb
    record = {"done": told, "place": done.place, "nbytes": done.nbytes}
    print_done(record, f"{told}: {done.place} ({format_nbytes(done.nbytes)})", as_json=as_json)


def _store_root(store_dir: Path | None) -> Path:
    from sllm_vllm.config import default_store_dir

    return (store_dir or default_store_dir()).expanduser().absolute()
