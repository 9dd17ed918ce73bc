"""Commands with --ray: what nodes do is in the same answer, and what is told of them on stderr. Nodes are near."""

import json
from collections.abc import Callable

import pytest
from near_nodes import use_near

Run = Callable[..., tuple[int, str, str]]
SHEEP = "What sound does a sheep make?"
INF = float("inf")


def test_a_chat_goes_on_when_nodes_go_off_between_answers(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = use_near(monkeypatch, (12.0, INF))  # three tokens, of four layers each
    asked = f"{SHEEP}\nAnd where does it live?\n/stats\n"
    code, out, err = command("chat", "tiny", "--temp", "0", "--ray", stdin=asked)
    assert (code, out) == (0, "A sheep says baa.\nA sheep lives on a farm.\n")
    assert err.count("node node0 is lost (it is off); its experts are taken over by 1 other, and the answer goes") == 1
    assert nodes[1].asked and "experts" in err


def test_a_run_says_in_json_what_nodes_took(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    use_near(monkeypatch)
    code, out, _ = command("run", "tiny", SHEEP, "--temp", "0", "--ray", "--json")
    experts = json.loads(out)["experts"]
    assert code == 0 and json.loads(out)["text"] == "A sheep says baa."
    assert experts["nodes"] == ["node0", "node1"] and 0 < experts["call_p50_s"] <= experts["call_p99_s"]
    assert 0 <= experts["waiting"] <= 1


def test_bench_measures_calls(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    use_near(monkeypatch)
    code, out, _ = command("bench", "tiny", "--ray", "--prompt-tokens", "8", "-n", "4")
    assert code == 0 and "2 beside this process" in out and "a layer's experts" in out
