"""The verbs of every training script: one gradient step, one meter, one way to save and resume.

The sentence they form (data, model, the `while` loop, what is evaluated when) is the stage
itself and stands in its script. There is no Trainer here.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import platform
import shutil
import signal
import sysconfig
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat.checkpoint_manager import (
    checkpoint_dir,
    find_last_step,
    load_checkpoint,
    rng_state,
    set_rng_state,
    step_folder,
    verify,
)
from nanochat.common import Compute, UserError, job_name, print0, restarts
from nanochat.flash_attention import choose
from nanochat.saver import Saver
from nanochat.schedule import lr_multiplier, muon_momentum, weight_decay_multiplier

# Dense bf16 peak in FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


KEPT = 20  # numbers per token, layer and channel that a compiled model keeps for the backward pass (dev/LOG.md, 15)
ROOM = 0.65  # share of the memory they may take; weights, gradients, optimizer and logits want the rest


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in FLOP/s; None where it is not known, so that no MFU is made up."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def compile_model(model: torch.nn.Module, compute: Compute, rows: int) -> torch.nn.Module:
    """The model compiled for passes of `rows` rows, or itself, with a word why, where nothing can compile it.

    On a GPU that has no room for all that the backward pass wants, the model keeps only the most, which is slower.
    """
    choose_attention(model, compute)
    if compute.device.type == "cuda":
        config = model.config
        torch.cuda.empty_cache()  # what is free is asked of the driver
        wanted = rows * config.sequence_len * config.n_layer * config.n_embd * KEPT * compute.dtype.itemsize
        free = torch.cuda.mem_get_info(compute.device)[0]
        model.recompute = max(compute.gather(wanted > ROOM * free))  # all ranks alike
        if model.recompute:
            logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # warns of in-place operations; blocks have none
            print0(f"{wanted / 1e9:.0f} GB of activations would not fit beside the rest in {free / 1e9:.0f} GB: some are computed again")
    if compute.device.type == "mps":
        return model
    if compute.device.type == "cpu":
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        if not shutil.which("g++") and not shutil.which("clang++") or not headers.exists():
            print0("no C++ compiler or no Python headers here: training runs uncompiled, about a third slower")
            return model
        # Else threads add up the gradients of the embeddings in an order that changes from run to run.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.compile(model, dynamic=False)


def choose_attention(model: torch.nn.Module, compute: Compute) -> None:
    """Try out what attends, for each of the model's windows. Not possible in a compiled graph or where activations are made again."""
    config = model.config
    for window in sorted({*model.window_sizes, -1}):
        choose(compute.device, compute.dtype, config.n_head, config.n_kv_head, config.n_embd // config.n_head, window)


# -----------------------------------------------------------------------------
# One step


class LossScale:
    """Dynamic loss scaling for float16 (arXiv:1710.03740, section 3.2): halved on overflow, doubled after 1000 good steps."""

    def __init__(self, scale: float = 2.0**15, good_steps: int = 0):
        self.scale, self.good_steps = scale, good_steps

    def unscale(self, params: list[torch.Tensor], compute: Compute) -> bool:
        """Divide the gradients by the scale. False when those of any rank overflowed: the step is to be skipped."""
        grads = [p.grad for p in params if p.grad is not None]
        finite = all(bool(torch.isfinite(g).all()) for g in grads)
        finite = compute.sum(torch.tensor(int(finite))) == compute.world_size
        if finite:
            if grads:  # a rank may have had nothing to learn from
                torch._foreach_div_(grads, self.scale)
            self.good_steps += 1
            if self.good_steps % 1000 == 0:
                self.scale *= 2
        else:
            self.scale, self.good_steps = self.scale / 2, 0
        return finite


def train_step(
    model, optimizer, batches, compute: Compute, loss_scale: LossScale | None = None, count: int | None = None
) -> torch.Tensor:
    """One update from the micro-batches of a step; returns the mean loss of their targets, in nats.

    `batches` are this rank's: a list of (inputs, targets), both (B, T), targets of -1 ignored. Every target
    token weighs the same, whichever micro-batch and rank it came in: losses are summed and divided by the
    number of targets on all ranks. Where there are none the step changes nothing and the loss is 0.
    `count` is that number, where it is known: without looking at the targets nothing here waits for a GPU.
    """
    if count is None:
        count = int(compute.sum(sum((targets >= 0).sum() for _, targets in batches)))
    if count == 0:
        return torch.zeros((), device=batches[0][0].device)
    losses = (model(inputs, targets, loss_reduction="sum") / count for inputs, targets in batches)
    return backward_and_step(losses, optimizer, compute, loss_scale)


def backward_and_step(losses: Iterable[torch.Tensor], optimizer, compute: Compute, loss_scale: LossScale | None = None) -> torch.Tensor:
    """One update by the gradient of the sum of `losses`, over all ranks; returns that sum.

    They are made one at a time, so that one micro-batch's activations are held. A rank may have none.
    """
    total = torch.zeros((), device=compute.device)
    for loss in losses:
        total = total + loss.detach()
        (loss * loss_scale.scale if loss_scale else loss).backward()
        compute.heartbeat()
    if loss_scale is None or loss_scale.unscale([p for group in optimizer.param_groups for _, p in group["params"]], compute):
        optimizer.step()
    optimizer.zero_grad()
    return compute.sum(total)


def set_rates(optimizer, step: int, progress: float, warmup_steps: int, warmdown: float, final: float) -> float:
    """Put the rates of step `step` into the groups; returns the learning-rate multiplier.

    `progress` in [0, 1] is the share of the run that is done; `warmdown` the share of the run
    over which the learning rate falls to `final` of its value.
    """
    lrm = lr_multiplier(step, progress, warmup_steps, warmdown, final)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lrm
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step, progress, warmdown)
            group["weight_decay"] = group["initial_weight_decay"] * weight_decay_multiplier(progress)
    return lrm


