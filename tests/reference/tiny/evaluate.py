"""Asks the model inside the package what was held out of its training, through numoe itself.

    python tests/reference/tiny/evaluate.py [MODEL] [--questions 200] [--stories 50] [--seed 1]

Prints how many questions are answered rightly by kind, every wrong answer, and how many stories mention both of the
things they were asked for and end with a full stop. `corpus.py` judges the answers.
"""

import argparse
from collections import Counter
from pathlib import Path

from corpus import check, check_story, held_out_questions, held_out_story_prompts

from numoe.engine import Model, load
from numoe.engine.chat.prompt import encode

HERE = Path(__file__).parent


def ask(model: Model, text: str, max_tokens: int = 400) -> str:
    """The greedy answer to one question."""
    messages = [{"role": "user", "content": text}]
    ids, _ = encode(model.description.chat_format, model.tokenizer, messages, thinking=False)
    return "".join(model.session(1024).generate(ids, max_tokens=max_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--stories", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model = load(args.model)

    asked, right = Counter[str](), Counter[str]()
    for question in held_out_questions(args.questions, args.seed):
        answer = ask(model, question.user)
        asked[question.kind] += 1
        if check(question, answer):
            right[question.kind] += 1
        else:
            print(f"wrong: {question.user} -> {answer} (expected: {question.expected})")
    for kind, count in asked.most_common():
        print(f"  {kind}: {right[kind]} of {count}")
    print(f"questions: {right.total()} of {asked.total()} right")

    told = 0
    for request, pair in held_out_story_prompts(args.stories, args.seed):
        story = ask(model, request)
        passed = check_story(pair, story)
        told += passed
        if not passed:
            print(f"failed: {request} -> {story}")
    print(f"stories: {told} of {args.stories} mention both and end with a full stop")


if __name__ == "__main__":
    main()
