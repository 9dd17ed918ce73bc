"""A model's weights on disk, whatever the file format: their names, and a handle on each.

Nothing is read before it is needed, and pickled files are never opened.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numoe.quant.documents import refuse_lfs_pointer
from numoe.quant.errors import InputError
from numoe.quant.files import Files, TensorInfo
from numoe.quant.stored import safetensors, shards
from numoe.quant.stored.conventions.native import LAYOUT
from numoe.quant.stored.conventions.registry import PLAIN, Conventions
from numoe.quant.stored.conventions.spelling import Convention
from numoe.quant.stored.gguf_sets import HEADER, gguf_sets
from numoe.quant.stored.handle import Stored
from numoe.quant.stored.manifest import read_manifest

GGUF = b"GGUF"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Checkpoint:
    """The weights of a folder or file. Made by `open_checkpoint`, or from a mere listing to plan without data.

    `tensors` maps stored names, scales included. `metadata` holds safetensors' `__metadata__` or GGUF's key-value
    pairs. A context manager: leaving it closes the files. Reading is safe from several threads.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, Any],
        convention: Convention = PLAIN,
        files: Files | None = None,
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self.files = files or Files()
        self._conventions = Conventions(tensors, self.files, convention, LAYOUT.items() <= metadata.items())
        self._found: dict[str, Stored] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self.files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._conventions

    def __getitem__(self, name: str) -> Stored:
        """The weight by a name. Raises InputError where there is none, or its codes and scales do not fit."""
        stored = self._found.get(name)  # a listing of a large model is gone through many times
        if stored is None:
            stored = self._conventions.find(name)
            if stored is None:
                raise InputError(
                    f"{self.path} has no tensor {name!r}; check that the download is whole and fits the config"
                )
            self._found[name] = stored
        return stored

    def names(self) -> Iterator[str]:
        """The names of the weights, in stored order; scales belong to their weight and are not listed."""
        return self._conventions.names()


def open_checkpoint(path: str | Path, convention: Convention = PLAIN, files: Files | None = None) -> Checkpoint:
    """Opens a folder of safetensors files (with or without an index), a .safetensors file or a .gguf file.

    `convention` is what a config says of quantized weights, `files` reads them. Reads headers only.
    Raises InputError when there is nothing readable there or a header is damaged.
    """
    path = Path(path)
    files = files or Files()
    if path.is_dir():
        read_manifest(path)  # refuses a later format
        tensors, metadata = shards.read_folder(path)
        if not tensors:
            raise _nothing_in(path)
        for shard, shared in groupby(tensors.values(), attrgetter("path")):
            files.begun(shard, min(info.offset for info in shared))
        return Checkpoint(path, tensors, metadata, convention, files)
    beginning = _beginning(path)
    refuse_lfs_pointer(beginning, path)
    if path.suffix == ".gguf" or beginning.startswith(GGUF):
        from numoe.quant.stored import gguf  # imports gguf, which safetensors users need not wait for

        return Checkpoint(path, *gguf.read_gguf(path, files), convention, files)
    if path.suffix == ".safetensors":
        return Checkpoint(path, *safetensors.read_header(path), convention, files)
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: get the model's .safetensors files")
    raise InputError(f"{path} is not a folder, a .safetensors file or a GGUF file; check the path")


def distant_gguf(path: Path, files: Files, size: Callable[[Path], int]) -> Checkpoint:
    """A listing of the GGUF file `path`, or of all parts of which it is the first, that are elsewhere.

    `files` reads them, of which no more is asked for than headers; `size` gives their bytes. What these raise is passed
    on. Raises InputError when a header is damaged.
    """
    from numoe.quant.stored import gguf

    def header(part: Path) -> gguf.Header:
        return gguf.distant_header(
            lambda start, stop: files.read_range(part, start, stop - start).tobytes(), part, size(part)
        )

    return Checkpoint(path, *gguf.with_shards(path, header), files=files)


def gguf_header(checkpoint: Checkpoint) -> bytes:
    """What a folder that is made of a GGUF file has as `HEADER`: the metadata, and the listing of the tensors."""
    from numoe.quant.stored import gguf

    assert isinstance(checkpoint.metadata, gguf.GgufMetadata)
    return gguf.header_of(checkpoint.tensors, checkpoint.metadata)


def gguf_listing(folder: Path, files: Files) -> tuple[Mapping[str, TensorInfo], Mapping[str, Any]] | None:
    """The tensors and the metadata of the GGUF file of which a folder was made; None for one of a model's own files.

    Raises InputError when that is damaged.
    """
    if (folder / "config.json").exists() or not (folder / HEADER).exists():
        return None
    from numoe.quant.stored import gguf

    return gguf.read_listing(folder / HEADER, files)


def is_gguf(path: Path) -> bool:
    """Whether a file is one in GGUF, by its first bytes: Ollama and others keep such files under other names."""
    return _beginning(path).startswith(GGUF)


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no safetensors, the first one of a split model; None where there is none.

    Raises InputError when there are several models, or the folder cannot be read.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    if any(name.endswith(".safetensors") for name in names):
        return None
    found = [folder / one.files[0] for one in gguf_sets(names)]
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} models in GGUF: give the path of one, such as {found[0]}")
    return found[0] if found else None


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; none of what cannot be read, of which its reader has more to say."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            return file.read(64)
    except OSError:
        return b""


def _nothing_in(folder: Path) -> InputError:
    found = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in found if name.endswith(PICKLES)]
    ggufs = [name for name in found if name.endswith(".gguf")]
    if ggufs:
        return InputError(f"{folder} holds GGUF files: give the path of one of them, such as {folder / ggufs[0]}")
    if pickles:
        return InputError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened: "
            "get the model's .safetensors files"
        )
    return InputError(f"{folder} holds no .safetensors files; check that the download is whole")
