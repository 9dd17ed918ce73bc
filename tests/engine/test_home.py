"""Where models are, what their names mean, `numoe list` and `numoe rm`."""

import io
import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine import InputError, home

Run = Callable[..., tuple[int, str, str]]

WORD = st.text(string.ascii_letters + string.digits + "._", min_size=1, max_size=12)
NAME = st.lists(WORD, min_size=1, max_size=3).map("-".join)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NUMOE_HOME, an empty Hugging Face cache, and another working folder."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def pulled(repo_id: str, quant: str = "native", complete: bool = True, nbytes: int = 1000) -> Path:
    path = home.folder_for(repo_id, quant)
    if not complete:
        path = path.with_name(path.name + ".part")
    (path / "inner").mkdir(parents=True)
    (path / "a").write_bytes(bytes(nbytes - 10))
    (path / "inner" / "b").write_bytes(bytes(10))
    return path


def refused(model: str) -> str:
    with pytest.raises(InputError) as caught:
        home.locate(model)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["Org/Model-7B", "org/model-7b", "Model-7B", "model-7b", "model-7b:int4"])
def test_a_pulled_model_is_found_by_its_id_and_by_its_name(name: str) -> None:
    path = pulled("Org/Model-7B", "int4")
    pulled("Org/Model-7B-Chat", "int4")
    assert home.locate(name) == path


def test_formats_of_one_model_are_told_apart(tmp_path: Path) -> None:
    paths = {quant: pulled("Org/Model", quant) for quant in ("native", "int4")}
    for quant, path in paths.items():
        assert home.locate(f"Org/Model:{quant}") == home.locate(f"model:{quant}") == path
    assert 'Model" can be Org/Model:int4 or Org/Model:native; say which' in refused("Model")
    assert "int8" in refused("Model:int8")


def test_one_name_of_two_owners_is_refused() -> None:
    paths = [pulled("One/Model"), pulled("Two/Model")]
    assert "One/Model:native or Two/Model:native" in refused("model")
    assert [home.locate("One/Model"), home.locate("two/model")] == paths


def test_two_spellings_of_one_name_can_both_be_said(command: Run) -> None:
    paths = [pulled("Org/Model"), pulled("org/model")]
    assert [home.locate(name) for name in ("Org/Model", "org/model", "org/model:native")] == [*paths, paths[1]]
    assert "Org/Model:native or org/model:native; say which" in refused("Model")
    assert command("rm", "org/model", "-y")[0] == 0
    assert [path.exists() for path in paths] == [True, False]


def test_an_unfinished_pull_is_no_model() -> None:
    pulled("Org/Model", "int8", complete=False)
    assert "`numoe pull Org/Model quant=int8` goes on" in refused("Model")
    assert home.lookup("Model") is None
    path = pulled("Org/Model", "int4")
    assert home.locate("Model") == path


def test_folders_and_files_here_come_first(tmp_path: Path) -> None:
    pulled("Org/Model")
    Path("Org/Model").mkdir(parents=True)
    Path("Model").write_text("a file")
    assert home.locate("Org/Model") == Path("Org/Model")
    assert home.locate("Model") == Path("Model")
    assert home.locate("tiny").name == "tiny"


