"""How examples/conversations.jsonl was made: prompts out of chatterbot-corpus and from
a list of topics, answers by the demo's target itself.

    python scripts/make_examples.py prompts.jsonl
    specforge regenerate --model-path cache/models/SmolLM2-135M-Instruct --prompts prompts.jsonl \
        --max-new-tokens 192 --output examples/conversations.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import chatterbot_corpus
import yaml

from specforge.data.split import words

MIN_WORDS = 2
TOPICS = """gravity; photosynthesis; the water cycle; volcanoes; earthquakes; black holes; the moon; vaccines;
antibiotics; the heart; the brain; sleep; exercise; a balanced diet; stress; meditation; time
management; public speaking; a job interview; writing a resume; saving money; compound interest;
inflation; taxes; credit cards; the stock market; electric cars; solar power; wind energy;
recycling; climate change; rainforests; coral reefs; whales; honey bees; dogs; cats; gardening;
houseplants; baking bread; cooking rice; coffee; tea; chess; football; swimming; running a marathon;
yoga; learning a language; reading more books; writing a poem; painting; the piano; jazz; classical
music; photography; movies; travelling alone; packing a suitcase; Paris; Japan; ancient Egypt; the
Roman Empire; the Renaissance; the printing press; the steam engine; the internet; computers;
programming in Python; databases; machine learning; robots; encryption; passwords; email; social
media; video games; friendship; teamwork; leadership; honesty; kindness; happiness; democracy; human
rights; the law of supply and demand; probability; fractions; prime numbers; the Pythagorean
theorem; atoms; electricity; magnets; light; sound; rainbows; thunderstorms; snow; deserts; rivers;
mountains; oceans""".split(";")
QUESTIONS = (
    "Explain {} in two sentences.",
    "Give me three short tips about {}.",
    "Why does {} matter?",
    "What should a beginner know about {}? Keep it short.",
    "Write one short paragraph about {}.",
    "What is a common mistake people make with {}?",
)


def prompts() -> list[str]:
    """The first line of every English dialogue of the corpus, and questions about topics, in a fixed random order."""
    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.yml")):
        for dialogue in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            line = " ".join(str(dialogue[0]).split())
            found.setdefault(" ".join(words(line)), line)
    for number, topic in enumerate(TOPICS):
        for at in range(4):
            question = QUESTIONS[(number + at) % len(QUESTIONS)]
            line = question.format(" ".join(topic.split()))
            found.setdefault(" ".join(words(line)), line)
    lines = [line for key, line in found.items() if len(key.split()) >= MIN_WORDS]
    random.Random(0).shuffle(lines)
    return lines


def main() -> None:
    with Path(sys.argv[1]).open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts()):
            row = {"id": f"prompt-{number}", "conversations": [{"role": "user", "content": prompt}]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
