"""GGUF files on the hub: which one is meant, and their headers, read in ranges."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from numoe.engine.hub import network
from numoe.engine.hub.distant import Distant
from numoe.engine.hub.repository import Repository
from numoe.quant.errors import InputError
from numoe.quant.files import plain_names
from numoe.quant.stored.checkpoint import Checkpoint, distant_gguf
from numoe.quant.stored.gguf_sets import GgufSet, gguf_set, gguf_sets


def chosen(repository: Repository, wanted: str) -> GgufSet | None:
    """The model in GGUF that a text means, see `gguf_set`; None for the one in safetensors, which "" means first.

    Raises:
        InputError: it means several, or none that is there; or a part is missing.
    """
    if repository.in_safetensors and not wanted:
        return None
    if not repository.ggufs:
        raise InputError(
            f"{repository.repo_id} has no GGUF files, and what the colon names would be one of them; "
            f"`numoe pull {repository.repo_id}` gets the model"
        )
    found = gguf_set(repository.ggufs, wanted, repository.repo_id)
    plain_names([PurePosixPath(name).name for name in found.files], repository.repo_id)
    return found


def size_of(repository: Repository, model: GgufSet) -> int:
    """Bytes of a model's files."""
    return sum(repository.files[name].size for name in model.files)


def cached_gguf(repo_id: str, wanted: str) -> Path | None:
    """The first file of a model in GGUF of a repository, if the Hugging Face cache has all of them.

    wanted: see `gguf_set`.
    """
    storage = Path(network.library().constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    branch = storage / "refs" / "main"
    if not branch.is_file():
        return None
    snapshot = storage / "snapshots" / branch.read_text().strip()
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.exists()]
    try:
        found = gguf_set(gguf_sets(names), wanted, repo_id)
    except InputError:  # what it is lies elsewhere, or on the hub
        return None
    return snapshot / found.files[0]


def distant_checkpoint(repository: Repository, model: GgufSet) -> Checkpoint:
    """The listing of a model's tensors, and its metadata, from the headers of its files.

    Raises:
        InputError: a header is damaged, or cannot be had.
    """
    folder = Path(repository.repo_id)

    def size(path: Path) -> int:
        return repository.files[path.relative_to(folder).as_posix()].size

    return distant_gguf(folder / model.files[0], Distant(repository), size)