def test_the_cache_of_hugging_face_is_looked_into(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--Org--Model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert "numoe pull Org/Model" in refused("Org/Model")  # its configuration alone
    (snapshot / "model.safetensors").write_text("")
    assert home.locate("Org/Model") == snapshot
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    (snapshot / "model.safetensors").rename(snapshot / shards[0])
    for index in (None, {"weight_map": dict(zip("abc", shards, strict=True))}):
        if index:
            (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "holds Org/Model in part; `numoe pull Org/Model` gets the rest" in refused("Org/Model")
        (snapshot / shards[1]).write_text("")
        assert "in part" in refused("Org/Model")
        (snapshot / shards[2]).symlink_to(tmp_path / "a blob that is not there")
        assert "in part" in refused("Org/Model")
        (snapshot / shards[2]).unlink()
        (snapshot / shards[2]).write_text("")
        assert home.locate("Org/Model") == snapshot
        for shard in shards[1:]:
            (snapshot / shard).unlink()
    for shard in shards:
        (snapshot / shard).write_text("")
    (snapshot / "model.safetensors.index.json").write_text("{")
    assert "in part" in refused("Org/Model")
    (snapshot / "model.safetensors.index.json").unlink()
    assert home.locate("Org/Model") != pulled("Org/Model") == home.locate("Org/Model")


@pytest.mark.parametrize(
    ("typed", "meant"), [("Modle-7B", "Model-7B"), ("org/model-7", "Org/Model-7B"), ("tinny", "tiny")]
)
def test_typos_get_a_suggestion(typed: str, meant: str) -> None:
    pulled("Org/Model-7B")
    assert f'(did you mean "{meant}"?)' in refused(typed)


def test_what_is_unknown_gets_the_next_step() -> None:
    assert "`numoe fit Some/Model` tells what it takes, `numoe pull Some/Model` gets it" in refused("Some/Model")
    assert "did you mean" not in refused("Some/Model")
    assert "`numoe list`" in refused("qwertz")
    assert "pull" not in refused("some/model.gguf").split("`")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nosuchuser/model", "begins with the name of no user; write the path in full"),
        ("x" * 5000, "there is no folder or file"),
        (f"{'x' * 300}/{'y' * 300}", "there is no folder or file"),
        (f"org/{'y' * 97}", "there is no folder or file"),
        ("org/a--b", "there is no folder or file"),
        ("org/a..b", "there is no folder or file"),
        ("org/-a", "there is no folder or file"),
        ("org/a.git", "there is no folder or file"),
        ("org/ä", "there is no folder or file"),
        (f"org/{'y' * 96}", "`numoe pull"),
    ],
)
def test_names_that_can_be_none_are_refused_in_a_sentence(name: str, message: str) -> None:
    said = refused(name)
    assert message in said and len(said) < 500


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, command: Run) -> None:
    """As one whose number the system does not know, in a container."""

    def unknown(*_: object, **more: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NUMOE_HOME")
    monkeypatch.setattr("platformdirs.user_data_path", unknown)
    for arguments in (("list",), ("run", "tiny", "hi"), ("config",), ("config", "set", "temp", "1")):
        code, out, err = command(*arguments)
        assert (code, out) == (1, "") and err.endswith("this user has no home; set NUMOE_HOME to a folder\n")


def test_a_home_of_no_user_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_HOME", "~nosuchuser/numoe")
    with pytest.raises(InputError, match=r"NUMOE_HOME is .* begins with the name of no user"):
        home.home()


@given(owner=NAME, name=NAME, quant=st.sampled_from(["native", "int8", "int4"]))
def test_a_folder_tells_what_it_holds(owner: str, name: str, quant: str) -> None:
    path = home.folder_for(f"{owner}/{name}", quant)
    path.mkdir(parents=True, exist_ok=True)
    [found] = [one for one in home.models() if one.path == path]
    assert (found.repo_id, found.quant) == (f"{owner}/{name}", quant)
    path.rmdir()


def test_home_is_the_users_data_folder_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMOE_HOME", "here")
    assert home.home() == tmp_path / "elsewhere" / "here"
    monkeypatch.delenv("NUMOE_HOME")
    assert home.home().is_absolute()
    assert home.home().name == "numoe"


# -------------------------------------------------------------------------------------------- list and rm


def test_list(command: Run, folder: Path) -> None:
    code, out, err = command("list")
    assert (code, out) == (0, "")
    assert str(folder / "models") in err and "numoe pull" in err
    pulled("Org/Model", "int4", nbytes=1_500_000)
    pulled("Org/Other", complete=False)
    (folder / "models" / "not one of ours").mkdir()
    rows = [line.split() for line in command("list")[1].splitlines()]
    assert rows == [
        ["model", "quant", "size"],
        ["Org/Model", "int4", "1.5", "MB"],
        ["Org/Other", "native", "1", "kB", "unfinished"],
    ]


def test_list_json(command: Run, folder: Path) -> None:
    path = pulled("Org/Model", "int4")
    part = pulled("Org/Other", complete=False)
    code, out, err = command("list", "--json")
    assert (code, err) == (0, "")
    one = {"model": "Org/Model", "quant": "int4", "bytes": 1000, "complete": True, "path": str(path)}
    other = {"model": "Org/Other", "quant": "native", "bytes": 1000, "complete": False, "path": str(part)}
    assert json.loads(out) == {"folder": str(folder / "models"), "models": [one, other]}


def test_rm_removes_the_model_that_is_named_and_no_other(command: Run) -> None:
    paths = {name: pulled(f"Org/{name}") for name in ("Model", "Other")}
    part = pulled("Org/Third", complete=False)
    code, out, err = command("rm", "model", "-y")
    assert (code, out, err) == (0, "", "removed Org/Model:native, 1 kB\n")
    assert not paths["Model"].exists() and paths["Other"].exists()
    assert command("rm", "Org/Third", "--yes")[0] == 0
    assert not part.exists()
    assert [one.repo_id for one in home.models()] == ["Org/Other"]


def test_rm_asks_only_where_somebody_can_answer(command: Run) -> None:
    path = pulled("Org/Model")
    code, _, err = command("rm", "model")
    assert code == 2
    assert "add -y" in err
    assert path.exists()


class Typed(io.StringIO):
    """A terminal's keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "y\n", "Yes\n"])
def test_rm_does_what_is_answered(command: Run, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    path = pulled("Org/Model")
    monkeypatch.setattr("sys.stdin", Typed(answer))
    agreed = answer.lower().startswith("y")
    code, out, err = command("rm", "model")
    assert code == (0 if agreed else 1)
    assert path.exists() is not agreed
    assert out == ""
    assert f"remove Org/Model:native (1 kB) from {path}? [y/N] " in err


def test_rm_refuses_what_it_cannot_tell(command: Run) -> None:
    paths = [pulled("Org/Model", quant) for quant in ("int8", "int4")]
    assert "say which" in command("rm", "model", "-y")[2]
    assert "`numoe list` shows them" in command("rm", str(paths[0]), "-y")[2]
    assert all(path.exists() for path in paths)


def test_rm_leaves_what_a_link_leads_to(command: Run, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    link = home.folder_for("Org/Model", "native")
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "kept")
    assert command("rm", "model", "-y")[0] == 0
    assert (tmp_path / "kept").exists() and not link.exists()
