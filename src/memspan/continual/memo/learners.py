"""The learners: one training loop, in which methods differ by their network, their loss and what they keep.

A task is learned in five steps: discover its classes, see that the budget can pay for them, train a working
copy on the task's data and the exemplars, correct the head, choose the exemplars to keep. The learner itself
changes only after all five: a refusal, a diverged loss or an interrupt leaves it as it was.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memspan.base import refuse
from memspan.base.rng import rng, seed_of
from memspan.continual.buffers import ExemplarSet
from memspan.continual.memo.heads import align_weights_
from memspan.continual.memo.inputs import (
    Backbone,
    Label,
    build,
    check_images,
    check_rows,
    crop_flip,
    to_input,
)
from memspan.continual.memo.nets import ExpandableNet, aux_targets
from memspan.ledger import Budget, flops, nbytes
from memspan.nn.pool import class_means

__all__ = ["ExpandableRepresentation", "Finetune", "MEMOClassifier", "Options", "Replay", "TaskLearner"]

# Learning rate x 0.1 at these shares of a task; epochs 60, 120, 170 of 200 and 80, 120, 150 of 170 there.
_MILESTONES = ((0.3, 0.6, 0.85), (80 / 170, 120 / 170, 150 / 170))
_EVAL_ROWS = 512


class Options(TypedDict, total=False):
    """The keyword arguments that all learners share; see :class:`TaskLearner`."""

    epochs: int | tuple[int, int]
    steps: int | None
    lr: float
    momentum: float
    weight_decay: tuple[float, float]
    batch_size: int
    selection: str | Callable[..., Any]
    codec: str
    align: Literal["always", "final"]
    horizon: tuple[int, int] | None
    byte_rule: Literal["ledger", "paper"]
    reading: Literal["linear", "nearest_mean"] | None
    alignment: bool | None
    augment: Callable[[Tensor, np.random.Generator], Tensor] | Literal["crop_flip"] | None
    transform: Callable[[Tensor], Tensor] | None
    known_classes: Literal["extend", "refuse"]
    seed: int
    device: str | torch.device


class TaskLearner:
    """A classifier that learns task after task within a byte budget. Use one of its subclasses.

    Everything that survives between two tasks is paid from ``budget``: parameters, buffers, head, class
    names, class means, correction, exemplars at their encoded size. What lives only while a task is learned
    is not kept between tasks and not paid, but told: during :meth:`partial_fit_task` ``memory_bytes`` shows
    the frozen old network of iCaRL, WA and BiC as ``parameters.teacher``, and :attr:`training_bytes_` keeps
    that figure afterwards.

    Args:
        backbone: name of a network of :mod:`memspan.continual.nets`, a module image -> features (N, d), or
            a pair ``(g, s)``. A module is a template: it is copied and never changed.
        budget: bytes, ``"2MiB"`` or a :class:`~memspan.ledger.Budget`; None is unlimited.
        epochs: passes over the task's data and the exemplars, or a pair (first task, later tasks). The
            paper's pair.
        steps: optimization steps of each task, in place of ``epochs``; gives methods with different amounts
            of data the same number of steps.
        lr: learning rate of SGD; x 0.1 at the paper's shares of a task.
        momentum: of SGD.
        weight_decay: of SGD, in the first task and in later tasks.
        batch_size: images a step; a last batch of one image joins the batch before it.
        selection: which exemplars are kept: "herding", "random", "reservoir" or a callable.
        codec: how exemplars are stored: "raw", "png", "jpeg:Q".
        align: "always": at every task, exemplars get what the model of that task leaves. "final" (the
            paper): what the model of the last task leaves; needs ``horizon``.
        horizon: (tasks, classes) of the whole stream, where known. With it a budget that cannot pay for the
            last task is refused at the first, and so are more classes than were announced.
        byte_rule: "ledger" counts everything; "paper" counts 4 bytes a backbone parameter and H·W·C a raw
            exemplar.
        reading: "linear" reads the head; "nearest_mean" the nearest mean of unit exemplar features. None:
            the method's.
        alignment: scale the head's new rows to the old rows' norm after a task. None: as the method does.
            With few steps a task and many exemplars new rows end up the smaller ones, and alignment costs
            accuracy.
        augment: None, "crop_flip" (pad-4 crop, flip, brightness ± 63/255, the paper's), or a callable
            ``(x, generator) -> x``.
        transform: uint8 (N, C, H, W) -> network input; None scales to [-1, 1]. Float arrays pass unchanged.
        known_classes: a class that was seen before is more data ("extend") or refused ("refuse").
        seed: of initialisation, order and draws; one seed repeats.
        device: where the network runs.

    Attributes:
        classes_: class labels in the order of discovery.
        training_bytes_: ``memory_bytes`` at the fullest moment of the last task.
        gamma_: factor of the last weight alignment.
        drift_: what the last task did to the old part on the exemplars: relative change of the ``features``
            of old blocks, and of the old classes' ``logits``.
    """

    expands = False
    keeps_exemplars = True
    has_teacher = False
    aligns_weights = False
    default_reading: Literal["linear", "nearest_mean"] = "linear"

    def __init__(
        self,
        backbone: Backbone = "resnet8",
        budget: Budget | str | int | None = None,
        *,
        epochs: int | tuple[int, int] = (200, 170),
        steps: int | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: tuple[float, float] = (5e-4, 2e-4),
        batch_size: int = 128,
        selection: str | Callable[..., Any] = "herding",
        codec: str = "raw",
        align: Literal["always", "final"] = "always",
        horizon: tuple[int, int] | None = None,
        byte_rule: Literal["ledger", "paper"] = "ledger",
        reading: Literal["linear", "nearest_mean"] | None = None,
        alignment: bool | None = None,
        augment: Callable[[Tensor, np.random.Generator], Tensor] | Literal["crop_flip"] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        known_classes: Literal["extend", "refuse"] = "extend",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.backbone, self.budget, self.epochs, self.steps = backbone, budget, epochs, steps
        self.lr, self.momentum, self.weight_decay, self.batch_size = lr, momentum, weight_decay, batch_size
        self.selection, self.codec, self.align, self.horizon = selection, codec, align, horizon
        self.byte_rule, self.reading, self.alignment = byte_rule, reading, alignment
        self.augment, self.transform = augment, transform
        self.known_classes, self.seed, self.device = known_classes, seed, device
        for name, allowed in (
            ("align", ("always", "final")),
            ("byte_rule", ("ledger", "paper")),
            ("reading", (None, "linear", "nearest_mean")),
            ("known_classes", ("extend", "refuse")),
        ):
            if getattr(self, name) not in allowed:
                refuse(name, getattr(self, name), f"use one of {allowed}")
        if align == "final" and horizon is None and budget is not None:
            refuse("horizon", None, "align='final' spends what the last task leaves: give (tasks, classes)")
        if batch_size < 2:
            refuse("batch_size", batch_size, "batch norm needs at least 2 images a step")
        if (steps is not None and steps < 1) or min(np.atleast_1d(epochs)) < 1 or not lr > 0:
            refuse(
                "steps, epochs, lr", (steps, epochs, lr), "give 1 or more steps or epochs, and a rate above 0"
            )
        if codec.startswith("features"):
            refuse(
                "codec", codec, "the network is trained on exemplars: keep images ('raw', 'png', 'jpeg:75')"
            )
        self._limit = None if budget is None else Budget.parse(budget).bytes
        self.classes_: list[Label] = []
        self.tasks_ = 0
        self.training_bytes_: dict[str, int] = {}
        self.drift_: dict[str, float] = {}
        self.gamma_ = 1.0
        self._net: ExpandableNet | None = None
        self._teacher: ExpandableNet | None = None
        self._exemplars: ExemplarSet | None = None
        self._means: Tensor | None = None
        self._shape: tuple[int, ...] | None = None
        self._dtype = "uint8"
        self._warned = False

    # ---- the algorithm ---------------------------------------------------------------------------------

    def partial_fit_task(self, X: Any, y: Any = None) -> Self:
        """Learn one task.

        Args:
            X: images, uint8 (N, H, W) or (N, H, W, C), or float inputs of any shape (N, ...); or one
                map-style dataset of (image, label) pairs.
            y: (N,) labels, numbers or strings; any values. New ones become new classes, in sorted order.

        Returns:
            The learner.

        Raises:
            BadInput: no rows, NaN, another image shape than before, a known class where
                ``known_classes="refuse"``, more classes than the horizon has, a budget below the model and
                one image a class (the least budget is told), or a loss or features that stopped being
                finite. The learner is then as it was before the call.
        """
        images, labels = check_rows(X, y, self._shape)
        new, index = self._discover(labels)
        if self.horizon is not None and len(self.classes_) + len(new) > self.horizon[1]:
            refuse(
                "y",
                new,
                f"horizon={self.horizon} announced {self.horizon[1]} classes, and {len(self.classes_)} are "
                "known: give the classes of the whole stream in horizon, or None",
            )
        grows = int(bool(new) or self._net is None)
        self._afford(images, self._blocks + grows, len(self.classes_) + len(new))
        before = dict(vars(self))
        try:
            self._shape, self._dtype = images.shape[1:], images.dtype.name
            self.classes_ = [*self.classes_, *new]
            self.tasks_ += 1
            devices = [torch.device(self.device)] if torch.device(self.device).type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed_of("memo", self.seed, self.tasks_))
                self._learn(images, index, len(new))
        except BaseException:
            vars(self).update(before)
            raise
        finally:
            self._teacher = None
        return self

    def _learn(self, images: np.ndarray, index: np.ndarray, n_new: int) -> None:
        n_old = len(self.classes_) - n_new
        old_images, old_index = self._past()
        net = self._grown(n_new)
        past = self._net if n_old else None
        self._teacher = past if self.has_teacher else None
        self._net = net
        self.training_bytes_ = self.memory_bytes()
        self._train(net, np.concatenate([images, old_images]), np.concatenate([index, old_index]), n_old)
        self._teacher = None
        aligned = self.aligns_weights if self.alignment is None else self.alignment
        self.gamma_ = align_weights_(net.head, n_new) if aligned and n_old else 1.0
        net.drop_aux().eval().zero_grad(set_to_none=True)
        self.drift_ = self._drift(past, net, old_images, n_old) if past is not None else {}
        self._remember(images, index)
        if self._reading == "nearest_mean":
            self._means = self._prototypes()

    def _train(self, net: ExpandableNet, images: np.ndarray, index: np.ndarray, n_old: int) -> None:
        draws = rng("memo", self.seed, self.tasks_, "batches")
        later = int(self.tasks_ > 1)
        epochs = self.epochs if isinstance(self.epochs, int) else self.epochs[later]
        steps = self.steps or epochs * _batches_per_epoch(len(images), self.batch_size)
        optimizer = torch.optim.SGD(
            [parameter for parameter in net.parameters() if parameter.requires_grad],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay[later],
        )
        milestones = [max(1, round(share * steps)) for share in _MILESTONES[later]]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        total = torch.zeros((), device=self.device)
        net.train()
        for rows in _batches(len(images), self.batch_size, steps, draws):
            x = self._input(images[rows], draws)
            loss = self._loss(net(x), torch.as_tensor(index[rows], device=self.device), x, n_old)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.detach()
        if not torch.isfinite(total):
            refuse("lr", self.lr, "the loss stopped being finite; use a smaller learning rate")

    def _loss(self, out: Mapping[str, Tensor], target: Tensor, x: Tensor, n_old: int) -> Tensor:
        """Cross-entropy over all classes; methods add their own terms."""
        return F.cross_entropy(out["logits"], target)

    def _grown(self, n_new: int) -> ExpandableNet:
        """A working copy of the network with room for the new classes."""
        if self._net is None:
            return self._fresh().add_task(n_new)
        net = self._net.working_copy()
        if n_new and self.expands:
            return net.add_task(n_new)
        return net.add_classes(n_new) if n_new else net

    def _past(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept images (M, ...) and their class indices."""
        if self._exemplars is None or not len(self._exemplars):
            return np.zeros((0, *(self._shape or ())), self._dtype), np.zeros(0, np.int64)
        images, index = self._exemplars.arrays()
        return images, index.astype(np.int64)

    def _remember(self, images: np.ndarray, index: np.ndarray) -> None:
        """Choose exemplars of the task's classes by the new network's features; older classes give way."""
        if not self.keeps_exemplars:
            return
        budget = self._exemplar_bytes(images, self._blocks, len(self.classes_))
        kept = ExemplarSet(
            budget,
            codec=self.codec,
            selection=self.selection,
            exact="paper" if self.byte_rule == "paper" and budget is not None else None,
            seed=self.seed,
        )
        if self._exemplars is not None:
            kept.load_state_dict(self._exemplars.state_dict())
            again = np.isin(self._past()[1], index)
            if again.any():  # a known class: what was kept competes with the new images
                old_images, old_index = self._past()
                images = np.concatenate([old_images[again], images])
                index = np.concatenate([old_index[again], index])
        features = self._outputs(self._need_net(), images)["features"]
        if not torch.isfinite(features).all():
            refuse("features", "NaN or infinite", "exemplars cannot be chosen; use a smaller learning rate")
        kept.update(images, index, features)
        self._exemplars = kept

    def _prototypes(self) -> Tensor:
        """Unit class means of the exemplars' unit features: (C_b, d·b)."""
        images, index = self._past()
        features = self._outputs(self._need_net(), images)["features"]
        return class_means(features, torch.as_tensor(index), len(self.classes_))

    def _drift(
        self, past: ExpandableNet, net: ExpandableNet, images: np.ndarray, n_old: int
    ) -> dict[str, float]:
        if not len(images):
            return {}
        before, after = self._outputs(past, images), self._outputs(net, images)
        width = before["features"].shape[1]
        return {
            "features": _relative(before["features"], after["features"][:, :width]),
            "logits": _relative(before["logits"], after["logits"][:, :n_old]),
        }

    # ---- reading ---------------------------------------------------------------------------------------

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores (N, C), columns in the order of ``classes_``: logits, or cosines with the class means."""
        images = check_images(X, self._shape) if len(X) else np.zeros((0, *(self._shape or ())), np.float32)
        out = self._outputs(self._need_net(), images)
        if self._reading == "nearest_mean" and self._means is not None:
            return (F.normalize(out["features"], dim=1) @ self._means.T).numpy()
        return out["logits"].numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels (N,) of images (N, ...), among all classes so far; no task is told.

        Raises:
            BadInput: before the first task, or another image shape.
        """
        scores = self.decision_function(X)
        labels: np.ndarray = np.asarray(self.classes_)
        return labels[scores.argmax(axis=1)]  # type: ignore[no-any-return]

    def score(self, X: Any, y: Any) -> float:
        """Accuracy, between 0 and 1."""
        if len(X) == 0 or len(X) != len(y):
            refuse(
                "X", f"{len(X)} images, {len(y)} labels", "give at least one image, and one label for each"
            )
        return float((self.predict(X) == np.asarray(y)).mean())

    @torch.no_grad()
    def _outputs(self, net: ExpandableNet, images: np.ndarray) -> dict[str, Tensor]:
        """Features and logits of images in eval mode, on the CPU."""
        net.eval()
        parts = []
        for start in range(0, max(len(images), 1), _EVAL_ROWS):
            rows = images[start : start + _EVAL_ROWS]
            if len(rows):
                out = net(to_input(rows, self.device, self.transform))
                parts.append((out["features"].cpu(), out["logits"].cpu()))
        if not parts:
            width, classes = net.head.in_features, net.n_classes
            return {"features": torch.zeros(0, width), "logits": torch.zeros(0, classes)}
        features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"features": features, "logits": logits}

    # ---- bytes -----------------------------------------------------------------------------------------

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now, by category; while a task is learned, with the frozen old network as well."""
        if self._net is None:
            return {}
        out = self._net_bytes(self._net)
        if self._teacher is not None:
            out["parameters.teacher"] = nbytes(self._teacher)
        out["labels"] = nbytes(self.classes_)
        if self._means is not None:
            out["memory_bank.class_means"] = nbytes(self._means)
        if self._exemplars is not None:
            out |= self._exemplars.memory_bytes()
        return out

    def predict_bytes(self, tasks: int, classes: int, shape: tuple[int, ...] | None = None) -> dict[str, int]:
        """The bytes that all but exemplars and class names will hold after so many tasks and classes.

        The head grows as tasks times classes: 100 tasks of 10 classes on ResNet-18 blocks hold 205 MB of it.

        Args:
            tasks: tasks learned, 1 or more.
            classes: classes learned.
            shape: of one image, (H, W) or (H, W, C); needed before the first task.

        Raises:
            BadInput: no shape is known.
        """
        shape = shape or self._shape
        if shape is None:
            refuse("shape", shape, "give the shape of one image, (H, W) or (H, W, C)")
        net = self._net or self._fresh(shape).add_task(1)
        blocks = tasks if self.expands else 1
        width = net.feature_dim * blocks
        known = self._net_bytes(net)
        part = "parameters.specialised" if self.expands else "parameters.backbone"
        block = net.blocks[-1]
        out = {
            "parameters.backbone": nbytes(list(net.g.parameters())),
            "parameters.specialised": 0,
            "parameters.head": 4 * classes * (width + 1),
            "buffers": nbytes(list(net.g.buffers())) + blocks * nbytes(list(block.buffers())),
        }
        out[part] += blocks * nbytes(list(block.parameters()))
        assert out.keys() == known.keys()
        if self._reading == "nearest_mean":
            out["memory_bank.class_means"] = 4 * classes * width
        return out

    def _net_bytes(self, net: ExpandableNet) -> dict[str, int]:
        blocks = list(net.blocks.parameters())
        return {
            "parameters.backbone": nbytes(list(net.g.parameters()) + ([] if self.expands else blocks)),
            "parameters.specialised": nbytes(blocks) if self.expands else 0,
            "parameters.head": nbytes(list(net.head.parameters())),
            "buffers": nbytes(list(net.buffers())),
        }

    def _exemplar_bytes(self, images: np.ndarray, tasks: int, classes: int) -> int | None:
        """What the budget leaves for exemplars after so many tasks; None is unlimited."""
        if self._limit is None:
            return None
        if self.align == "final" and self.horizon is not None:
            tasks, classes = max(tasks, self.horizon[0]), max(classes, self.horizon[1])
        model = self.predict_bytes(tasks, classes, images.shape[1:])
        if self.byte_rule == "paper":
            return self._limit - model["parameters.backbone"] - model["parameters.specialised"]
        names = max(nbytes(self.classes_), 8 * classes)
        return self._limit - sum(model.values()) - names

    def afford(self, X: Any) -> Self:
        """See that the budget pays for one more class of such images, or for the whole ``horizon``.

        Args:
            X: some images of the stream.

        Raises:
            BadInput: naming ``budget``; the least budget is told.
        """
        self._afford(check_images(X, self._shape), self._blocks + 1, len(self.classes_) + 1)
        return self

    def _afford(self, images: np.ndarray, tasks: int, classes: int) -> None:
        """Refuse a budget that cannot pay for the model and one image a class, before anything is learned."""
        if self._limit is None:
            return
        if self.horizon is not None:
            tasks, classes = max(tasks, self.horizon[0]), max(classes, self.horizon[1])
        left = self._exemplar_bytes(images, tasks, classes)
        assert left is not None
        need = 0
        if self.keeps_exemplars:
            one = ExemplarSet(None, codec=self.codec, selection="random")
            one.update(images[:1], [0])
            need = classes * (images[0].nbytes if self.byte_rule == "paper" else one.nbytes)
        if left < need:
            least = self._limit - left + need
            refuse(
                "budget",
                self.budget,
                f"the model after {tasks} tasks and {classes} classes and one image a class need {least} "
                f"bytes ({Budget(least)}); give that much or a smaller backbone",
            )
        if self._limit - left > self._limit / 2 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: weights take {self._limit - left} of {self._limit} bytes after "
                f"{tasks} tasks, more than half of the budget; exemplars get the rest",
                stacklevel=3,
            )

    # ---- state -----------------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Constructor arguments by name, as in scikit-learn."""
        names = [*inspect.signature(TaskLearner.__init__).parameters, *self._own_params()]
        return {name: getattr(self, name) for name in names if name != "self"}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors for safetensors; ``header`` is JSON as bytes."""
        header = {
            "learner": type(self).__name__,
            "classes": self.classes_,
            "tasks": self.tasks_,
            "blocks": len(self._net.blocks) if self._net is not None else 0,
            "shape": self._shape,
            "dtype": self._dtype,
            "seed": self.seed,
            "warned": self._warned,
        }
        out = {"header": torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)}
        if self._net is not None:
            out |= {f"net.{name}": value for name, value in self._net.state_dict().items()}
        if self._means is not None:
            out["class_means"] = self._means
        if self._exemplars is not None:
            out |= {f"exemplars.{name}": value for name, value in self._exemplars.state_dict().items()}
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Self:
        """Take over what :meth:`state_dict` gave; the learner must have been made with the same arguments.

        Raises:
            BadInput: the state of another kind of learner, or of another seed.
        """
        header = json.loads(bytes(state["header"].cpu().numpy()))
        for name, mine in (("learner", type(self).__name__), ("seed", self.seed)):
            if header[name] != mine:
                refuse(
                    name,
                    header[name],
                    f"this learner has {mine!r}; make it with the arguments that were used",
                )
        self.classes_, self.tasks_, self._warned = header["classes"], header["tasks"], header["warned"]
        self._shape, self._dtype = header["shape"] and tuple(header["shape"]), header["dtype"]
        self._net, self._means, self._exemplars = None, None, None
        if header["blocks"]:
            self._net = self._shell(header["blocks"])
            self._net.load_state_dict(_under(state, "net."))
        if "class_means" in state:
            self._means = state["class_means"].clone()
        exemplars = _under(state, "exemplars.")
        if exemplars:
            self._exemplars = ExemplarSet(None, codec=self.codec, selection=self.selection, seed=self.seed)
            self._exemplars.load_state_dict(exemplars)
        return self

    # ---- small parts -----------------------------------------------------------------------------------

    @property
    def net_(self) -> ExpandableNet:
        """The network, in eval mode."""
        return self._need_net()

    @property
    def _blocks(self) -> int:
        """Networks or deep blocks held; a task without a new class adds none."""
        return len(self._net.blocks) if self._net is not None else 0

    @property
    def _reading(self) -> str:
        return self.reading or self.default_reading

    def _split(self) -> str | None:
        return None

    def _own_params(self) -> list[str]:
        return []

    def _fresh(self, shape: tuple[int, ...] | None = None) -> ExpandableNet:
        """The network before its first task; fresh blocks come from the template, so that none is held."""
        shape = shape or self._shape or ()
        blank = np.zeros((1, *shape), self._dtype)
        x = to_input(blank, "cpu", self.transform)
        g, s = build(self.backbone, x.shape[1], self._split(), self.seed)
        g.eval()
        s.eval()
        with torch.no_grad():
            features = s(g(x))
        if features.dim() != 2:
            refuse(
                "backbone",
                tuple(features.shape),
                "it must give features (N, d): end it in pooling and Flatten",
            )
        net = ExpandableNet(
            g,
            partial(_specialised, self.backbone, x.shape[1], self._split(), self.seed),
            features.shape[1],
            train_base=getattr(self, "train_base", True),
            seed=self.seed,
        )
        return net.to(self.device)

    def step_flops(self, tasks: int, classes: int, shape: tuple[int, ...]) -> int:
        """Floating-point operations of one optimization step in a task, a frozen old network included.

        Args:
            tasks: the task's number, from 1.
            classes: classes by then.
            shape: of one uint8 image, (H, W) or (H, W, C).
        """
        net = self.blank(tasks, classes, shape).train()
        x = to_input(np.zeros((self.batch_size, *shape), np.uint8), self.device, self.transform)
        step = flops(lambda: net(x)["logits"].sum().backward())
        with torch.no_grad():
            return step + (flops(net, x) if self.has_teacher and tasks > 1 else 0)

    def blank(self, tasks: int, classes: int, shape: tuple[int, ...]) -> ExpandableNet:
        """The untrained network that this learner would have after so many tasks, to count its cost.

        Args:
            tasks: tasks learned.
            classes: classes learned, as many as tasks at least.
            shape: of one uint8 image, (H, W) or (H, W, C).
        """
        net = self._fresh(shape)
        for _ in range(tasks if self.expands else 1):
            net.add_task(1)
        return net.add_classes(classes - net.n_classes)

    def _shell(self, blocks: int) -> ExpandableNet:
        """A network of the present shape, for a state to fill."""
        net = self._fresh()
        for _ in range(blocks):
            net.add_task(1)
        return net.add_classes(len(self.classes_) - blocks).drop_aux().eval()

    def _need_net(self) -> ExpandableNet:
        if self._net is None:
            refuse("predict", "no task learned", "call partial_fit_task first")
        return self._net

    def _input(self, images: np.ndarray, draws: np.random.Generator) -> Tensor:
        x = to_input(images, self.device, self.transform)
        if self.augment is None:
            return x
        return crop_flip(x, draws) if self.augment == "crop_flip" else self.augment(x, draws)

    def _discover(self, labels: list[Label]) -> tuple[list[Label], np.ndarray]:
        """New class labels in sorted order, and every row's class index."""
        known = {label: i for i, label in enumerate(self.classes_)}
        seen = set(labels)
        again = sorted((label for label in seen if label in known), key=_order)
        if again and self.known_classes == "refuse":
            refuse(
                "y",
                again,
                "these classes came in an earlier task; known_classes='extend' takes them as more data",
            )
        new = sorted((label for label in seen if label not in known), key=_order)
        if any(isinstance(label, str) for label in (*new, *self.classes_)) and not all(
            isinstance(label, str) for label in (*new, *self.classes_)
        ):
            refuse("y", [*self.classes_, *new], "labels are all strings or all numbers")
        known |= {label: len(self.classes_) + i for i, label in enumerate(new)}
        return new, np.array([known[label] for label in labels], np.int64)


