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
        self.notes: list[str] = []

    def agree(self) -> None:
        self.agreements += 1

    def compare(self, what: str, ours: object, theirs: object) -> None:
        """An agreement, or a wrong that shows both."""
        if ours == theirs:
            self.agree()
        else:
            ours, theirs = _from_difference(ours, theirs)
            self.wrong(f"{what}\n      numoe     {ours}\n      reference {theirs}")

    def wrong(self, what: str) -> None:
        self.wrongs.append(what)

    def refuse(self, reason: object) -> None:
        """An input that numoe refuses; reasons that differ in names and numbers only count as one."""
        sentence = str(reason).partition("; ")[0]
        sentence = re.sub(r"(?<!\S)/[^\s:]+", "FILE", sentence)
        self.refusals[sentence] += 1

    def note(self, line: str) -> None:
        """A line that is shown before all else."""
        self.notes.append(line)

    def set_apart(self, reason: str) -> None:
        """A difference in which the reference is not to be followed, for the reason given."""
        self.apart[reason] += 1

    def show(self) -> None:
        print(
            f"\n{self.title}: {self.agreements:,} agree, {self.refusals.total():,} refused, "
            f"{self.apart.total():,} set apart, {len(self.wrongs):,} wrong"
        )
        for line in self.notes:
            print(f"  {line}")
        for kind, counts in (("refused", self.refusals), ("set apart", self.apart)):
            for reason, count in counts.most_common():
                print(f"  {kind} {count:6,}  {reason}")
        for wrong in self.wrongs:
            print(f"  wrong  {wrong}")


def _from_difference(*values: object) -> list[str]:
    """Two values from a little before the first character in which they differ."""
    texts = [repr(value) for value in values]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
    return [f"{'...' * (same > 40)}{text[max(same - 40, 0) : same + 200]}" for text in texts]
