"""Tags in what a model says: special tokens of some vocabularies that are part of the text all the same."""

Tags = tuple[str, str]
"""What opens a thinking block, and what closes it."""

TAGS: tuple[Tags, ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<think:opensource>", "</think:opensource>"),
)
"""Those that models are trained with; the first are taken where a model names none."""

DSML = "｜DSML｜"
"""Stands in every tag of a DeepSeek-V4 tool call."""

SHOWN = frozenset(text.encode() for text in (DSML, "<|channel>", *(tag for tags in TAGS for tag in tags)))
"""Never left out as special tokens are, for what stands around them is told apart by them."""
