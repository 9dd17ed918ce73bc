"""Add what the READMEs of families, layers and chat tell to a copy of numoe, and run models of it.

Run: python tests/reference/recipe.py

The READMEs' blocks of code that begin with a file's name are that file's text. Nothing else is edited: a recipe that is
no longer complete fails here.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FAMILY, KIND = "engine/families/made_up.py", "engine/layers/relu.py"
GATED, PLAIN = "common.swiglu(config)", 'ReLU(config.size("intermediate_size"))'


def blocks(readme: Path) -> dict[str, str]:
    """The blocks of code in a README that are whole files, by their names."""
    found = re.findall(r"^```\w+ (\S+/\S+)\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return dict(found)


def written(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("cli", "engine", "quant"):
            shutil.copytree(ROOT / part, folder / "numoe" / part)  # with what is compiled
        parts = ("families", "layers", "chat")
        family, kind, chat = (blocks(ROOT / "engine" / part / "README.md") for part in parts)
        written(folder / "numoe", {**family, **kind, **chat})
        plain = family[FAMILY].replace(GATED, PLAIN).replace('"made_up"', '"plain"').replace('"madeup"', '"plain"')
        imported = "from numoe.engine.layers.relu import ReLU\n"
        plain = plain.replace("from numoe.engine.layers.spec", f"{imported}from numoe.engine.layers.spec")
        written(folder / "numoe", {FAMILY.replace("made_up", "plain"): plain})
        sys.path[:0] = [str(folder), *(str(ROOT / "tests" / part) for part in (".", "engine"))]
        os.environ["NUMOE_HOME"] = str(folder / "home")
        (folder / "home").mkdir()
        used = Path(importlib.import_module("numoe.engine").__file__ or "")
        assert used.is_relative_to(folder), f"the copy was to be imported, not {used}"

        machines = importlib.import_module("machines")
        machines.keep(machines.a_machine())  # measuring takes longer than all the rest

        config = json.loads(family["made_up/config.json"])
        model(folder / "made_up", config, "1 dense, 2 routed", lines(family[FAMILY]))
        gguf_file(folder / "made_up", config)
        (folder / "made_up" / "tokenizer_config.json").unlink()  # and the chat template with it
        answer = numoe("run", "-q", str(folder / "made_up"), "hello", "--max-tokens", "8", "--no-think")
        print(f"its chat format: {', '.join(map(lines, chat.values()))}; {answer!r}")
        for name in (one for one in kind if one.startswith("tests/")):
            test(folder / "numoe" / name)
        model(folder / "plain", config | {"model_type": "plain"}, "1 relu, 2 routed", lines(kind[KIND]))


def lines(text: str) -> str:
    return f"{len(text.splitlines())} lines"


def test(file: Path) -> None:
    """Run the tests in a file."""
    sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    for name in (one for one in vars(module) if one.startswith("test_")):
        getattr(module, name)()
        print(f"{name}: as the formula")


def checkpoint(folder: Path, config: dict) -> None:
    """A random model with this config.json, its tensors where the family looks for them first."""
    from helpers import tiny_tokenizer, write_safetensors

    from numoe.engine.families import family

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    one = family(config["model_type"])
    random, tensors = np.random.default_rng(0), {}
    for name, tensor in one.spec(config).tensors().items():
        values = random.standard_normal(tensor.shape) / tensor.shape[-1] ** 0.5 + (len(tensor.shape) == 1)
        numbers = re.fullmatch(r"(?:layers\.(\d+)\.)?(?:.*experts\.(\d+)\.)?.*", name)
        pattern = re.sub(r"(?<=experts\.)\d+", "{expert}", re.sub(r"(?<=layers\.)\d+", "{layer}", name))
        stored = one.names[pattern][0].name.format(layer=numbers[1], expert=numbers[2])
        tensors[stored] = "F32", tensor.shape, values.astype("<f4").tobytes()
    write_safetensors(folder / "model.safetensors", tensors)
    tiny_tokenizer(folder, config["vocab_size"])


def model(folder: Path, config: dict, ffn: str, size: str) -> None:
    """A model of the family is computed the same in any passes, quantized, fitted, shown and run."""
    from numoe.engine import load

    checkpoint(folder, config)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 40)
    loaded = load(folder)
    whole = loaded.session(64).feed(ids)
    session = loaded.session(64)
    parts = np.concatenate([session.feed(part) for part in np.split(ids, [1, 2, 11, 30])])
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    session.rewind(15)
    np.testing.assert_allclose(session.feed(ids[25:]), whole[25:], atol=1e-4)

    shown, made = numoe("show", str(folder)), f"{folder}-int8"
    assert f"ffn          {ffn}\n" in shown, shown
    numoe("quantize", "-q", str(folder), made, "--quant", "int8")
    small = load(made)
    assert small.plan().stored_bytes < loaded.plan().stored_bytes / 2
    assert np.abs(small.session(64).feed(ids) - whole).mean() < whole.std() / 20
    fitted = json.loads(numoe("fit", made, "--json", "--ram", "1GB"))["formats"]["int8"]
    answer = numoe("run", "-q", made, "hello", "--max-tokens", "8", "--temp", "0")
    print(f"{config['model_type']}: {size}; {ffn}; {fitted['verdict']}; {answer!r}")


def gguf_file(folder: Path, config: dict) -> None:
    """The same model in a GGUF file is computed the same."""
    from gguf_files import write_gguf

    from numoe.engine import load

    def named(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ours, theirs = "ffn_gate_inp.e_score_correction_bias", "exp_probs_b.bias"
        return {name.replace(ours, theirs): values for name, values in tensors.items()}

    file, dense = folder.with_suffix(".gguf"), config["first_k_dense_replace"]
    told = config | {"num_experts_per_tok": 2}  # the default, which files say
    write_gguf(folder, told, file, "madeup", change=named, leading_dense_block_count=dense)
    ids = np.arange(40)
    right = load(folder).session(64).feed(ids)
    np.testing.assert_allclose(load(file).session(64).feed(ids), right, atol=1e-4)
    print("its GGUF file: as the folder")


def numoe(*arguments: str) -> str:
    """What the command prints."""
    from numoe.cli.main import main

    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main(list(arguments))
    except SystemExit as left:
        assert not left.code, f"numoe {' '.join(arguments)}: exit code {left.code}"
    return out.getvalue()


if __name__ == "__main__":
    main()
