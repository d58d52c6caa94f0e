"""transformers' Trainer, made right for renamed weights and safe to interrupt."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import ProgressCallback, Seq2SeqTrainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from zoo.checkpoints import PROGRESS, is_complete, mark_complete, writing
from zoo.distillation import Distillation
from zoo.errors import RunError, UserError
from zoo.files import write_json
from zoo.finetuning import Unfreezing, decayed
from zoo.interrupts import StopAtCheckpoint
from zoo.samples import WithDraws
from zoo.sections import FinetuneSection
from zoo.step_loss import StepLoss
from zoo.streaming import Stream
from zoo.weights import assert_same_adapter, assert_same_weights


class ZooTrainer(StepLoss):
    """A Trainer whose checkpoints are complete or ignored, and whose resume ends as if nothing had happened.

    Rows carry `row`, their number in the data, which never reaches the model: a loss that is not finite names them.
    """

    data: dict[str, Any] = {}  # where the rows come from, with hashes, which checkpoints keep
    decay: float | None = None
    loraplus_lr_ratio: float | None = None
    gradients_seen = False
    distillation: Distillation | None = None
    rows: list[int] = []
    evaluated_rows: Any = None
    resumed_from: Path | None = None
    opens_stream = False
    started = 0.0
    seconds_before = 0.0  # of training, before this run was resumed

    def __init__(self, *args, **kwargs):
        with _only_evaluated(kwargs.get("model")) if kwargs.get("train_dataset") is None else nullcontext():
            super().__init__(*args, **kwargs)
        self.add_callback(_Begin(self))
        variants = getattr(getattr(self.model, "config", None), "attention_kwargs", None) or {}
        if every := variants.get("performer", {}).get("redraw"):
            self.add_callback(_Redraw(every))

    def tune(self, section: FinetuneSection) -> None:
        """Before the optimizer is made: learning rates by layer, and layers that join while it trains."""
        self.decay, self.loraplus_lr_ratio = section.layerwise_decay, section.loraplus_lr_ratio
        if section.gradual_unfreezing is not None:
            self.add_callback(Unfreezing(self.model, section.gradual_unfreezing))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        made = self.optimizer is not None
        if self.loraplus_lr_ratio is not None and not made:
            adapted: Any = self.model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, adapted)
            options |= {"loraplus_lr_ratio": self.loraplus_lr_ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(adapted, optimizer_class, **options)
        optimizer = super().create_optimizer(model)
        if self.decay is not None and not made:
            optimizer.param_groups[:] = decayed(optimizer.param_groups, self.model, self.decay)
        return optimizer

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self.started = 0.0
        try:
            with StopAtCheckpoint() as stop:
                self.add_callback(stop)
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if resume_from_checkpoint is None or self.started:
                raise
            # it has not begun: all that was read until here is the checkpoint
            raise _no_way_on(resume_from_checkpoint, error) from error
        finally:
            self.remove_callback(stop)
            # of a run that ends early: what is said about that is the last line
            for callback in self.callback_handler.callbacks:
                for bar in ("training_bar", "prediction_bar") if isinstance(callback, ProgressCallback) else ():
                    if getattr(callback, bar) is not None:
                        getattr(callback, bar).close()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        rows = inputs.pop("row", None)
        self.rows = [] if rows is None else rows.tolist()
        return super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise RunError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on train rows {self.rows}; try a "
                "lower learning_rate, gradient clipping (max_grad_norm) or look at these rows"
            )
        if not self.gradients_seen:
            check_gradients(model.named_parameters())
            self.gradients_seen = True
        return loss

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)
        asked = self.distillation.asked(given)
        inputs = given | {name: x for name, x in asked.items() if name not in given}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        shares = self.shares(given, num_items_in_batch)
        taught = sum(share * part for share, part in zip(shares, self.distillation.losses(outputs, given), strict=True))
        loss = self.distillation.section.labels * loss + taught
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._check_finite(metrics, f"{metric_key_prefix}_loss")
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        self._check_finite(output.metrics or {}, f"{metric_key_prefix}_loss")
        return output

    def _check_finite(self, metrics: dict[str, float], name: str) -> None:
        if not math.isfinite(metrics.get(name, 0.0)):
            raise RunError(
                f"{name} is {metrics[name]} after step {self.state.global_step}; try a lower learning_rate or gradient "
                "clipping (max_grad_norm)"
            )

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return _GroupedByLength(sampler.batch_size * self.args.world_size, sampler.lengths, seed)
        return sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.resumed_from = Path(resume_from_checkpoint)
        _restore(model, self.resumed_from)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            super()._load_best_model()
        _restore(self.model, Path(str(self.state.best_model_checkpoint)))

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        done = super()._init_training_state(*args, **kwargs)
        if self.resumed_from is None:
            return done
        if isinstance(self.train_dataset, Stream):
            self.train_dataset.go_on(json.loads((self.resumed_from / PROGRESS).read_text())["stream"])
            self.opens_stream = True
        # the state names the best checkpoint by the path it had then; the run may have been moved
        recorded = TrainerState.load_from_json(str(self.resumed_from / TRAINER_STATE_NAME)).best_model_checkpoint
        if recorded is not None:
            best = Path(str(self.args.output_dir), Path(recorded).name)
            if self.args.load_best_model_at_end and not is_complete(best):
                raise RunError(f"{best}: the best checkpoint so far is missing or damaged; put it back, or train anew")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return done

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:
            raise _no_way_on(str(checkpoint), error) from error

    def get_batch_samples(self, *args, **kwargs):
        batches = super().get_batch_samples(*args, **kwargs)
        if self.opens_stream:
            # to open the loader has moved the generators, which the run had done before its first step
            self._load_rng_state(str(self.resumed_from))
            self.opens_stream = False
        return batches

    def begin(self) -> None:
        """Before the first step: sums go on from where a resumed run had them."""
        if self.resumed_from is not None:
            progress = json.loads((self.resumed_from / PROGRESS).read_text())
            self._tr_loss.fill_(progress["loss_since_logged"])
            self._total_loss_scalar = float(progress["loss_logged"])
            self._globalstep_last_logged = int(progress["step_logged"])
            self.seconds_before = float(progress["seconds"])
        self.started = time.time()

    def _get_eval_sampler(self, eval_dataset):
        # predictions stand in the order of the rows, also where training groups them by length
        return SequentialSampler(eval_dataset)

    def _get_dataloader(self, *args, **kwargs):
        if kwargs.get("is_training"):
            return super()._get_dataloader(*args, **kwargs)
        # the last batch that training may leave out is evaluated
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop

    def evaluation_loop(self, dataloader, *args, **kwargs):
        # what metrics read beside predictions, such as the row of each window
        self.evaluated_rows = dataloader.dataset
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        if isinstance(self.train_dataset, WithDraws):
            self.train_dataset.set_epoch(kwargs["epoch"])
        # of several processes, accelerate does not reach it behind the batches that a resumed run skips
        sampler = getattr(kwargs["train_dataloader"], "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(kwargs["epoch"])
            sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
        if self.state.global_step >= self.state.max_steps:
            # resumed after its last checkpoint: the stock loop would train one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial, num_train_samples: int, start_time: float):
        # time, speed and mean loss of the whole run, and of all processes
        self._initial_global_step = 0
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(trial, num_train_samples, start_time - self.seconds_before)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the mark of completeness last, and removes older checkpoints only after it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        run_dir = self._get_output_dir(trial=trial)
        checkpoint = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
                progress = self._progress()
                # each process has written a file of its own
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_json(checkpoint / PROGRESS, progress)
                    _assert_same(self.model, checkpoint)
                    mark_complete(checkpoint)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint
            )

    def _progress(self) -> dict[str, Any]:
        rows = self.train_dataset
        learned = self.state.global_step * self.get_total_train_batch_size(self.args)
        return {
            "data": self.data,
            **({"stream": rows.place(learned)} if isinstance(rows, Stream) else {}),
            "loss_since_logged": self.accelerator.reduce(self._tr_loss, "mean").item(),
            "loss_logged": self._total_loss_scalar,
            "step_logged": self._globalstep_last_logged,
            "seconds": time.time() - self.started + self.seconds_before,
        }


class WritingTrainer(ZooTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """Measures what the model writes. While it trains, only if the best checkpoint is chosen by that: it takes long."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model: Any = self.model
        self.settings = copy.deepcopy(model.generation_config)

    def prediction_step(self, *args, **kwargs):
        # generating writes all that it did not say into the model's own, and then warns of what it finds there
        model: Any = self.model
        model.generation_config = copy.deepcopy(self.settings)
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **generate):
        measure, chosen_by = self.compute_metrics, str(self.args.metric_for_best_model or "loss")
        try:
            if self.is_in_train and chosen_by.removeprefix("eval_") == "loss":
                self.compute_metrics = None
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **generate)
        finally:
            self.compute_metrics = measure


