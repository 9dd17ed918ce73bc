"""What a model's files hold, to the byte, and what they say of the license; GGUF files that are read to their end."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from gguf_files import write_gguf

from numoe.engine import InputError, describe
from numoe.engine.disk import disk, license_of
from numoe.engine.home import locate
from numoe.engine.verify import verify_file

Checkpoints = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gguf(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    return write_gguf(checkpoint("llama_a"), tiny.load_golden("llama_a").config, tmp_path / "model.gguf", "llama")


def test_every_byte_has_a_name(gguf: Path) -> None:
    for path in (locate("tiny"), gguf):
        files = [path] if path.is_file() else list(path.iterdir())
        found = disk(describe(path))
        assert found.total == sum(file.stat().st_size for file in files)
        assert min(found.weights, found.headers) > 0 and found.others == (path.is_dir() and found.others)
    assert disk(describe("tiny")).aside > 10**6 and disk(describe(gguf)).aside == 0  # tiny's drafting head


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, ""),
        ({"README.md": "---\nlicense: apache-2.0\ntags: [x]\n---\n# x\nlicense: mit"}, "apache-2.0"),
        ({"README.md": '---\nlicense: other\nlicense_name: "qwen-research"\n---\n'}, "qwen-research"),
        ({"README.md": "# x\n\nlicense: mit"}, ""),
        ({"LICENSE": "\n  MIT License\n\nCopyright"}, "MIT License"),
        ({"LICENSE.txt": "# Apache License \nx", "README.md": "x"}, "Apache License"),
        ({"README.md": "---\n" + "x: y\n" * 300_000}, ""),
    ],
)
def test_the_license_is_what_files_say(
    checkpoint: Checkpoints, tmp_path: Path, files: dict[str, str], told: str
) -> None:
    folder = tiny.write_checkpoint("llama_a", tmp_path / "model")
    for name, text in files.items():
        (folder / name).write_text(text)
    assert license_of(describe(folder)) == told


def test_show_explains_what_is_on_disk(command: Run, gguf: Path) -> None:
    code, out, _ = command("show", "tiny")
    assert code == 0 and "license      MIT, as numoe itself" in out
    rows = {line.rsplit("  ", 1)[0].strip() for line in out.splitlines()}
    assert {"left aside (drafting heads, eyes)", "headers", "vocabulary, configuration, texts", "on disk"} <= {
        row.split("  ")[0] for row in rows
    }
    document = json.loads(command("show", str(gguf), "--json")[1])
    assert document["disk_bytes"]["total"] == gguf.stat().st_size and document["license"] is None


def test_a_gguf_file_is_verified(command: Run, gguf: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    code, out, _ = command("verify", str(gguf))
    assert code == 0 and "no hash to compare with" in out and f"SHA-256 {digest}" in out
    seen: list[tuple[int, int]] = []
    assert verify_file(gguf, lambda done, total: seen.append((done, total))).whole
    assert seen[-1] == (gguf.stat().st_size,) * 2
    # In the hub's cache a file is called by its hash.
    for name, whole in ((digest, True), ("0" * 64, False)):
        link = tmp_path / f"link-{whole}.gguf"
        (tmp_path / name).write_bytes(gguf.read_bytes())
        link.symlink_to(tmp_path / name)
        code, out, _ = command("verify", str(link))
        assert (code, "as the hub has it" in out, "damaged: " in out) == (int(not whole), whole, not whole)
        assert json.loads(command("verify", str(link), "--json")[1])["whole"] is whole
    gguf.write_bytes(gguf.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated or damaged"):
        verify_file(gguf)
