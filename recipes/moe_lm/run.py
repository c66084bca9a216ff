"""One run from meeting the other ranks to the last file."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from typing import Any

import torch.distributed as dist
from check import check
from checkpoints import Checkpoints, fingerprint
from data import Corpus
from files import make_writable, read_text
from options import BrokenInput
from report import arguments_of, environment_of, plot, write_log
from sample import PROMPT, generate
from stopping import StopRequest
from tqdm import tqdm
from trainer import Trainer
from world import World, join, together

from deepep_train import moe


def run(options: argparse.Namespace) -> int:
    """The exit code. Raises `BrokenInput` on every rank alike."""
    with StopRequest() as stop:
        world = join(options)
        corpus = Corpus(_read_alike(options, world), options.seq, options.seed)
        if options.check:
            code = 0 if check(options, world, corpus) else 1
        else:
            together(lambda: make_writable(options.out))
            _Run(options, world, corpus, stop).train()
            code = 0
        dist.destroy_process_group()
    return code


def _read_alike(options: argparse.Namespace, world: World) -> bytes:
    text = together(lambda: read_text(options.data, options.seq))
    digests: list[Any] = [None] * world.size
    dist.all_gather_object(digests, hashlib.blake2b(text).hexdigest())
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise BrokenInput(f"--data {options.data}: rank {odd[0]} reads another text than rank 0")
    return text


class _Run:
    """Attributes:
    history: what happened at each step, kept in the checkpoints.
    log: what log.json will hold.
    """

    def __init__(self, options: argparse.Namespace, world: World, corpus: Corpus, stop: StopRequest) -> None:
        self.options, self.world, self.corpus, self.stop = options, world, corpus, stop
        self.trainer = Trainer(options, world)
        self.checkpoints = Checkpoints(options.out)
        self.held_out = corpus.held_out_sequences(options.eval_sequences)
        self.history: dict[str, list[dict[str, Any]]] = {"steps": [], "evals": []}
        text = {
            "source": str(options.data or "the standard library of Python"),
            "bytes": len(corpus.train) + len(corpus.held_out),
            "held_out_bytes": len(corpus.held_out),
            "unigram_entropy": corpus.unigram_entropy,
        }
        self.log: dict[str, Any] = {
            "arguments": arguments_of(options),
            "environment": environment_of(self.trainer),
            "text": text,
            "resumed": None,
            "saved": [],
        }
        self._say(
            f"text: {text['source']}, {text['bytes']:,} bytes, the last {text['held_out_bytes']:,} held out; "
            f"unigram entropy {corpus.unigram_entropy:.3f} nats per byte"
        )
        parallel = options.expert_parallel
        dense = sum(p.numel() for p in moe.dense_parameters(self.trainer.model))
        experts = sum(p.numel() for p in moe.expert_parameters(self.trainer.model)) * parallel
        self._say(
            f"model: {dense + experts:,} parameters, {experts:,} of them in {options.layers} x {options.experts} experts; "
            f"{world.size} rank(s) on {self.log['environment']['device']}, "
            f"{options.experts // parallel} experts per layer on each, engine {self.log['environment']['engine']}"
        )

    def train(self) -> None:
        """Train, and write what a run leaves."""
        began = time.perf_counter()
        start = self._resume() if self.options.resume else 0
        stopped = self._steps(start)
        self.log |= {"history": self.history, "finished": not stopped}
        if not stopped:
            self._sample()
        self.log["seconds"] = time.perf_counter() - began
        if self.world.rank == 0:
            write_log(self.options.out / "log.json", self.log)
            plot(self.options.out / "loss_curve.png", self.history, self.corpus.unigram_entropy)
        if stopped:
            self._say(f"asked to stop: saved after step {len(self.history['steps'])}, --resume goes on from there")
            return
        self._summarize(start)

    def _resume(self) -> int:
        found = self.checkpoints.resume(self.trainer)
        if found is None:
            self._say(f"--resume: no checkpoint in {self.checkpoints.folder}, starting afresh")
            return 0
        step, self.history = found
        state = fingerprint(self.trainer)
        self.log["resumed"] = {"step": step, "fingerprint": state}
        self._say(f"resumed {self.checkpoints.kept[-1]} after step {step}; fingerprint {state}")
        return step

    def _steps(self, start: int) -> bool:
        """Returns whether the run was asked to stop before its last step."""
        options, world = self.options, self.world
        tokens = options.batch * options.seq * world.size
        # Where nobody watches a terminal, a line every few seconds is enough.
        pause = 0.1 if sys.stderr.isatty() else 10
        total = max(start, options.steps)
        with tqdm(initial=start, total=total, unit="step", mininterval=pause, disable=world.rank != 0) as bar:
            for number in range(start, options.steps):
                began = time.perf_counter()
                loss = self.trainer.step(number, [self.corpus.batch(number, world.rank, options.batch)])
                shared = self.trainer.share(loss, time.perf_counter() - began, self.stop.signal is not None)
                done, last = number + 1, number + 1 == options.steps
                speed = tokens / shared.seconds
                entry = {"step": done, "loss": shared.loss, "tokens_per_second": speed, "load_balance": shared.balance}
                self.history["steps"].append(entry)
                postfix = f"loss {shared.loss:.3f}, {speed:,.0f} tokens/s, busiest expert {max(shared.balance):.2f} x mean"
                bar.set_postfix_str(postfix, refresh=False)
                bar.update()
                if last or done % options.eval_every == 0:
                    self._evaluate(done)
                if last or shared.stop or done % options.save_every == 0:
                    state = self.checkpoints.save(self.trainer, done, self.history)
                    self.log["saved"].append({"step": done, "fingerprint": state})
                    self._say(f"saved {self.checkpoints.kept[-1]}; fingerprint {state}")
                if shared.stop and not last:
                    return True
        return False

    def _evaluate(self, step: int) -> None:
        loss = self.trainer.evaluate(self.held_out)
        self.history["evals"].append({"step": step, "loss": loss})
        self._say(f"step {step}: held-out loss {loss:.4f} nats per byte")

    def _sample(self) -> None:
        text = generate(self.trainer, self.held_out[0, :PROMPT], self.options.sample_bytes).decode(errors="replace")
        self.log["sample"] = text
        if self.world.rank == 0:
            (self.options.out / "sample.txt").write_text(text)
        self._say(f"--- sample, begun with {PROMPT} held-out bytes ---\n{text}\n---")

    def _summarize(self, start: int) -> None:
        speeds = sorted(entry["tokens_per_second"] for entry in self.history["steps"][start:])
        if speeds:
            slow, median, fast = (speeds[len(speeds) * quarter // 4] for quarter in (1, 2, 3))
            half = f"half of the steps {slow:,.0f} to {fast:,.0f}"
            self._say(f"median {median:,.0f} tokens/s, {half}, {self.log['seconds']:.0f} s in all")
        if self.history["evals"]:
            self._say(
                f"held-out loss {self.history['evals'][-1]['loss']:.3f} nats per byte; "
                f"counting bytes alone gives {self.corpus.unigram_entropy:.3f}"
            )
        self._say(f"written to {self.options.out}: log.json, loss_curve.png, sample.txt, checkpoints/")

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()