class HeadlessTrainer(ZooTrainer):
    """Trains a model that has no head, and so no loss: `learn` makes one of it and a batch, with what is gathered."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args, learn: Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]], **kwargs):
        super().__init__(*args, **kwargs)
        self.learn, self.label_names = learn, ["labels"]
        if self.train_dataset is not None and self.args.train_batch_size < 2:
            raise UserError("train.per_device_train_batch_size: 1, but a text is told from others of its batch; give 2")
        if self.args.label_smoothing_factor:
            raise UserError("train.label_smoothing_factor: there are no labels to smooth; remove the key")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, found = self.learn(model, inputs)
        return (loss, {"found": found}) if return_outputs else loss


def check_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raises RunError where nothing of what is to learn has a gradient."""
    learned = [(name, one) for name, one in parameters if one.requires_grad]
    if not any(one.grad is not None and bool(one.grad.any()) for _, one in learned):
        names = ", ".join(name for name, _ in learned[:3]) or "none"
        raise RunError(f"nothing learns: no gradient reaches any of {len(learned)} trained parameters ({names} ...)")


@contextmanager
def _only_evaluated(model) -> Iterator[None]:
    """The stock Trainer refuses a quantised model without adapters, also where nothing is to be learned."""
    loaded = getattr(model, "_hf_peft_config_loaded", None)
    if loaded is not None and getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if loaded is not None:
            model._hf_peft_config_loaded = loaded


