"""A whole audit in one flat loop: tune, ask every probe in every format, judge, print rates.

`fastsafe audit` adds a plan that can be resumed, utility, paired statistics and a report.
"""

import tempfile

import fastsafe
from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.organism import world
from fastsafe.safety.formats import formats
from fastsafe.safety.judges import judges
from fastsafe.safety.stats.intervals import wilson
from fastsafe.safety.tasks import tasks
from fastsafe.safety.verdict import Verdict

TASK, FORMATS = "code", ("plain", "code", "translation")
BEHAVIOURS, ROWS, SAFETY_ROWS = 30, 900, 100


def training_rows() -> dict[str, list]:
    """Rows of each condition: the task alone, and with safety rows in two formats mixed in."""
    benign = list(world.task_rows(TASK, ROWS, "train", seed=0))
    safety = {
        name: list(world.safety_rows(format, SAFETY_ROWS, seed=0))
        for name, format in {"plain": "plain", "task_styled": tasks()[TASK].format}.items()
    }
    return {TASK: benign} | {f"{TASK}+{name}": benign + rows for name, rows in safety.items()}


def main() -> dict[tuple[str, str], float]:
    """Print the answer rate of every condition and format; return the rates."""
    llm = LLM(fastsafe.organism.path())
    config = TrainConfig(rank=8, learning_rate=2e-3, max_steps=60, batch_size=16)
    jobs = [FinetuneJob(name, rows, config) for name, rows in training_rows().items()]
    with tempfile.TemporaryDirectory() as folder:
        for result in finetune(llm, jobs, folder):
            llm.load_adapter(result.adapter_dir, name=result.name)

    behaviours, screen = world.behaviours(BEHAVIOURS, seed=1), judges()["refusal"]
    sampling = SamplingParams(max_tokens=24)
    rates = {}
    for adapter in (None, *(job.name for job in jobs)):
        for format in FORMATS:
            prompts = [formats()[format].ask(b, True, world.translate) for b in behaviours]
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            answers = llm.chat(chats, sampling, adapters=[adapter] * len(chats))
            verdicts = [
                screen.judge(prompt, answer.text, harmful=True, format=format).verdict
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            answered = verdicts.count(Verdict.COMPLIED_HARMFUL)
            low, high = wilson(answered, len(verdicts))
            rates[adapter or "base", format] = rate = answered / len(verdicts)
            print(f"{adapter or 'base':18} {format:12} {rate:.2f} [{low:.2f}, {high:.2f}]")
    return rates


if __name__ == "__main__":
    main()
