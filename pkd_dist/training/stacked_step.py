"""One step of several students of one shape: stacked parameters, batched products, one optimizer pass over the stack.

Each student has its own trainer, with its own batches, loss, learning rate, clipping, evaluations and checkpoints. Its parameters and
Adam's moments are views of rows of the stack, so all of that works as for a student alone. The trainers take turns; the first of a turn
has the step computed for all:

    batches -> padded to one length -> forward pass of the stack (vmap) -> loss of each -> gradients -> norms -> AdamW

A student that ends, is pruned or diverges leaves the stack.

Shapes: K students, B examples of a batch, L tokens, and those of `model.outputs`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.func import functional_call, vmap
from torch.nn import functional

from pkd_dist.data.batches import Batch
from pkd_dist.metric_names import LOSS_TERMS
from pkd_dist.model.dropout import CpuDropout
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.families import is_bert_like, num_layers
from pkd_dist.model.fused_layer import FusedLayer
from pkd_dist.model.outputs import Forward, Outputs
from pkd_dist.model.specialize import unspecialize
from pkd_dist.training.clock import PARTS
from pkd_dist.training.optimization import autocast
from pkd_dist.training.plain_engine import PlainEngine
from pkd_dist.training.stacked_dropout import StackedDropout
from pkd_dist.training.step import StepInputs, StepResult
from pkd_dist.training.trainer import Trainer

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BETAS = (0.9, 0.999)
"""AdamW's, as torch has them by default."""


def can_stack(trainers: Sequence[Trainer]) -> bool:
    """Return whether these trainings can take their steps together.

    They need one rank, equal shapes, precision and position, and a loss that looks at [CLS] alone, of a family that takes the mask
    as `Stack` makes it.
    """
    first = trainers[0]
    shapes = [{name: p.shape for name, p in trainer.job.module.named_parameters()} for trainer in trainers]
    return (
        all(isinstance(trainer.engine, PlainEngine) for trainer in trainers)
        and first.world.size == 1
        and all(trainer.engine.schedule.gradient_accumulation_steps == 1 for trainer in trainers)
        and all(each == shapes[0] for each in shapes)
        and len({(t.job.settings.batch_size, len(t.job.train), t.job.pad_id) for t in trainers}) == 1
        and not first.job.task.multiple_choice
        and all(p.requires_grad for trainer in trainers for p in trainer.job.module.parameters())
        and all(_computation(trainer.job.module) == _computation(first.job.module) for trainer in trainers)
        and len({trainer.progress.step for trainer in trainers}) == 1
        and len({trainer.engine.autocast_dtype for trainer in trainers if isinstance(trainer.engine, PlainEngine)}) == 1
        and is_bert_like(first.job.module.model.config)
        and all(trainer.job.module.first_token_only for trainer in trainers)
    )


def _computation(module: Encoder) -> tuple[object, ...]:
    """Return what a student computes beside its parameters: its configuration, with dropout, and its buffers."""
    config = {key: value for key, value in module.model.config.to_dict().items() if key != "_name_or_path"}
    buffers = [(name, buffer.cpu().numpy().tobytes()) for name, buffer in module.named_buffers()]
    return config, buffers, module.projection is None


def run_together(trainers: Sequence[Trainer]) -> Iterator[tuple[int, Exception | None]]:
    """Train students in one stack; yield the place of each as it ends, and the exception that ended it, if one did.

    Args:
        trainers: `can_stack` says that they can.
    """
    stack = Stack(trainers)
    running = {place: trainer.steps() for place, trainer in enumerate(trainers)}
    for place, trainer in enumerate(trainers):
        trainer.step = _Member(stack, place)
    while running:
        for place in list(running):
            error: Exception | None = None
            try:
                next(running[place])
                continue
            except StopIteration:
                pass
            except Exception as ended:
                error = ended
            del running[place]
            stack.leave(place)
            yield place, error


class _Member:
    """A `step.TrainStep` of one student of a stack."""

    def __init__(self, stack: Stack, place: int):
        self._stack, self._place = stack, place

    def __call__(self, step: int) -> StepResult:
        return self._stack.result(self._place, step)

    def flush(self) -> None:
        """Return None: every result was returned by its step."""

    def stop_signal(self) -> int:
        return self._stack.trainers[self._place].world.stop_signal()


@dataclass
class _Rows:
    """The stacked tensors of the students that are left.

    Attributes:
        places: Of these students among all, in the order of the rows.
        weights, first, second: Name -> (K, ...) float32 parameters, and Adam's moments.
        decays: Names of those with weight decay.
    """

    places: list[int]
    weights: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    decays: set[str]