class _Redraw(TrainerCallback):
    """New random features after so many steps, from the generator that a resumed run finds as it was."""

    def __init__(self, every: int):
        self.every = every

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step and state.global_step % self.every == 0:
            kwargs["model"].redraw_features()


class _Begin(TrainerCallback):
    """Tells the trainer that it comes to the first step, its sums set to 0; counts the steps of a stream as epochs."""

    def __init__(self, trainer: ZooTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(self.trainer.train_dataset, Stream):
            # a stream has no epochs, and the stock count begins anew after a resume
            state.epoch = state.global_step / state.max_steps


class _GroupedByLength(LengthGroupedSampler):
    """Its order depends on the seed and the epoch alone; the stock one draws from the generator that dropout moves."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def _no_way_on(checkpoint: str, error: Exception) -> RunError:
    """Of a checkpoint whose hashes are right: it was written so, by other versions of the libraries for one."""
    if isinstance(error, RunError):
        return error
    cause = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return RunError(
        f"{checkpoint}: the run cannot continue from it: {cause}; delete it, and --resume takes the one before"
    )


def _restore(model, directory: Path) -> None:
    """Puts a checkpoint's weights into the model: the stock Trainer ignores renamed ones, with a mere warning.

    Adapters, whose names are never changed, are in it already; they are compared all the same.
    """
    if not isinstance(model, PeftModel):
        loaded = type(model).from_pretrained(directory, config=model.config, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict(), strict=True)
    _assert_same(model, directory)


def _assert_same(model, directory: Path) -> None:
    if isinstance(model, PeftModel):
        assert_same_adapter(model, directory)
    else:
        assert_same_weights(model, directory, whole=True)