class Finetune(TaskLearner):
    """The floor: learns each task and keeps nothing of the past but the weights."""

    keeps_exemplars = False


class Replay(TaskLearner):
    """Experience replay: cross-entropy on the task's data and the exemplars together."""


class ExpandableRepresentation(TaskLearner):
    """One whole network a task, old ones frozen: the dynamically expandable representation (DER, CVPR 2021).

    Loss: cross-entropy over all classes plus that of an auxiliary head which reads the newest network alone.
    After each later task the head's new rows are aligned. The name DER also means dark experience replay
    elsewhere.
    """

    expands = True
    aligns_weights = True

    def _loss(self, out: Mapping[str, Tensor], target: Tensor, x: Tensor, n_old: int) -> Tensor:
        loss = F.cross_entropy(out["logits"], target)
        if "aux_logits" in out:
            loss = loss + F.cross_entropy(out["aux_logits"], aux_targets(target, n_old))
        return loss


class MEMOClassifier(ExpandableRepresentation):
    """MEMO: shallow layers are held once, a deep block is added for each task (ICLR 2023).

    Args:
        backbone: as in :class:`TaskLearner`.
        budget: as in :class:`TaskLearner`.
        split_at: name of the module that begins the specialised part.
        train_base: True keeps training the shallow layers after the first task (streams without a large
            first task); False freezes them.
        **options: see :class:`TaskLearner`.

    Example:
        >>> from torch import nn
        >>> images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
        >>> learner = MEMOClassifier(network, "20kB", split_at="1", steps=5)
        >>> for task in (["cat", "dog"], ["cow", "hen"]):
        ...     _ = learner.partial_fit_task(images, np.repeat(task, 20))
        >>> learner.classes_, learner.predict(images).shape
        (['cat', 'dog', 'cow', 'hen'], (40,))
        >>> sum(learner.memory_bytes().values()) <= 20_000
        True
    """

    def __init__(
        self,
        backbone: Backbone = "resnet8",
        budget: Budget | str | int | None = None,
        *,
        split_at: str = "stage3",
        train_base: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(backbone, budget, **options)
        self.split_at, self.train_base = split_at, train_base

    def _split(self) -> str | None:
        return self.split_at

    def _own_params(self) -> list[str]:
        return ["split_at", "train_base"]


def _order(label: Label) -> tuple[str, Any]:
    return ("str", label) if isinstance(label, str) else ("number", label)


def _specialised(backbone: Backbone, channels: int, split_at: str | None, seed: int) -> nn.Module:
    return build(backbone, channels, split_at, seed)[1]  # a function of its own, so that learners pickle


def _relative(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm().clamp_min(1e-12))


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _batches_per_epoch(rows: int, size: int) -> int:
    return max(1, rows // size + int(rows % size > 1))


def _batches(rows: int, size: int, steps: int, draws: np.random.Generator) -> Iterator[np.ndarray]:
    """Exactly ``steps`` batches, pass after pass in new orders.

    Batch norm cannot train on one row: a single left-over joins the batch before it, a single row in all is
    doubled.
    """
    done = 0
    while True:
        order = draws.permutation(rows) if rows > 1 else np.zeros(2, np.int64)
        count = _batches_per_epoch(len(order), size)
        for i in range(count):
            yield order[i * size : (i + 1) * size if i < count - 1 else len(order)]
            done += 1
            if done == steps:
                return
