# SPDX-License-Identifier: Apache-2.0
"""The commands of ``tts-align`` and what their help says first; needs none of the libraries."""

from __future__ import annotations

COMMANDS = {
    "recipes": "list the recipes that ship with the package, or copy them",
    "prepare": "make a manifest of recordings and texts: speech tokens, speaker vectors",
    "sample": "speak every sentence several times with the policy: candidates",
    "judge": "listen to candidates and write down error rates and readings",
    "label": "turn judged candidates into desirable and undesirable rows, and pairs",
    "fit": "train the policy with an objective, then test it; resumes an interrupted run",
    "validate": "loss and metrics on the held-out rows",
    "test": "speak the test sentences before and after, judge, and write table, figures and audio",
    "compare": "compare two runs, or one before and after: mended and broken words, differences, report.html",
    "export": "write the trained policy as a model directory, CosyVoice's or vLLM's, and read it back",
    "predict": "score the held-out rows, for a callback of yours",
    "score": "score a folder of recordings of any system on a test set, without a model",
    "listen make": "make a listening test: one HTML file that opens from the disk",
    "listen score": "screen the listeners of a test, and print its tables",
    "listen label": "turn the answers of a listening test into desirable and undesirable rows",
    "demo build": "build the embedded corpus and its models again",
}
"""Every command, in the order in which they are used, with the line that --help shows."""

ARGUMENTS = {
    "prepare": "--directory DIR --source FILE --out FILE",
    "sample": "--prompts FILE --out FILE",
    "label": "--judged FILE --out FILE",
    "compare": "FIRST [SECOND]",
    "export": "--to DIR",
    "score": "FOLDER --prompts FILE",
    "listen make": "SYSTEM... --out FILE",
    "listen score": "ANSWERS... --key FILE",
    "listen label": "ANSWERS... --key FILE --out FILE",
}
"""What must be given to a command besides its recipe."""

OF_A_RECIPE = ("fit", "validate", "test", "predict", "sample", "judge", "export")
"""Commands that build what a recipe names."""

WITHOUT_OBJECTIVE = ("sample", "judge", "export")
"""Commands for which a recipe need not say what is optimised, nor on what."""

DESCRIPTIONS = {
    "fit": (
        "Trains the policy with an objective, then tests it. Everything is kept in run.directory: the same recipe "
        "resumes from the last checkpoint, another recipe is refused. --ckpt_path resumes from another checkpoint of "
        "the same recipe; weights of another run are named in model.policy."
    ),
    "validate": "Loss and metrics of the run's last checkpoint, or of --ckpt_path, on the held-out rows.",
    "test": (
        "Tests the run's last checkpoint, or --ckpt_path: speaks the test sentences before and after, judges them, and "
        "writes table, figures and audio to run.directory. A saved recipe will do: --config runs/NAME/config.yaml"
    ),
    "predict": (
        "Scores the held-out rows (data.validation) with the run's last checkpoint, or --ckpt_path. Nothing is written "
        "but by a callback of yours (on_predict_batch_end) among trainer.callbacks."
    ),
    "sample": (
        "Speaks every sentence several times in every voice with model.policy; the first of sample, judge, label. With "
        "a run's own recipe (--config runs/NAME/config.yaml) it speaks with the run's last checkpoint."
    ),
    "judge": (
        "Listens to candidates with model.judge and writes what was heard; the second of sample, judge, label. With a "
        "run's own recipe it uses the run's last checkpoint where that holds the vocoder's models."
    ),
    "export": (
        "Writes the policy with the weights of the run's last checkpoint, or of --ckpt_path, as a model directory that "
        "its runtime loads; adapters are merged. What was written is read back and compared with the model in memory "
        "on rows of data.manifest; the numbers are in export.json in run.directory. Needs neither GPU nor objective."
    ),
}
"""What the help of each command of a recipe says first."""

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the data module cuts the rows over ranks itself, exactly
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
"""What differs from the defaults of Lightning's trainer."""

USAGE = """\
usage: tts-align COMMAND [options]

Makes a speech language model say what is written: from its own good and bad speech.

{commands}

`tts-align COMMAND --help` explains a command, `tts-align fit --objective.help tkto` an objective.
A recipe holds the options: tts-align fit --config tkto
  several --config, and flags after them, override what came before; --print_config shows the result
  a run lives in runs/<name of the recipe>/; its config.yaml is a recipe again
  --ckpt_path gives weights and progress only: the recipe and flags always decide everything else
  --debug shows where in the code an error came from
"""


def usage() -> str:
    """What ``tts-align --help`` prints."""
    return USAGE.format(commands="\n".join(f"  {command:14}{line}" for command, line in COMMANDS.items()))
