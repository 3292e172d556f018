"""The one training loop: optimizer, schedule, precision, ranks, non-finite steps, checkpoints, exact resume, logs, signals."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from mapet import distributed
from mapet.config.base import write_config
from mapet.config.shared import TrainerConfig
from mapet.data.dataset import Batch, EpochBatchSampler, UnreadableImages
from mapet.data.loader import load
from mapet.device import ComputeContext
from mapet.errors import Interrupted, MapetError, option, pluralize
from mapet.run_state import CONFIG_FILE, record
from mapet.signals import StopRequest, stop_signals
from mapet.training import checkpoint
from mapet.training.metrics import LossMonitor, MetricLogger, ProgressDisplay
from mapet.training.run_folder import RunFolder, check_trackers_installed, command_to_resume, resolve_resume_config
from mapet.training.sharding import apply_fsdp, full_state_dict, full_tensor
from mapet.training.step import (
    ConstantLRScheduler,
    ForwardBackward,
    auto_compile,
    create_optimizer,
    create_scheduler,
)
from mapet.training.task import LossModule, M, R, Task, merge_outputs
from mapet.training.time_budget import TimeBudget

log = logging.getLogger("mapet")
T = TypeVar("T")
MAX_AUTO_LOG_INTERVAL = 50
"""Most steps between lines of metrics if `log_interval` is automatic."""
KEEP_CHECKPOINTS = 2
"""Newest checkpoints that are kept."""
MAX_SKIPPED_STEPS = 5
"""Steps in a row that may be skipped because of a NaN or infinite loss or gradient; then the run rolls back or stops."""


class Trainer(Generic[M, R]):
    """Trains a task as its config says, on all ranks together.

    Attributes:
        step: steps that are done; while a step runs, its index from 0.
        total_steps, steps_per_epoch: of the run; every epoch has as many, but the last one has fewer if `epochs` has a fraction.
        checkpoints: OUT/checkpoints, the folder of the run's checkpoints; None in a run without the option `out`, which saves none.
        num_rollbacks: how often the run went back to an earlier checkpoint's weights because of NaN or Inf.
        stateful: objects with a state dict that checkpoints hold beside model and optimizer, by name.
        folder: writes metrics and log of a run; None on ranks other than 0 and without `out`.
        budget: corrects the number of steps in a run with the option `max_minutes`; None in others.
        stop: its `signal_name` names the signal that asked this process to stop; '' while none has.
        forward_backward: computes losses and gradients in micro-batches; made by `fit`.
        metrics, monitor, display: add up metrics; warn about NaN, Inf and loss spikes; show progress.
    """

    def __init__(self, task: Task[Any, M, R], config: TrainerConfig) -> None:
        """Build the task, its optimizer and schedule; a collective call.

        Args:
            task: not built yet: `task.build` opens its data and builds its model here.
            config: as the user gave it. With `resume` the values of the run's config.yaml replace it, except for options that may
                change. Afterwards `task.config` holds the final config, in which no automatic value (None) is left.

        Raises:
            MapetError: an option does not fit the data or this machine, or the run cannot be resumed with this config.
        """
        check_trackers_installed(config.track)
        self.task, self.step, self.num_rollbacks = task, 0, 0
        self.auto_micro_batch = config.micro_batch_size is None  # a resumed run may then take that of its checkpoint
        if config.resume and config.out:
            config = resolve_resume_config(config, task.command)
            distributed.barrier()  # all ranks have read the folder before rank 0 writes to it
        self.compute = ComputeContext.from_options(config.device, config.precision)
        task.build(config, self.compute)
        if config.out:  # that checkpoints are kept in
            task.hashes |= {"image_contents_hash": task.dataset.images.content_hash}
        ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        self.sampler = EpochBatchSampler(task.indices, task.config.batch_size, config.epochs, config.seed, **ranks)
        self.total_steps, self.steps_per_epoch = self.sampler.total_steps, self.sampler.steps_per_epoch
        if config.fsdp:
            apply_fsdp(task.model, self.compute)
        task.config = task.config.model_copy(update=self._auto_values(task.config))
        options = {"layer_decay": task.layer_decay, "betas": task.betas}
        self.optimizer = create_optimizer(task.model, config.opt, task.config.lr, config.weight_decay, **options)
        warmup_steps = round(task.config.warmup_epochs * self.steps_per_epoch)
        self.schedule = create_scheduler(self.optimizer, self.total_steps, warmup_steps, config.min_lr, config.schedule)
        self.metrics, self.monitor = MetricLogger(task), LossMonitor(task.dataset.images)
        self.stateful = task.stateful | {"metrics": self.metrics, "monitor": self.monitor}
        self.checkpoints = task.config.out and task.config.out / "checkpoints"
        is_option = "max_unreadable" not in type(config).file_only
        task.unreadable = UnreadableImages(
            task.dataset.images, config.max_unreadable, dict(task.known_unreadable), is_option
        )

    def _auto_values(self, config: TrainerConfig) -> dict[str, Any]:
        """Return values for automatic options: `micro_batch_size`, `lr`, `warmup_epochs` and `log_interval` if None, `precision` if 'auto'.

        The learning rate is the task's `base_lr` at a batch of `base_batch_size`, and grows with the square root of the batch,
        which is Adam's rule (Malladi et al., arXiv 2205.10287); SGD's linear one would make small batches learn too slowly. It is at
        least `min_auto_lr`. The warm-up is the fraction `warmup_fraction` of the epochs. A log line has at most
        `MAX_AUTO_LOG_INTERVAL` steps, and an epoch has at least `logs_per_epoch` lines if it has that many steps.

        Args:
            config: of the task, with a resolved `batch_size`: images per step, of all ranks together.

        Returns:
            Option name -> value, for the automatic options alone. `micro_batch_size` is per rank, `log_interval` is in steps.
        """
        task, batch_size, num_images = self.task, config.batch_size, len(self.task.indices)
        assert batch_size is not None  # `task.build` resolved it
        if batch_size > num_images:
            log.warning(
                f"{option('batch_size')} {batch_size:,} is more than the {pluralize(num_images, 'image')} to train on: every step takes all "
                f"{num_images:,}, as the automatic learning rate assumes. For more steps per epoch omit this option or lower its value"
            )
        local_batch_size = -(-batch_size // distributed.world_size())
        lr = max(task.min_auto_lr, task.base_lr * math.sqrt(min(batch_size, num_images) / task.base_batch_size))
        auto = {
            "micro_batch_size": task.auto_micro_batch(local_batch_size),
            "lr": lr,
            "warmup_epochs": config.epochs * task.warmup_fraction,
            "precision": self.compute.precision,
            "log_interval": min(MAX_AUTO_LOG_INTERVAL, -(-self.steps_per_epoch // task.logs_per_epoch)),
        }
        return {name: value for name, value in auto.items() if getattr(config, name) in (None, "auto")}

    def fit(self) -> R:
        """Train from the first step, or from the newest checkpoint if `resume` is set; a collective call.

        In order: open the run folder, resume, initialize the task (`start`) in a new run, compile, run all steps, check that the trained
        model is finite, evaluate and save it (`finish`).

        Returns:
            What `task.finish` returns; None on ranks other than 0.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint is saved. Only in runs with the option `out`, which catch signals.
            NonFiniteError: too many steps in a row had a NaN or infinite loss or gradient, or the trained model has NaN or infinite
                weights or outputs, and is therefore not saved.
            MapetError: the folder, the checkpoint, the images or an option are not as needed.
        """
        task, config = self.task, self.task.config
        self.folder = RunFolder.open(config, self.compute)
        with self.folder or nullcontext(), stop_signals() if config.out else nullcontext(StopRequest()) as self.stop:
            if config.resume and config.out:
                self._resume()
            self._log_start()
            if self.step == 0:
                on_rank_zero(task.start)
            if auto_compile(config.compile, self.compute, self.total_steps, task.same_shapes):
                task.model.compile()
            micro_batch = task.config.micro_batch_size  # `_resume` may have lowered it
            self.forward_backward = ForwardBackward(LossModule(task), self.compute, micro_batch, task.same_shapes)
            self._loop()
            # Rank 0 decides, as the others get None; all of them must raise.
            (unusable,) = any_rank(self._call_with_product(lambda module: not task.is_usable(module)) or False)
            if unusable:
                problem = "the trained model has NaN or infinite weights or outputs: it is not saved"
                self._raise_nonfinite(problem, has_finite_checkpoint=False)
            return self._call_with_product(task.finish)  # type: ignore[return-value]  # None on other ranks

    def _log_start(self) -> None:
        """Log the run in one line, and record this line, counts and hashes of its inputs, and the task's `facts` in OUT/run.json."""
        task, config, world_size = self.task, self.task.config, distributed.world_size()
        ranks = f" on {world_size} processes" if world_size > 1 else ""
        text = f"{task.description}, batch {config.batch_size}{ranks}, lr {config.lr:.2g}, {config.epochs:g} epochs"
        counts = {
            "images": len(task.dataset.images),
            "unreadable": len(task.known_unreadable),
            "total_steps": self.total_steps,
        }
        hashes = {name.removesuffix("_hash"): digest for name, digest in task.hashes.items()}
        record(config.out, description=text, counts=counts, hashes=hashes, results=task.facts)
        log.info("%s, %s", text, self.compute)

    def _resume(self) -> None:
        """Load the newest intact checkpoint, if there is one, and drop the metrics after it; a collective call.

        It sets `step`, the first step of the sampler, `num_rollbacks`, and the state of model, optimizer and `stateful`. An automatic
        micro-batch size becomes that of the checkpoint, which the run may have lowered to fit its memory.

        Raises:
            MapetError: there are checkpoints but none is intact, the newest is of other inputs (OtherInputsError) or of a newer mapet
                (NewerFormatError), or ranks have read different ones.
        """
        task, folder = self.task, self.checkpoints
        if checkpoint.checkpoints(folder):
            state = checkpoint.load_checkpoint(folder, task.model, self.optimizer, task.hashes, **self.stateful)
            self.step = self.sampler.first_step = state["step"]
            self.num_rollbacks = state.get("num_rollbacks", 0)
            distributed.check_same(self.step, folder)
            if distributed.rank() == 0:
                checkpoint.remove_newer(folder, self.step)
            if self.auto_micro_batch and state.get("micro_batch"):
                task.config = task.config.model_copy(update={"micro_batch_size": state["micro_batch"]})
        if self.folder:
            self.folder.truncate_metrics(self.step)
        log.info("resumed at step %d of %d", self.step, self.total_steps)

    def _loop(self) -> None:
        """Train from `step` to `total_steps`; after each step log, evaluate and save a checkpoint if they are due; a collective call.

        Metrics are logged in equal parts of an epoch of at most `log_interval` steps, and the task may evaluate at the end of each epoch.
        With `out`, a checkpoint is saved every `checkpoint_interval_min` minutes, after the last step, and on a stop signal; see
        `_save_if_due`. `step` is the number of steps that are done.

        Raises:
            Interrupted: a signal asked to stop before the last step; a checkpoint is saved.
            NonFiniteError: too many steps in a row had a NaN or infinite loss or gradient.
            MapetError: too many images are unreadable, memory does not suffice for one image, or a checkpoint cannot be written.
        """
        self._saved_at = time.monotonic()
        self.budget = TimeBudget.open(self.task.config, self.step)
        loader = load(self.task.dataset.batch, self.sampler, pin_memory=self.compute.device.type == "cuda")
        with ProgressDisplay(self.task, self.total_steps, self.step) as self.display:
            for batch in self.metrics.time_data(self._saved_if_none_come(loader)):
                self._train_step(batch)
                self.step += 1
                self.display.update()
                if self.budget and (num_steps := self.budget.correct(self.step, self.total_steps)):
                    self._set_total_steps(num_steps)
                if self._epoch_ended or is_log_step(self.step, self.steps_per_epoch, self.task.config.log_interval):
                    self._log_metrics()
                if self._epoch_ended:
                    self._evaluate(math.ceil(self.step / self.steps_per_epoch))
                if self.checkpoints:
                    self._save_if_due()
                if self.step == self.total_steps:  # the loader may have read further, as it is ahead
                    break

    def _saved_if_none_come(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; save a checkpoint where none comes, as of a share that is away, unless other ranks wait for this one."""
        try:
            yield from loader
        except (MapetError, RuntimeError):  # torch raises this one for a dead worker
            if self.checkpoints and distributed.world_size() == 1:
                self._save()
            raise

    def _set_total_steps(self, num_steps: int) -> None:
        """Change the number of steps of the run, everywhere it is used, also in config.yaml; learning rates so far do not depend on it."""
        assert isinstance(self.schedule, ConstantLRScheduler)
        num_steps = max(num_steps, self.schedule.warmup_steps + 1)
        self.total_steps = self.schedule.total_steps = num_steps
        epochs = self.sampler.epochs = num_steps / self.steps_per_epoch
        self.display.set_total(num_steps)
        task = self.task
        task.config = task.config.model_copy(update={"epochs": epochs})
        record(task.config.out, config=task.config, counts={"total_steps": num_steps})
        if self.folder:
            write_config(task.config, self.folder.path / CONFIG_FILE)
        log.info("%s steps in all, to keep to the time: %.1f epochs", f"{num_steps:,}", epochs)

    @property
    def _epoch_ended(self) -> bool:
        """Return whether `step` is the last one of an epoch or of the run."""
        return self.step % self.steps_per_epoch == 0 or self.step == self.total_steps

    def _train_step(self, batch: Batch) -> None:
        """Make step `self.step` (from 0) with this rank's part of the batch; a collective call.

        In order: exchange unreadable images; set the seed and the learning rate; forward and backward pass; optimizer, unless the
        gradient is NaN or infinite; the task's `after_step`; metrics. If no rank could read any of its images, only the first is done.

        Args:
            batch: as `ViewDataset` made it: the images of this rank that could be read (perhaps none), and in `unreadable` the
                (image index, reason) pairs of the others.

        Raises:
            MapetError: more images are unreadable than `max_unreadable` allows, memory does not suffice for one image, or a rank is lost.
            RuntimeError: memory does not suffice, and other ranks wait already; see `ForwardBackward`.
        """
        task, step, local_images = self.task, self.step, len(batch)
        # For each rank: the number of its images that could be read, and that could not.
        counts, num_unreadable = distributed.all_gather(torch.tensor([local_images, len(batch.unreadable)])).T.tolist()
        for unreadable in distributed.all_gather_object(batch.unreadable) if any(num_unreadable) else []:
            task.unreadable.add(unreadable)
        if not sum(counts):
            return
        torch.manual_seed(step_seed(task.config.seed, step))  # so that random draws depend on run seed and step alone
        self.schedule.step_update(step)
        fraction = local_images / sum(counts)  # of the step's images that this rank has: the weight of its loss
        if not local_images:  # this rank computes a black image with weight 0, as others wait for its gradient
            batch = task.dataset.placeholder(int(task.indices[0]))
        outputs = self.forward_backward(task.prepare(batch, step), step, fraction=fraction)
        max_norm = task.config.clip_grad or math.inf
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(task.model.parameters(), max_norm)).detach()
        self._update(norm)
        output = merge_outputs(outputs, fraction)
        sums: dict[str, Tensor] = {}
        # Reading `norm` makes the CPU wait for the device, so it is read only if the task's class has an `after_step` of its own.
        if type(task).after_step is not Task.after_step and bool(norm.isfinite()):
            rows = {name: gather_rows(value, counts) for name, value in output.rows.items()}  # of all ranks
            with torch.no_grad():
                sums = task.after_step(output._replace(rows=rows), step)
        self.metrics.add(output, norm, batch.image_index, local_images, sums)

    def _update(self, norm: Tensor) -> None:
        """Make an optimizer step unless the gradient's norm is NaN or infinite, and clear the gradient (set it to None) in any case.

        Fused optimizers of PyTorch skip a step on the device if their attribute `found_inf` is 1; for other optimizers the CPU waits
        for the norm.

        Args:
            norm: norm of the whole gradient, a scalar on the device, the same on all ranks.
        """
        fused = self.optimizer.defaults.get("fused")
        if fused:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        if fused or bool(norm.isfinite()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _log_metrics(self) -> None:
        """Log the metrics of the steps since the last call, and warn about skipped steps and loss spikes; a collective call.

        The metrics go to the run folder, if there is one, and to the display. Nothing is logged if none of these steps had a readable image.
        After `MAX_SKIPPED_STEPS` skipped steps in a row the run goes back to an earlier checkpoint or stops: see `_roll_back_or_stop`.

        Raises:
            NonFiniteError: the run stops.
        """
        window = self.metrics.compute_and_reset()
        if not window.losses:
            return
        # With layer decay the last parameter group has the full learning rate.
        epoch, lr = self.step / self.steps_per_epoch, self.optimizer.param_groups[-1]["lr"]
        metrics = window.metrics | {"epoch": epoch, "lr": lr}
        if self.folder:
            self.folder.log_metrics(self.step, metrics)
        self.display.log_metrics(metrics, epoch_ended=self._epoch_ended)
        self.monitor.update(window, self.step)
        if self.monitor.consecutive_skipped >= MAX_SKIPPED_STEPS:
            self._roll_back_or_stop()

    def _roll_back_or_stop(self) -> None:
        """Load weights and optimizer from before the skipped steps, and continue with the next images; a collective call.

        The newest checkpoint from before the skipped steps is loaded into model, optimizer and the task's `stateful`; step, schedule and
        metrics continue as they are. The rolled-back state is saved as the checkpoint of this step.

        Raises:
            NonFiniteError: there is no such checkpoint, or the option `max_rollbacks` allows no further rollback.
            MapetError: the checkpoint is damaged, or the new one cannot be written.
        """
        num_skipped, task = self.monitor.consecutive_skipped, self.task
        saved = checkpoint.checkpoints(self.checkpoints) if self.checkpoints else []  # newest first
        intact = [path for path in saved if checkpoint.checkpoint_step(path) <= self.step - num_skipped]
        if self.num_rollbacks == task.config.max_rollbacks or not intact:
            self._raise_nonfinite(f"NaN or infinite loss or gradient in {num_skipped} steps in a row", bool(intact))
        state = checkpoint.load_checkpoint(intact[0], task.model, self.optimizer, **task.stateful)
        self.num_rollbacks, self.monitor.consecutive_skipped = self.num_rollbacks + 1, 0
        text = "rolled back to the weights of step %d after %d skipped steps in a row; training continues with the images of step %d"
        log.warning(text, state["step"], num_skipped, self.step + 1)
        self._save()

    def _raise_nonfinite(self, problem: str, has_finite_checkpoint: bool) -> NoReturn:
        """Save a debug bundle (weights and image ids, for `mapet debug-step`) and raise NonFiniteError; a collective call.

        The bundle is of the steps skipped last, or of the last step if it was not skipped; there is none in a run without `out`.

        Args:
            problem: first sentence of the message, without its full stop.
            has_finite_checkpoint: whether the newest checkpoint is from before the problem, so that the message may suggest its weights.
        """
        count = max(1, self.monitor.consecutive_skipped)
        bundle = checkpoint.save_debug_bundle(self.task, self.sampler, self.step, count) if self.checkpoints else None
        raise checkpoint.NonFiniteError(problem, bundle, self.task.config, has_finite_checkpoint)

    def _evaluate(self, epoch: int) -> None:
        """Call `task.evaluate` with the product module, and log the scores; a collective call.

        A MapetError of the evaluation becomes a warning, as training can continue without scores. `images_per_second` does not count
        this time.

        Args:
            epoch: that has ended, counted from 1. The task returns {} if this epoch is not evaluated.
        """

        def evaluate(module: M) -> dict[str, float]:
            """Return the task's scores after `epoch`; {} with a warning if the evaluation fails."""
            try:
                return self.task.evaluate(module, epoch, is_last=self.step == self.total_steps)
            except MapetError as error:
                log.warning("not evaluated after epoch %d: %s", epoch, error)
                return {}

        before = time.monotonic()
        scores = self._call_with_product(evaluate)
        self.metrics.started += time.monotonic() - before
        if scores:
            if self.folder:
                self.folder.log_metrics(self.step, scores)
            self.display.log_scores(epoch, scores)

    def _save_if_due(self) -> None:
        """Save a checkpoint after the last step, on a stop signal to any rank, and every `checkpoint_interval_min` minutes; a collective call.

        Raises:
            Interrupted: a signal asked a rank to stop; the checkpoint is saved. If the last step is done, the run ends as usual.
            MapetError: the checkpoint cannot be written.
        """
        due = time.monotonic() - self._saved_at > 60 * self.task.config.checkpoint_interval_min  # seconds
        stopping, due = any_rank(bool(self.stop.signal_name), due)
        if stopping or due or self.step == self.total_steps:
            self._save()
            self._saved_at = time.monotonic()
        if stopping and self.step < self.total_steps:
            cause = self.stop.signal_name or "another process"
            what = f"stopped by {cause} at step {self.step} of {self.total_steps}, saved"
            raise Interrupted(what, command_to_resume(self.task.config.out, self.task.command))

    def _save(self) -> None:
        """Save the checkpoint of `step` in OUT/checkpoints, keep the `KEEP_CHECKPOINTS` newest; a collective call.

        It holds the tensors of model, optimizer and `stateful`, and as JSON step, epochs, number of rollbacks, micro-batch size and the
        hashes of the inputs. Rank 0 writes it, and records the step in OUT/run.json; the other ranks wait.

        Raises:
            MapetError: see `checkpoint.save_checkpoint`.
        """
        config, micro_batch = self.task.config, self.forward_backward.micro_batch
        tensors = checkpoint.checkpoint_tensors(self.task.model, self.optimizer, **self.stateful)
        state = {"epochs": config.epochs, "num_rollbacks": self.num_rollbacks, "micro_batch": micro_batch}
        if distributed.rank() == 0:
            checkpoint.save_checkpoint(self.checkpoints, self.step, tensors, state | self.task.hashes, KEEP_CHECKPOINTS)
            record(config.out, counts={"steps": self.step})
        distributed.barrier()

    def _call_with_product(self, function: Callable[[M], T]) -> T | None:
        """Call a function of the product module (the part of the model that is evaluated and saved) on rank 0; a collective call.

        Args:
            function: gets the trained module, which it may move, set to evaluation mode or change otherwise. With FSDP, which shards the
                weights across ranks, the module is a new one with the gathered weights.

        Returns:
            The function's result on rank 0; None on the other ranks, which wait.
        """
        task, module = self.task, self.task.product_module
        if task.config.fsdp:
            weights = full_state_dict(module)
            if distributed.rank() == 0:
                module = task.build_model()
                module.load_state_dict(weights)
        return on_rank_zero(lambda: function(module))


def on_rank_zero(function: Callable[[], T]) -> T | None:
    """Call a function on rank 0, and return its result; the other ranks wait and get None. A collective call.

    Within the function the collectives of `mapet.distributed` behave as in a single process, because the other ranks don't take part. An
    error of the function is raised on rank 0 alone; the other ranks wait until their connection is lost.
    """
    result = None
    if distributed.rank() == 0:
        with distributed.disable_collectives():
            result = function()
    distributed.barrier()
    return result


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """All-gather one row per image, in the order of the step's whole batch; a collective call.

    The images of a batch are dealt out to the ranks in turn: the first to rank 0, the second to rank 1, and so on.

    Args:
        rows: of this rank, (counts[rank], ...); further rows (that of a placeholder) are ignored.
        counts: number of images of each rank, 0 or more.

    Returns:
        (sum(counts), ...), the same on all ranks.
    """
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # the collective needs equal shapes
    local = counts[distributed.rank()]
    padded[:local] = rows[:local]
    is_image = torch.arange(max(counts))[:, None] < torch.tensor(counts)  # (rows, ranks); False for padding
    return distributed.all_gather(padded).transpose(0, 1)[is_image.to(rows.device)]


def is_log_step(step: int, steps_per_epoch: int, log_interval: int) -> bool:
    """Return whether metrics are logged after a step.

    Every epoch is divided into as few parts of (about) equal length as have at most `log_interval` steps each, and metrics are logged
    at the end of each part, so also at the end of every epoch.

    Args:
        step: counted from 1, over all epochs.
        steps_per_epoch: at least 1.
        log_interval: largest number of steps between two log lines.
    """
    in_epoch, parts = (step - 1) % steps_per_epoch + 1, -(-steps_per_epoch // log_interval)
    return in_epoch * parts // steps_per_epoch > (in_epoch - 1) * parts // steps_per_epoch


def any_rank(*flags: bool) -> list[bool]:
    """Return, for each flag in order, whether it is set on any rank, the same on all ranks; a collective call with as many flags."""
    return distributed.all_reduce(torch.tensor(flags, dtype=torch.int64)).bool().tolist()


def step_seed(seed: int, step: int) -> int:
    """Return the seed of torch's generators for a step: 63 bits that depend on the run's seed and the step alone."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