def due(step: int, every: int, last: bool = False) -> bool:
    """Whether something done `every` so many steps, and at the end, is due now; -1 is at the end only, 0 never."""
    return every != 0 and (last or (every > 0 and step > 0 and step % every == 0))


def rows_that_fit(model, compute: Compute, most: int) -> int:
    """Rows of whole context, a power of two up to `most`, that a pass and its gradients have memory for on every rank's GPU.

    Beside them must fit what a run keeps: gradients, the optimizer's state and, for a while, its update, three times
    the weights together. Tried uncompiled, which takes seconds, and with cheap things computed again.
    """
    rows = 1 << max(0, most.bit_length() - 1)
    if compute.device.type != "cuda":
        return min(8, rows)  # of a CPU's memory there is enough

    def attempt(rows: int) -> None:
        kept = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # and the gradients themselves
        idx = torch.randint(0, model.config.vocab_size, (rows, model.config.sequence_len), device=compute.device)
        try:
            model(idx, idx).backward()
            torch.cuda.synchronize(compute.device)
        finally:
            del kept
            model.zero_grad()
            compute.heartbeat()

    choose_attention(model, compute)
    model.recompute = True
    return min(compute.gather(largest_batch(attempt, rows)))


def saved_flag(directory: Path, args, name: str, compute: Compute):
    """A flag of the run that this one goes on with; None where it begins anew."""
    number = step_to_resume(directory, args, compute)
    return None if number is None else compute.on_main(lambda: verify(directory, number, names=[])["user_config"].get(name))


def largest_batch(attempt: Callable[[int], object], rows: int) -> int:
    """The most rows, halving from `rows`, for which `attempt(rows)` does not run out of a GPU's memory.

    Raises UserError where not even one row fits.
    """
    while rows:
        try:
            attempt(rows)
            return rows
        except torch.OutOfMemoryError:
            rows //= 2
        if torch.cuda.is_available():  # outside of the handler, whose traceback holds the tensors
            torch.cuda.empty_cache()
    raise UserError("not even one row fits this GPU's memory; use a smaller --depth or --max-seq-len")


class StopSignal:
    """SIGTERM and SIGINT ask the loop to stop after this step; a second SIGINT stops at once.

    >>> stop = StopSignal(compute)
    >>> while not stop.asked(): ...
    """

    def __init__(self, compute: Compute):
        self.compute, self.heard = compute, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number, frame):
        self.heard = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.compute.is_main:
            with suppress(OSError):  # not by print, in the midst of which the signal may have come
                os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving\n".encode())

    def asked(self) -> bool:
        """Whether any rank was asked: the same answer on all, so that they stop after the same step."""
        return bool(self.compute.sum(torch.tensor(int(self.heard))) > 0)


