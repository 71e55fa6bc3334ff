# SPDX-License-Identifier: Apache-2.0
"""Two processes started as torchrun, Slurm and a shell on each machine start them, on one shared folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from processes import forked, free_port, launched
from talker import Module, make_prompts
from tiny import checkpoint_weights, gap, make_rows, save_recipe, save_rows

from tts_align.cli.entry import run
from tts_align.cli.sample import sample
from tts_align.evaluation.prompts import SentencePrompt, write_prompts

pytestmark = pytest.mark.whole_runs

FIT = ["fit", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
TWO_MACHINES = ["--trainer.num_nodes", "2", "--trainer.devices", "1"]


def torchrun(command: list[str]) -> tuple[list[list[str]], list[Mapping[str, str]]]:
    """``torchrun`` starts both processes of one machine."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "tts_align"]
    return [[sys.executable, *start, *command, "--trainer.devices", "2"]], [{}]


def slurm(command: list[str]) -> tuple[list[list[str]], list[Mapping[str, str]]]:
    """``srun`` starts one process on each of two machines, and says which is which."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_JOB_NAME": "fit", "SLURM_JOB_ID": "7"}
    shared |= {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
    return [[sys.executable, "-m", "tts_align", *command, *TWO_MACHINES]] * 2, [shared | rank for rank in ranks]


def shells(command: list[str]) -> tuple[list[list[str]], list[Mapping[str, str]]]:
    """The same command on each machine, with the address of the first and one's own number."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    ranks = [{"NODE_RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(2)]
    return [[sys.executable, "-m", "tts_align", *command, *TWO_MACHINES]] * 2, [shared | rank for rank in ranks]


@pytest.mark.parametrize("launcher", [torchrun, slurm])
def test_two_processes_fit_as_one(
    launcher, tmp_path: Path, tiny_policy: Path, tiny_rows: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["tts-align"])
    manifest = save_rows(tmp_path, make_rows(sentences=4, per_side=(1, 1)))
    path = save_recipe(tmp_path, {"name": "kto"}, tiny_policy, manifest)
    shared = tmp_path / "shared" / "two"
    commands, changes = launcher([*FIT, "--config", path, "--run.directory", str(shared)])
    folders = [tmp_path / f"machine{number}" for number in range(len(commands))]
    done = (launched if launcher is torchrun else forked)(commands, folders, changes, timeout=200)
    assert all(one.returncode == 0 for one in done), "\n".join(one.stderr for one in done)
    monkeypatch.chdir(tmp_path)
    run(["fit", "--config", path, "--run.directory", str(tmp_path / "one")])
    assert gap(checkpoint_weights(tmp_path / "one"), checkpoint_weights(shared)) < 1e-5
    assert [len(list(folder.iterdir())) for folder in folders] == [0] * len(folders)  # nothing beside the shared folder


def test_two_machines_sample_as_one(tmp_path: Path, tiny_policy: Path, tiny_rows: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["tts-align"])
    recipe = save_recipe(tmp_path, {"name": "sft"}, tiny_policy, tiny_rows)
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(prompts, [SentencePrompt(f"s{number}", "abcdefgh"[number]) for number in range(4)])
    command = ["sample", "--config", recipe, "--prompts", str(prompts), "--samples", "2"]
    run([*command, "--out", str(tmp_path / "one.jsonl")])
    commands, changes = shells([*command, "--out", str(tmp_path / "two.jsonl"), "--trainer.strategy", "ddp"])
    done = forked(commands, [tmp_path / "machine0", tmp_path / "machine1"], changes, timeout=200)
    assert all(one.returncode == 0 for one in done), "\n".join(one.stderr for one in done)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()


def test_two_machines_without_a_shared_disk_say_so(tmp_path: Path):
    """``sample`` with a relative --out: each of the two sees its own rows only."""
    for rank in (1, 0):
        folder = tmp_path / f"machine{rank}"
        folder.mkdir()
        call = partial(sample, Module(), make_prompts(tmp_path), folder / "out.jsonl", rank=rank, world=2)
        if rank:
            call(barrier=lambda: None)
        else:
            with pytest.raises(ValueError, match=r"out.jsonl is not complete: 10 of 20 rows are missing"):
                call(barrier=lambda: None)
