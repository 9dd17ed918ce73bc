"""What a group of the sweep found: agreements, refusals by reason, wrongs."""

import re
from collections import Counter


class Report:
    """Counts of one group. `title` heads what is printed."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.agreements = 0
        self.refusals: Counter[str] = Counter()
        self.apart: Counter[str] = Counter()
        self.wrongs: list[str] = []

    def compare(self, what: str, ours: object, theirs: object) -> None:
        """An agreement, or a wrong that shows both."""
        if ours == theirs:
            self.agreements += 1
        else:
            self.wrong(f"{what}\n      numoe     {_short(ours)}\n      reference {_short(theirs)}")

    def wrong(self, what: str) -> None:
        self.wrongs.append(what)

    def refuse(self, reason: object) -> None:
        """An input that numoe refuses; reasons that differ in names and numbers only count as one."""
        sentence = str(reason).partition("; ")[0]
        sentence = re.sub(r"(/[^\s:]+)+", "FILE", sentence)
        self.refusals[sentence] += 1

    def set_apart(self, reason: str) -> None:
        """A difference in which the reference is not to be followed, for the reason given."""
        self.apart[reason] += 1

    def show(self) -> None:
        print(
            f"\n{self.title}: {self.agreements:,} agree, {self.refusals.total():,} refused, "
            f"{self.apart.total():,} set apart, {len(self.wrongs):,} wrong"
        )
        for kind, counts in (("refused", self.refusals), ("set apart", self.apart)):
            for reason, count in counts.most_common():
                print(f"  {kind} {count:6,}  {reason}")
        for wrong in self.wrongs:
            print(f"  wrong  {wrong}")


def _short(value: object, limit: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