class Meter:
    """Smooths the loss, keeps time, and tells each step to the terminal, `metrics.jsonl` and wandb.

    `state` is what a resumed run hands back: the smoothed loss goes on where it was. On a GPU a step is told of
    when the next one is on its way, so that the GPU never waits for us to read its loss; `flush` before anything
    that is not training.
    """

    SMOOTHING = 0.9

    def __init__(
        self, compute: Compute, directory: Path, tokens_per_step: int, flops_per_token: int | None,
        wandb_run=None, state: dict | None = None,
    ):  # fmt: skip
        self.compute, self.wandb_run, self.steps = compute, wandb_run, 0
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak = peak_flops(compute.device)
        state = state or {"step": 0, "ema": 0.0, "weight": 0.0, "total_time": 0.0}
        self.ema, self.weight, self.total_time = state["ema"], state["weight"], state["total_time"]
        self.recent: list[float] = []  # the last step times, for the ETA
        self.lags = compute.device.type == "cuda"
        self.untold: tuple | None = None  # the step before this one, while that lags
        self.path = directory / "metrics.jsonl"
        if compute.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            self._keep_lines_until(state["step"])

    def _keep_lines_until(self, step: int) -> None:
        """Forget what a run logged after the checkpoint that it is resumed from."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() and step else []:
            with suppress(ValueError):  # the last one may be half of one
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(kept))
        aside.replace(self.path)

    def state(self, step: int) -> dict:
        return {"step": step, "ema": self.ema, "weight": self.weight, "total_time": self.total_time}

    def start(self) -> None:
        if self.untold is None:
            self.started = time.perf_counter()

    def stop(
        self, step: int, progress: float, loss: torch.Tensor, lrm: float, epoch: int, tokens: int | None = None, **values: float
    ) -> None:
        """Step number `step` is on its way: tell of it, and of more `values`, now or (on a GPU) at the next one.

        `tokens`: how many it took, where that differs from step to step. Raises UserError when a loss is not finite.
        """
        self.flush()
        self.untold = (step, progress, loss, lrm, epoch, tokens, values)
        if not self.lags:
            self.flush()

    def flush(self) -> None:
        """Wait for the last step and tell of it, if that has not been done."""
        if self.untold is not None:
            untold, self.untold = self.untold, None
            self._tell(*untold)

    def _tell(self, step, progress, loss, lrm, epoch, tokens, values) -> None:
        loss = loss.item()  # waits for the device, so from the end of one step to that of the next is a step's time
        now = time.perf_counter()
        dt, self.started = now - self.started, now
        self.steps += 1
        if self.steps == 2:  # the first compiles, which may take minutes
            self.compute.pulse.patience, self.compute.pulse.armed = 3 * dt, True
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {step} (learning-rate multiplier {lrm:.3f}); nothing was saved after the "
                "last good checkpoint. Resume from it with --resume-from-step latest and a lower learning rate"
            )
        self.total_time += dt
        self.recent = self.recent[-19:] + [dt]
        self.ema = self.SMOOTHING * self.ema + (1 - self.SMOOTHING) * loss
        self.weight = self.SMOOTHING * self.weight + (1 - self.SMOOTHING)  # 1 in the long run; divides the start's bias out
        smooth = self.ema / self.weight
        tok_per_sec = (tokens or self.tokens_per_step) / dt
        counted = self.peak and self.flops_per_token
        mfu = tok_per_sec * self.flops_per_token / (self.peak * self.compute.world_size) if counted else None
        typical = sorted(self.recent)[len(self.recent) // 2]
        eta = typical * step * (1 - progress) / progress if progress > 0 else 0.0
        self.log(step, loss=smooth, raw_loss=loss, lrm=lrm, dt=dt, tok_per_sec=tok_per_sec, mfu=mfu, epoch=epoch, **values)
        more = "".join(f"{name.replace('_', ' ')} {value:.3g} | " for name, value in values.items())
        print0(
            f"step {step:05d} ({100 * progress:.1f}%) | {more}loss {smooth:.4f} | lrm {lrm:.2f} | dt {1000 * dt:.0f} ms | "
            f"{tok_per_sec:,.0f} tok/s | mfu {'-' if mfu is None else f'{100 * mfu:.1f}%'} | epoch {epoch} | "
            f"total {self.total_time / 60:.1f} min | eta {eta / 60:.1f} min"
        )

    def finish(self) -> None:
        """The loop is over: what follows may take as long as it likes."""
        self.flush()
        self.compute.pulse.armed = False
        if self.wandb_run:
            self.wandb_run.finish()

    def log(self, step: int, **values) -> None:
        """One line of metrics.jsonl, and the same to wandb."""
        if self.compute.is_main:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **values, "total_time": self.total_time}) + "\n")
            except OSError as error:  # a full disk is no reason to stop: there may be room again
                print0(f"error: step {step} is missing in {self.path}: {error}")
        if self.wandb_run:
            self.wandb_run.log({**values, "total_time": self.total_time}, step=step)


# -----------------------------------------------------------------------------
# Saving and resuming


def save_training(saver: Saver, step, model, optimizer, tokenizer, args, meter, val_bpb, loader_state, loss_scale, measured) -> None:
    """Save all that a resumed run needs, in the background. Every rank calls this with its own loader state.

    `measured`: whether what was due at this step was measured, or is left to the run that is resumed.
    """
    meta = {
        "model_config": asdict(model.config),
        "model_tag": saver.directory.name,
        "tokenizer": tokenizer.fingerprint(),
        "user_config": vars(args),
        "val_bpb": val_bpb,
        "loader_state": loader_state,
        "loop_state": {
            "meter": meter.state(step),
            "measured": measured,
            "loss_scale": vars(loss_scale) if loss_scale else {},
        },
        "rng_state": rng_state(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    saver.save(step, model.state_dict(), optimizer.state_dict(), meta)


def resume_training(directory, args, model, optimizer, compute: Compute) -> dict | None:
    """Load what `--resume-from-step` names ("-1" none, "latest", or a number) into model and optimizer.

    Returns its meta, or None for a fresh start. Says which flags are not those of the saved run, since
    it then goes on differently. UserError when the checkpoint is of another model.
    """
    number = step_to_resume(directory, args, compute)
    if number is None:
        return None
    if step_folder(directory, number).is_dir():  # else it is in the reference's layout, and load_checkpoint says what to do
        ours, theirs = asdict(model.config), verify(directory, number, names=[])["model_config"]
        odd = ", ".join(f"{k} {theirs.get(k)} -> {v}" for k, v in ours.items() if theirs.get(k) != v)
        if odd:
            raise UserError(f"step {number} in {directory} is of another model ({odd}); give the same flags, or another --model-tag")
    model_state, optimizer_state, meta = load_checkpoint(directory, number, compute, optimizer.state_dict())
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    set_rng_state(meta["rng_state"])
    before = {**meta["user_config"], "resume_from_step": args.resume_from_step, "run": args.run}
    changed = [f"{name} {before[name]} -> {value}" for name, value in vars(args).items() if before.get(name, value) != value]
    if changed:
        print0(f"flags that differ from the saved run: {', '.join(changed)}")
    print0(f"resumed from step {number} in {directory}")
    return meta


def step_to_resume(directory: Path, args, compute: Compute) -> int | None:
    """The step that this run goes on from, the same on all ranks; None for a fresh start."""
    restarted = max(compute.gather(restarts())) > 0  # the nodes count apart
    return compute.on_main(lambda: _step_to_resume(directory, args.resume_from_step, restarted))


def _step_to_resume(directory: Path, wanted: str, restarted: bool) -> int | None:
    """The step that `--resume-from-step` means. After torchrun or Slurm has restarted the job: the newest that it saved."""
    if wanted not in ("-1", "latest") and not wanted.isdigit():
        raise UserError(f"--resume-from-step {wanted!r} is neither a step nor 'latest'")
    started = directory / "started"  # by which job, and when; what is older belongs to another run under the same tag
    job, began = (started.read_text().splitlines() if started.exists() else ["", "0"])[:2]
    if restarted and job == job_name():
        try:
            return find_last_step(directory, since=float(began))
        except UserError as error:
            print0(f"restarted, but {error}: beginning as at first, with --resume-from-step {wanted}")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        started.write_text(f"{job_name()}\n{time.time()}\n")
    if wanted == "-1":
        return None
    return find_last_step(directory) if wanted == "latest" else int(wanted)


def inherit(args, origin: dict) -> None:
    """Take every flag that was not given (None) from the run that made the model, whose meta is `origin`."""
    theirs = origin.get("user_config", {})
    for name, value in vars(args).items():
        if value is None and name not in ("model_tag", "model_step"):
            if theirs.get(name) is None:
                raise UserError(f"the model's checkpoint does not tell its {name}; give --{name.replace('_', '-')}")
            setattr(args, name, theirs[name])


def warm_start(optimizer, stage: str, origin: dict, compute: Compute) -> None:
    """Begin with the moments of the run that made the model, where it saved them: the first steps then know their scale."""
    state = error = None
    try:
        _, state, _ = load_checkpoint(
            checkpoint_dir(stage, origin["model_tag"]), origin["step"], compute, optimizer.state_dict()
        )
    except UserError as caught:
        error = caught
    errors = [error for error in compute.gather(error) if error is not None]
    if errors:  # on any rank: then all start alike
        print0(f"the optimizer starts cold: {errors[0]}")
    else:
        optimizer.load_state_dict(state)


def conversations_done(loader_state: dict, epochs: float) -> torch.Tensor:
    """(conversations used up, lanes that have not yet had all of theirs of the first `epochs` epochs), of this rank's lanes."""
    behind = sum(stream["next"][0] <= epochs for stream in loader_state["streams"].values())
    return torch.tensor([loader_state["finished"], behind])


def freeze_garbage() -> None:
    """Leave what exists now out of later collections: a full one in mid-step costs up to half a second."""
    gc.collect()
    gc.freeze()
