"""The first hour of two users, as their terminals show it: one who chats, and one who writes scripts.

    python tests/first_hour.py          writes tests/golden/first_hour anew

What differs from run to run and from machine to machine, as speeds do, is fixed.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from terminal import Terminal, end

GOLDEN = Path(__file__).parent / "golden" / "first_hour"
_FIXED = """
from numoe.cli import output, reply
from numoe.cli.chat import kept, loop

reply.statistics = lambda generation, experts: f"{len(generation.tokens)} tokens, 100 tok/s, first after 0.1 s"
output.duration = lambda seconds: "2 s"
loop._memory = lambda: "16GB"
kept.Kept.age = "now"
"""
_ANSWERS = [
    "A sheep says **baa**.",
    "They want a table.</think>\n| animal | legs |\n|---|---|\n| sheep | 4 |\n| `duck` | 2 |\n\n```python\n"
    "for n in range(2):\n    print(n)\n```\n\nSo \\(a_1 + b_1\\) it is.",
    "```python\ndef f():\n    return 1\n",
    "    # that is all\n```\n\nDone.",
    "Paths begin with it.",
]
_ASKED = [
    ("What sound does a sheep make?", ""),
    ("/think on", r"asked for\.\n>$"),
    ("Legs?", ""),
    ("/think off", r"asked for\.\n>$"),
    ("/set max_tokens 20", r"20\.\n>$"),
    ("Write code.", ""),
    ("/more", ""),
    ("/set max-tokens none", r"none\.\n>$"),
    ("/set temp=0.5", r"0\.5\.\n>$"),
    ("/set top_p 3", r"error[\s\S]*\n>$"),
    ("/set ctx 99999", r"error[\s\S]*\n>$"),
    ("/dance", r"error[\s\S]*\n>$"),
    ("//usr?", ""),
    ("/rename sheep", r"is kept as[\s\S]*\n>$"),
    ("/list", r"now\n>$"),
    ("/load nobody", r"error[\s\S]*\n>$"),
]
_RUN = """
numoe
numoe run tiny "What sound does a sheep make?"
numoe run tiny "What sound does a sheep make?" --choices moo,baa -q
echo "Tim has 12 apples and gives 5 to Rosa." | numoe run tiny "How many apples does Tim have now?" -q
numoe run "What colour is a frog?"
numoe config set model tiny
numoe run "What colour is a frog?"
numoe alias small=tiny
numoe template sound="What sound does a {input} make?"
numoe run -q small -t sound cow
numoe run -q "My name is Mia."
numoe run -q -c "What is my name?"
numoe run -q tiny "Tell me a story about a fox and a lamp." -n 8
numoe run tiny --temp hot x
numoe run tiny --tmp 1 x
numoe run tiny --ram 16 x
numoe run tiny What is it
numoe run acme/large x
numoe rnu
numoe chat --list
numoe list
numoe verify tiny
numoe show tiny
"""


def chatting(home: Path, columns: int, styled: bool, **env: str) -> str:
    """What stands on the screen of the one who chats, after every line that is typed."""
    terminal = Terminal(home, "tiny", answers=list(_ANSWERS), columns=columns, before=_FIXED, **env)
    try:
        screens = [terminal.styled if styled else terminal.screen]
        for line, until in _ASKED:
            screens.append(terminal.ask(line, *([until] if until else [])))
            if styled:
                screens[-1] = terminal.styled
        left = terminal.send("/bye\r").left()
    finally:
        end(terminal.process)
    text = "\n".join(f"{screen}\n{'-' * columns}" for screen in screens) + f"\nleft with {left}\n"
    return text.replace(str(home), "~")


def scripting(home: Path, columns: int) -> str:
    """What the one who writes scripts gets of each command: both streams, and the exit code."""
    program = f"import sys\n{_FIXED}\nfrom numoe.cli.main import main\nmain(sys.argv[1:])"
    shell = f'numoe() {{ {shlex.quote(sys.executable)} -c "$PROGRAM" "$@"; }}\n'
    environment = {"PROGRAM": program, "NUMOE_HOME": str(home), "COLUMNS": str(columns), "PATH": "/usr/bin:/bin"}
    told = []
    for line in _RUN.strip().splitlines():
        done = subprocess.run(
            ["bash", "-c", f"{shell}{line}"], env=environment, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        told.append(f"$ {line}\n{done.stdout}" + (f"[{done.returncode}]\n" if done.returncode else ""))
    return "".join(told).replace(str(home), "~")


CASES = {
    "chatting_80": lambda home: chatting(home, 80, styled=True, COLORFGBG="15;0"),
    "chatting_80_light": lambda home: chatting(home, 80, styled=True, COLORFGBG="0;15"),
    "chatting_40_no_color": lambda home: chatting(home, 40, styled=True, NO_COLOR="1"),
    "chatting_40_light": lambda home: chatting(home, 40, styled=True, NUMOE_THEME="light"),
    "scripting_80": lambda home: scripting(home, 80),
    "scripting_40": lambda home: scripting(home, 40),
}

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, told in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / f"{name}.txt").write_text(told(Path(folder)), encoding="utf-8")
