"""What all training scripts share: one gradient step, the meter, the stop signal, saving and resuming a run.

The loop itself (data, model, the order of events) is in the script of each stage, or in finetune.py for the two
that share it. There is no Trainer class.
"""

from __future__ import annotations

import base64
import gc
import math
import os
import platform
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat import report
from nanochat.checkpoint_manager import checkpoint_dir, find_last_step, list_steps, load_checkpoint, load_model
from nanochat.checkpoint_manager import load_optimizer, set_aside, update_meta, verify
from nanochat.common import Compute, UserError, base_dir_path, compute_cleanup, print0, restarts, wandb_run
from nanochat.cross_entropy import sample_vocabulary
from nanochat.device import fit_device_batch, peak_flops, peak_memory
from nanochat.optim import MuonAdamW
from nanochat.saver import Saver
from nanochat.schedule import batch_lr_scale, lr_multiplier, muon_momentum, weight_decay_multiplier

SMOOTHING = 0.9  # of the loss that is printed


def make_optimizer(model, settings: Namespace, lr_scale: float, short_run: float, weight_decay: float) -> MuonAdamW:
    """The optimizer with the learning rates of the flags times `lr_scale`, and those of matrices and embeddings times `short_run`."""
    names = ("embedding_lr", "unembedding_lr", "matrix_lr")
    rates = {name: getattr(settings, name) * lr_scale * short_run for name in names}
    rates["scalar_lr"] = settings.scalar_lr * lr_scale
    return MuonAdamW(model.param_groups(**rates, weight_decay=weight_decay))


# -----------------------------------------------------------------------------
# One step


class LossScale(torch.amp.GradScaler):
    """Loss scaling for float16 (arXiv:1710.03740, section 3.2); a step whose gradients overflow on any rank is skipped on all."""

    def __init__(self, compute: Compute):
        super().__init__(compute.device.type, init_scale=2.0**15, growth_interval=1000)
        self.compute = compute

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, True)  # our embeddings have float16 gradients
        return {device: self.compute.sum(overflows) for device, overflows in found.items()}


def train_step(
    model, optimizer, batches, compute: Compute, loss_scale: LossScale | None = None, count: int | None = None,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """One update from the micro-batches of a step; returns the mean loss over their targets, in nats.

    `batches` are this rank's (inputs, targets, ...), both (B, T), targets of -1 ignored. Every target weighs the same,
    whichever micro-batch and rank it belongs to. Without any target the step changes nothing and the loss is 0.
    `count` is the number of targets on all ranks where the caller knows it; then nothing here synchronises with a GPU.
    `importance` is of a sampled softmax, see `linear_cross_entropy`.
    """
    if count is None:
        count = int(compute.sum(sum((targets >= 0).sum() for _, targets, *_ in batches)))
    if count == 0:
        return torch.zeros((), device=batches[0][0].device)
    losses = (model(inputs, targets, loss_reduction="sum", importance=importance) / count for inputs, targets, *_ in batches)
    return backward_and_step(losses, optimizer, compute, loss_scale)


def sampled_softmax(batches, vocab_size: int, compute: Compute, seed: int, exact: bool = False) -> torch.Tensor:
    """The `importance` for a step's micro-batches: the same on all ranks, and however the step is cut into micro-batches."""
    if exact:
        return torch.ones(vocab_size)
    targets = torch.cat([targets.flatten() for _, targets, *_ in batches])
    counts = compute.sum(torch.bincount(targets[targets >= 0], minlength=vocab_size))
    return sample_vocabulary(counts > 0, seed)


def backward_and_step(
    losses: Iterable[torch.Tensor], optimizer, compute: Compute, loss_scale: LossScale | None = None
) -> torch.Tensor:
    """One update by the gradient of the sum of `losses` over all ranks; returns that sum.

    The losses are computed one at a time, so that only one micro-batch's activations are held. A rank may have none.
    """
    total = torch.zeros((), device=compute.device)
    for loss in losses:
        total = total + loss.detach()
        (loss_scale.scale(loss) if loss_scale else loss).backward()
        compute.heartbeat()
    if loss_scale:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # GradScaler needs a gradient to check
        loss_scale.unscale_(optimizer)
        loss_scale.step(optimizer)
        loss_scale.update()
    else:
        optimizer.step()
    optimizer.zero_grad()
    return compute.sum(total)


def set_rates(optimizer, step: int, progress: float, warmup_steps: int, warmdown: float, final: float) -> float:
    """Set the rates of step `step` in the parameter groups; returns the learning-rate multiplier.

    `progress` in [0, 1] is the share of the run that is done; for the others see `lr_multiplier`.
    """
    lrm = lr_multiplier(step, progress, warmup_steps, warmdown, final)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lrm
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step, progress, warmdown)
            group["weight_decay"] = group["initial_weight_decay"] * weight_decay_multiplier(progress)
    return lrm