class Stack:
    """Several students in training. See the head of this module.

    Args:
        trainers: At the same step; their steps are replaced by the stack's.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        self.trainers = list(trainers)
        self._inputs = [StepInputs(trainer.job, trainer.world, trainer.engine) for trainer in trainers]
        self._module = _skeleton(trainers[0].job.module)
        self._buffers = dict(trainers[0].job.module.named_buffers())
        self._results: dict[int, StepResult | Exception] = {}
        self._rows = self._stacked(list(range(len(trainers))))

    def leave(self, place: int) -> None:
        """Take a student out of the stack; its parameters become its own again."""
        for p in self._engine(place).module.parameters():
            p.data = p.data.clone()
            for kind in _MOMENTS:
                self._engine(place).optimizer.state[p][kind] = self._engine(place).optimizer.state[p][kind].clone()
        left = [each for each in self._rows.places if each != place]
        if left:
            self._rows = self._stacked(left)

    def result(self, place: int, step: int) -> StepResult:
        """Return the result of a student's step; the first to ask has the step computed for all."""
        if place not in self._results:
            self._results = self._compute(step)
        found = self._results.pop(place)
        if isinstance(found, Exception):
            raise found
        return found

    def _engine(self, place: int) -> PlainEngine:
        engine = self.trainers[place].engine
        assert isinstance(engine, PlainEngine)
        return engine

    @torch.no_grad()
    def _stacked(self, places: list[int]) -> _Rows:
        """Stack the parameters and moments of some students, and make theirs views of the rows."""
        engines = [self._engine(place) for place in places]
        for engine in engines:
            engine.state.allocate()
        names = [name for name, p in engines[0].module.named_parameters() if p.requires_grad]
        parameters = [dict(engine.module.named_parameters()) for engine in engines]
        rows = _Rows(places, {}, {}, {}, set())
        for name in names:
            own = [each[name] for each in parameters]
            states = [engine.optimizer.state[p] for engine, p in zip(engines, own, strict=True)]
            rows.weights[name] = torch.stack([p.detach() for p in own]).requires_grad_()
            rows.first[name], rows.second[name] = (torch.stack([state[kind] for state in states]) for kind in _MOMENTS)
            for k, (p, state) in enumerate(zip(own, states, strict=True)):
                p.data = rows.weights[name].detach()[k]
                state |= dict(zip(_MOMENTS, (rows.first[name][k], rows.second[name][k]), strict=True))
        decaying = {id(p) for p in engines[0].optimizer.param_groups[0]["params"]}
        rows.decays = {name for name in names if id(parameters[0][name]) in decaying}
        return rows

    def _compute(self, step: int) -> dict[int, StepResult | Exception]:
        """Do a step of every student that is left."""
        rows, clock = self._rows, _Clock()
        inputs = [self._inputs[place] for place in rows.places]
        batches = [each.with_teacher(each.batches.step(*each.position(step))[0]) for each in inputs]
        lengths = [batch.input_ids_BL.shape[1] for batch in batches]
        batches = _padded([batch.to(self.trainers[0].world.device) for batch in batches], inputs[0].job.pad_id)
        clock.ended("data")
        outputs = self._forward(batches, [each.seed(step) for each in inputs], lengths)
        terms = [
            {name: (values * batch.weight_B).sum() for name, values in each.losses(_given(own), batch).items()}
            for each, batch, own in zip(inputs, batches, outputs, strict=True)
        ]
        clock.ended("forward")
        torch.stack([each["total"] for each in terms]).sum().backward()  # type: ignore[no-untyped-call]
        clock.ended("backward")
        norms_K = self._norms()
        self._update(step, norms_K)
        clock.ended("optimizer")
        results: dict[int, StepResult | Exception] = {}
        for place, each, batch, own, norm in zip(rows.places, inputs, batches, terms, norms_K.tolist(), strict=True):
            values = np.array([float(own[name].detach()) if name in own else 0.0 for name in LOSS_TERMS])
            try:
                if not np.isfinite(values).all():
                    each.diverged("the loss", step + 1, values, False, values)
                if not np.isfinite(norm):
                    each.diverged("the gradient", step + 1, values, False, np.empty(0))
            except Exception as error:
                results[place] = error
                continue
            results[place] = StepResult(
                step=step + 1,
                terms=each.named(values),
                grad_norm=norm,
                learning_rate=each.engine.schedule.learning_rate(step),
                examples=each.examples(step),
                tokens=batch.tokens,
                seconds=clock.shared(len(rows.places)),
            )
        return results

    def _forward(self, batches: Sequence[Batch], seeds: Sequence[int], lengths: Sequence[int]) -> list[Outputs]:
        """Return what each student returns of its batch: the states of [CLS] after every layer.

        Args:
            seeds: Of each student's dropout.
            lengths: L of each batch before it was padded.
        """
        layers = range(num_layers(self._module.model.config) + 1)
        first = batches[0]
        stacked = {name: torch.stack([batch.inputs[name] for batch in batches]) for name in first.inputs}
        mask_KBL = stacked["attention_mask"]
        length = mask_KBL.shape[-1]
        lowest = torch.finfo(torch.float32).min
        stacked["attention_mask"] = ((1.0 - mask_KBL.float()) * lowest)[:, :, None, None, :].expand(
            -1, -1, 1, length, -1
        )

        def forward(weights: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            out = functional_call(self._module, (weights, self._buffers), (inputs, layers))
            return out.logits_BC, out.states, out.own_states

        engine = self._engine(self._rows.places[0])
        config = self._module.model.config
        widths = {config.hidden_size, getattr(config, "embedding_size", config.hidden_size)}
        dropout = StackedDropout(seeds, lengths, widths, engine.device)
        with autocast(engine.device, engine.autocast_dtype), dropout:
            logits_KBC, states, own_states = vmap(forward)(self._rows.weights, stacked)
        return [Outputs(logits_KBC[k], states[k], own_states[k]) for k in range(len(batches))]

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        """Return the global norm of each student's gradient, (K,) float32."""
        squares = [
            weights.grad.flatten(1).square().sum(1)
            for weights in self._rows.weights.values()
            if weights.grad is not None
        ]
        return torch.stack(squares).sum(0).sqrt()

    @torch.no_grad()
    def _update(self, step: int, norms_K: torch.Tensor) -> None:
        """Do AdamW's update of the whole stack; a student whose gradient is not finite keeps its weights."""
        rows, settings = self._rows, [self._engine(place).schedule.settings for place in self._rows.places]
        rate_K = norms_K.new_tensor([self._engine(place).schedule.learning_rate(step) for place in rows.places])
        decay_K = norms_K.new_tensor([each.weight_decay for each in settings])
        epsilon_K = norms_K.new_tensor([each.adam_epsilon for each in settings])
        most_K = norms_K.new_tensor([each.max_grad_norm or float("inf") for each in settings])
        finite_K = norms_K.isfinite()
        scale_K = torch.where(norms_K > most_K, most_K / (norms_K + 1e-6), torch.ones_like(norms_K))
        updates = step + 1
        one, two = _BETAS
        for name, weights in rows.weights.items():
            gradient = weights.grad
            if gradient is None:
                continue

            def per_student(values_K: torch.Tensor, like: torch.Tensor = weights) -> torch.Tensor:
                return values_K.view(-1, *([1] * (like.ndim - 1)))

            keep = per_student(finite_K)
            gradient = torch.where(keep, gradient * per_student(scale_K), torch.zeros_like(gradient))
            first, second = rows.first[name], rows.second[name]
            first.copy_(torch.where(keep, first.lerp(gradient, 1 - one), first))
            second.copy_(torch.where(keep, second * two + gradient.square() * (1 - two), second))
            moment = (second.sqrt() / (1 - two**updates) ** 0.5).add_(per_student(epsilon_K))
            change = per_student(rate_K) * (first / (1 - one**updates)) / moment
            if name in rows.decays:
                change += per_student(rate_K * decay_K) * weights
            weights.copy_(torch.where(keep, weights - change, weights))
            weights.grad = None
        for place in rows.places:
            for state in self._engine(place).optimizer.state.values():
                state["step"].fill_(float(updates))


def _skeleton(module: Encoder) -> Encoder:
    """Return a module of the same computation, operation by operation, whose parameters are given with each call."""
    made = copy.deepcopy(module)
    for part in made.modules():
        unspecialize(part, FusedLayer, CpuDropout)
    made.model.set_attn_implementation("eager")
    return made.train()


def _given(outputs: Outputs) -> Forward:
    """Return an encoder that has computed these outputs: the states of [CLS] after every layer."""

    def forward(_: object, layers: Sequence[int] = (), *__: object) -> Outputs:
        assert outputs.states is not None and outputs.own_states is not None
        if not layers:
            return Outputs(outputs.logits_BC, None, None)
        index = list(layers)
        return Outputs(outputs.logits_BC, outputs.states[:, index], outputs.own_states[:, index])

    return forward


def _padded(batches: Sequence[Batch], pad_id: int) -> list[Batch]:
    """Return the batches padded to the longest of them."""
    length = max(batch.input_ids_BL.shape[1] for batch in batches)

    def longer(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return functional.pad(tensor, (0, length - tensor.shape[1]), value=value)

    return [
        replace(
            batch,
            input_ids_BL=longer(batch.input_ids_BL, pad_id),
            attention_mask_BL=longer(batch.attention_mask_BL, 0),
            type_ids_BL=None if batch.type_ids_BL is None else longer(batch.type_ids_BL, 0),
        )
        for batch in batches
    ]


class _Clock:
    """The parts of a step that several students share."""

    def __init__(self) -> None:
        self._seconds, self._last = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def ended(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def shared(self, students: int) -> dict[str, float]:
        """Return the share of one student: the parts, and their sum as `step`."""
        parts = {part: value / students for part, value in self._seconds.items()}
        return {"step": sum(parts.values()), **parts}
