"""The simple linear rival that several recipes set beside their method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memspan.base import optional, refuse

__all__ = ["Linear", "logistic"]

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Linear:
    """A fitted logistic regression.

    Attributes:
        model: scikit-learn's pipeline of scaling and regression.
        C: its inverse strength of regularisation.
        trained: numbers it trained.
        iterations: passes of the solver over its data, in the final fit.
        fields: values of the crossing field, in the order of their columns; empty without one.
    """

    model: Any
    C: float
    trained: int
    iterations: int
    fields: tuple[Any, ...] = ()

    def predict(self, X: ArrayLike, cross: ArrayLike | None = None) -> NDArray[Any]:
        """Classes of the rows; ``cross`` where it was fitted with one."""
        return np.asarray(self.model.predict(_crossed(X, cross, self.fields)))

    def predict_proba(self, X: ArrayLike, cross: ArrayLike | None = None) -> NDArray[Any]:
        """Probabilities of the rows' classes."""
        return np.asarray(self.model.predict_proba(_crossed(X, cross, self.fields)))

    def score(self, X: ArrayLike, y: ArrayLike, cross: ArrayLike | None = None) -> float:
        """Share of right answers."""
        return float((self.predict(X, cross) == np.asarray(y)).mean())


def logistic(
    train: tuple[ArrayLike, ArrayLike],
    valid: tuple[ArrayLike, ArrayLike] | None = None,
    cross: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    C: float | None = None,
) -> Linear:
    """Standardised logistic regression, its strength chosen on validation data.

    Args:
        train: (X (n, d), y).
        valid: the same, to choose C from 0.001 to 1; not needed where C is given.
        cross: one field (a domain) of the training and of the validation rows: every column then stands once
            for all and once for each value of the field.
        C: used as it is.

    Raises:
        BadInput: neither validation data nor C.
        ImportError: scikit-learn is missing.

    Example:
        >>> X = np.arange(40.0)[:, None]
        >>> fitted = logistic((X, X[:, 0] > 20), (X, X[:, 0] > 20))
        >>> fitted.score(X, X[:, 0] > 20) > 0.9, fitted.trained
        (True, 2)
    """
    if valid is None and C is None:
        refuse("valid", valid, "give validation data to choose C on, or C itself")
    fields: tuple[Any, ...] = tuple(np.unique(np.asarray(cross[0]))) if cross is not None else ()
    rows = _crossed(train[0], cross[0] if cross is not None else None, fields)
    best: tuple[float, float, Any] | None = None
    for strength in STRENGTHS if C is None else (C,):
        model = _fitted(rows, train[1], strength)
        if valid is None:
            score = 0.0
        else:
            held = _crossed(valid[0], cross[1] if cross is not None else None, fields)
            score = float(model.score(held, valid[1]))
        if best is None or score > best[0]:
            best = (score, strength, model)
    assert best is not None
    _, strength, model = best
    top = model[-1]
    trained = int(top.coef_.size + top.intercept_.size)
    return Linear(model, strength, trained, int(np.max(top.n_iter_)), fields)


def _fitted(X: NDArray[Any], y: ArrayLike, C: float) -> Any:
    linear = optional("sklearn.linear_model", extra="recipes")
    pipeline = optional("sklearn.pipeline", extra="recipes")
    scaling = optional("sklearn.preprocessing", extra="recipes")
    # lbfgs stops by itself; 200 passes are enough for standardised columns
    model = pipeline.make_pipeline(scaling.StandardScaler(), linear.LogisticRegression(C=C, max_iter=200))
    return model.fit(X, np.asarray(y))


def _crossed(X: ArrayLike, cross: ArrayLike | None, fields: tuple[Any, ...]) -> NDArray[Any]:
    rows = np.asarray(X, dtype=np.float64)
    rows = rows.reshape(len(rows), -1)
    if not fields:
        return rows
    if cross is None:
        refuse("cross", cross, "this model was fitted with a crossing field; give it for these rows too")
    here = np.asarray(cross)
    return np.concatenate([rows, *(rows * (here == field)[:, None] for field in fields)], axis=1)