def due(step: int, every: int, last: bool = False) -> bool:
    """Whether something done every `every` steps and at the end is due (-1: at the end only, 0: never)."""
    return every != 0 and (last or (every > 0 and step > 0 and step % every == 0))


# -----------------------------------------------------------------------------
# Around the steps


class StopSignal:
    """SIGTERM and SIGINT request a stop after the current step or evaluation batch; a second SIGINT stops at once.

    >>> stop = StopSignal(compute)
    >>> while not stop.requested(): ...
    """

    def __init__(self, compute: Compute):
        self.compute, self.received = compute, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.compute.is_main:
            with suppress(OSError):  # os.write, since print is not safe in a signal handler
                os.write(2, f"\n{signal.Signals(number).name}: stopping as soon as the state is saved\n".encode())

    def requested(self) -> bool:
        """Whether any rank has received a signal. A collective call: all ranks get the same answer."""
        return bool(self.compute.sum(torch.tensor(int(self.received))) > 0)


class Meter:
    """Smooths the loss, measures time, and reports each step to the terminal, `metrics.jsonl` and wandb.

    `state` is saved in checkpoints: the loss's moving average with the sum of its weights, seconds of training, and the
    size of metrics.jsonl after the last step, to which it is cut back when a run resumes. On a GPU a step is reported
    after the next one has been launched, so that the GPU never waits for its loss to be read; call `flush` before
    anything that is not training.
    """

    def __init__(
        self, compute: Compute, directory: Path, tokens_per_step: int, flops_per_token: int | None,
        wandb_run=None, state: dict | None = None,
    ):  # fmt: skip
        self.compute, self.wandb_run = compute, wandb_run
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak = peak_flops(compute.device)
        self.state = state or {"ema": 0.0, "weight": 0.0, "total_time": 0.0, "log_size": 0}
        self.recent: list[float] | None = None  # the last step times, for the ETA, without the first, which compiles
        self.lags = compute.device.type == "cuda"
        self.pending: tuple | None = None  # the step that is not reported yet
        self.path = directory / "metrics.jsonl"
        if compute.is_main:
            directory.mkdir(exist_ok=True)
            with open(self.path, "ab") as file:  # remove what was logged after the checkpoint
                file.truncate(min(self.state["log_size"], file.tell()))

    def start(self) -> None:
        if self.pending is None:
            self.started = time.perf_counter()

    def stop(
        self, step: int, progress: float, loss: torch.Tensor, lrm: float, epoch: int,
        tokens: int | None = None, **values: float,
    ) -> None:  # fmt: skip
        """Report step number `step` and further `values`, at once or (on a GPU) when the next step has been launched.

        `tokens`: of this step, where their number varies. Raises UserError when a loss is not finite.
        """
        self.flush()
        self.pending = (step, progress, loss, lrm, epoch, tokens, values)
        if not self.lags:
            self.flush()

    def flush(self) -> None:
        """Wait for the last step and report it, if it has not been reported."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._report(*pending)

    def _report(self, step, progress, loss, lrm, epoch, tokens, values) -> None:
        loss = loss.item()  # waits for the device, so dt lasts from the end of one step to the end of the next
        now = time.perf_counter()
        dt, self.started = now - self.started, now
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {step} (learning-rate multiplier {lrm:.3f}); "
                "resume from the last good checkpoint with --resume-from-step latest and a lower learning rate"
            )
        self.recent = [] if self.recent is None else self.recent[-19:] + [dt]
        state = self.state
        state["total_time"] += dt
        # Exponential moving average; its weight tends to 1 and removes the bias towards the initial 0
        state["ema"] = SMOOTHING * state["ema"] + (1 - SMOOTHING) * loss
        state["weight"] = SMOOTHING * state["weight"] + (1 - SMOOTHING)
        smooth = state["ema"] / state["weight"]

        tok_per_sec = (tokens or self.tokens_per_step) / dt
        known = self.peak and self.flops_per_token
        mfu = tok_per_sec * self.flops_per_token / (self.peak * self.compute.world_size) if known else None
        median = sorted(self.recent)[(len(self.recent) - 1) // 2] if self.recent else math.nan
        eta = median * step * (1 - progress) / progress if progress > 0 else math.nan
        usage = {"tok_per_sec": tok_per_sec, "mfu": mfu, "peak_memory": peak_memory(self.compute.device)}
        self.log(step, loss=smooth, raw_loss=loss, lrm=lrm, dt=dt, epoch=epoch, **usage, **values)
        if self.path.exists():
            state["log_size"] = self.path.stat().st_size
        more = "".join(f"{name.replace('_', ' ')} {value:.3g} | " for name, value in values.items())
        print0(
            f"step {step:05d} ({100 * progress:.1f}%) | {more}loss {smooth:.4f} | lrm {lrm:.2f} | dt {1000 * dt:.0f} ms | "
            f"{tok_per_sec:,.0f} tok/s | mfu {'-' if mfu is None else f'{100 * mfu:.1f}%'} | epoch {epoch} | "
            f"total {state['total_time'] / 60:.1f} min | eta {'-' if math.isnan(eta) else f'{eta / 60:.1f} min'}"
        )

    def log(self, step: int, **values) -> None:
        """Append one line to metrics.jsonl and send the same to wandb. A full disk or a failing wandb does not end the run."""
        values["total_time"] = self.state["total_time"]
        try:
            if self.compute.is_main:
                report.append(self.path, {"step": step, **values})
            if self.wandb_run:
                self.wandb_run.log(values, step=step)
        except Exception as error:  # wandb has many kinds
            print0(f"error: step {step} is missing in {self.path} or in wandb: {error}")


# -----------------------------------------------------------------------------
# A run: starting it from another stage's model, saving, resuming, finishing


def load_origin(args: Namespace, compute: Compute) -> tuple:
    """(model, optimizer, tokenizer, settings, meta) of the checkpoint that a later stage starts from.

    Settings are the flags, completed from that checkpoint; the optimizer's rates are scaled for their batch size.
    """
    model, tokenizer, origin = load_model(args.stage, compute, args.model_tag, args.model_step)
    settings = inherit(args, origin)
    if settings.device_batch_size == -1:
        settings.device_batch_size = fit_device_batch(model, compute, settings.total_batch_size)
    lr_scale = batch_lr_scale(settings.total_batch_size) * args.init_lr_frac
    return model, make_optimizer(model, settings, lr_scale, settings.short_run, args.weight_decay), tokenizer, settings, origin


def inherit(args: Namespace, origin: dict) -> Namespace:
    """`args` with every flag that was not given (None) taken from the run that trained the model; its meta is `origin`."""
    saved, settings = origin.get("user_config", {}), Namespace(**vars(args))
    for name, value in vars(args).items():
        if value is None and name not in ("model_tag", "model_step"):
            if not isinstance(saved.get(name), (int, float)) or not 0 <= saved[name] < math.inf:
                raise UserError(f"the model's checkpoint does not record its {name}; give --{name.replace('_', '-')}")
            setattr(settings, name, saved[name])
    settings.short_run, settings.examples = saved.get("short_run", 1.0), saved.get("examples", [])
    return settings


class Run:
    """The state of a training run besides its model: `step`, `val_bpb`, `loader_state`, checkpoints, meter, stop signal.

    `settings` are the flags with what was derived from them. If they name a step to resume from, everything is loaded
    from its checkpoint; else the optimizer starts with the state in the checkpoint `origin` of a previous stage, if any.
    Every rank calls all methods.

    >>> run.start()
    >>> while not run.save_if_due(last=run.step == 100):
    ...     run.measure("val bpb", evaluate)
    ...     run.step += 1
    """

    def __init__(self, stage: str, tag: str, model, optimizer, tokenizer, settings: Namespace, compute: Compute, origin=None):
        self.stage, self.settings, self.compute = stage, settings, compute
        self.model, self.optimizer, self.tokenizer = model, optimizer, tokenizer
        self.directory = checkpoint_dir(stage, tag)
        self.saver = Saver(self.directory, compute, settings.keep_last)
        saved = resume(self.directory, settings, model, optimizer, tokenizer, compute)
        if saved is None:
            saved = {"step": 0, "val_bpb": None, "loader_state": None, "loop_state": {}}
            if origin:
                warm_start(optimizer, settings.stage, origin, compute)
        self.step = self.saved_step = saved["step"]
        self.val_bpb, self.loader_state, self.loop_state = saved["val_bpb"], saved["loader_state"], saved["loop_state"]
        self.loss_scale = LossScale(compute) if compute.dtype == torch.float16 else None
        if self.loss_scale and self.loop_state.get("loss_scale"):
            self.loss_scale.load_state_dict(self.loop_state["loss_scale"])
        self.failures: list[str] = []  # what failed beside the training

    def start(self) -> None:
        """Everything is built: from here on the run writes into its folder, and signals request a stop.

        What an earlier run left under this tag, or later checkpoints than the one to resume from, are moved to TAG.old, so
        that "latest" always belongs to this run. The present objects are left out of garbage collections, of which a full
        one takes up to half a second of a step.
        """
        settings = self.settings
        loop = self.loop_state
        project = "nanochat" if self.stage == "base" else f"nanochat-{self.stage}"
        wandb = wandb_run(project, settings.run, vars(settings), loop.get("wandb_id"))
        after = self.step or None
        if settings.resume_from_step != "latest" and (old := self.compute.on_main(lambda: set_aside(self.directory, after))):
            print0(f"moved {'the checkpoints of later steps' if after else 'the earlier run under this tag'} to {old}")
        flops = None if self.stage == "rl" else self.model.estimate_flops()  # sampling costs more than the update
        self.meter = Meter(self.compute, self.directory, settings.total_batch_size, flops, wandb, loop.get("meter"))
        self.stop = StopSignal(self.compute)
        gc.collect()
        gc.freeze()

    def save_if_due(self, last: bool) -> bool:
        """Save where --save-every, the end or a requested stop demands it; returns whether a stop is requested."""
        stopping = self.stop.requested()
        if self.step > self.saved_step and (stopping or due(self.step, self.settings.save_every, last)):
            self.meter.flush()
            self._save()
            self.saved_step = self.step
        return stopping

    def _save(self) -> None:
        """Save everything that a resumed run needs, in the background."""
        wandb = self.meter.wandb_run
        meta = {
            "model_config": asdict(self.model.config),
            "model_tag": self.directory.name,
            "tokenizer": self.tokenizer.fingerprint(),
            "user_config": vars(self.settings),
            "val_bpb": self.val_bpb,
            "loader_state": self.loader_state,
            "loop_state": {
                "meter": dict(self.meter.state),  # a copy, since it is written while training continues
                "loss_scale": self.loss_scale.state_dict() if self.loss_scale else None,
                "wandb_id": wandb.id if wandb else None,
            },
            "rng_state": {"cpu": base64.b64encode(torch.get_rng_state().numpy()).decode()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        self.saver.save(self.step, self.model.state_dict(), self.optimizer.state_dict(), meta, self.tokenizer)

    def measure(self, what: str, evaluate: Callable[[], dict | None]) -> dict:
        """The numbers that `evaluate()` returns, logged and printed, except for those that are None since it was stopped."""
        self.meter.flush()
        values = {name: value for name, value in (self.attempt(what, evaluate) or {}).items() if value is not None}
        if values:
            self.val_bpb = values.get("val_bpb", self.val_bpb)
            self.meter.log(self.step, **values)
            shown = " | ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            print0(f"step {self.step:05d} | {shown}")
        return values

    def attempt(self, what: str, work: Callable):
        """The result of `work()`. If it fails, that costs one line and the exit code, but never ends the run."""
        try:
            return work()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print0(f"error: {what} failed ({reason}); the run continues")
            self.failures.append(what)

    def finish(self, complete: bool, title: str, entry: dict) -> None:
        """Wait for the last save, add `entry` to the report if the run is complete, and leave. UserError if something failed."""

        def conclude() -> None:
            update_meta(self.directory, self.step, val_bpb=self.val_bpb)  # the last evaluation came after the save
            metrics, minutes = self.meter.path.relative_to(base_dir_path()), self.meter.state["total_time"] / 60
            report.log(title, {"stage": self.stage, "model tag": self.directory.name, "steps": self.step, **entry,
                               "training minutes": minutes, "metrics": str(metrics)})  # fmt: skip

        self.saver.wait()
        if complete:
            self.attempt("the report", lambda: self.compute.on_main(conclude))
        else:
            print0(f"stopped after step {self.step}; continue with the same flags and --resume-from-step=latest")
        self.saver.close()
        if self.meter.wandb_run:
            self.attempt("wandb", self.meter.wandb_run.finish)
        compute_cleanup(self.compute)
        if self.failures:
            raise UserError(f"the model is saved in {self.directory}, but these failed: {', '.join(self.failures)}")


def step_to_resume(directory: Path, requested: str, restarted: bool) -> int | None:
    """The step to resume from, or None for a new run. The only place that decides this.

    `requested` is --resume-from-step. A job that torchrun or Slurm has restarted resumes from its last checkpoint.
    """
    if requested == "latest" or restarted and list_steps(directory):
        return find_last_step(directory)
    return None if requested == "-1" else verify(directory, int(requested), names=[])["step"]


def resume(directory: Path, settings: Namespace, model, optimizer, tokenizer, compute: Compute) -> dict | None:
    """Load what `--resume-from-step` names into model and optimizer; returns its meta, or None for a new run.

    Raises UserError when the model, the tokenizer, or what determines the order of the data differs.
    """
    restarted = max(compute.gather(restarts())) > 0  # counted by node
    step = compute.on_main(lambda: step_to_resume(directory, settings.resume_from_step, restarted))
    if step is None:
        return None
    saved, now, place = verify(directory, step, names=[]), vars(settings), f"step {step} in {directory}"
    try:
        before, meter = saved["user_config"], saved["loop_state"]["meter"]
        earlier = {**asdict(type(model.config)(document_start=model.config.document_start)), **saved["model_config"]}
        changed = [
            differences(earlier, asdict(model.config)),
            differences(saved, {"tokenizer": tokenizer.fingerprint()}),
            differences(before, {name: now[name] for name in ("total_batch_size", "max_seq_len")}),
        ]
        rng_state = bytearray(base64.b64decode(saved["rng_state"]["cpu"]))
        torch.set_rng_state(torch.frombuffer(rng_state, dtype=torch.uint8))
        sum(meter[name] for name in ("ema", "weight", "total_time", "log_size"))  # all are numbers
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{place} cannot be resumed: meta.json is damaged: {error!r}") from error
    if any(changed):
        changed = ", ".join(filter(None, changed))
        raise UserError(f"{place} is of another run ({changed}); give the same flags, or another --model-tag")

    model_state, meta = load_checkpoint(directory, step, compute)
    model.load_state_dict(model_state)
    optimizer.load_state_dict(load_optimizer(directory, step, optimizer.state_dict(), compute.rank))
    if changed := differences(before, now, ignored=("resume_from_step", "run", "device_batch_size", "examples")):
        print0(f"flags that differ from the saved run: {changed}")
    print0(f"resumed from {place}")
    return meta


def differences(before: dict, now: dict, ignored: tuple = ()) -> str:
    """What differs between two configs: {"depth": 4} and {"depth": 6} -> "depth 4 -> 6"."""
    changed = [name for name, value in now.items() if name not in ignored and before.get(name) != value]
    return ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)


def warm_start(optimizer, stage: str, origin: dict, compute: Compute) -> None:
    """Start with the optimizer state of the run that trained the model, where it was saved."""
    directory, states = checkpoint_dir(stage, origin["model_tag"]), []

    def load() -> None:
        states.append(load_optimizer(directory, origin["step"], optimizer.state_dict(), compute.rank))

    try:
        compute.on_every_rank(load)  # on all ranks, or on none
        optimizer.load_state_dict(states[0])
    except UserError as error:
        print0(f"starting with a new optimizer state: {error}")
