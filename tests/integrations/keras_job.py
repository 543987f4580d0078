"""A model of Keras on torch, trained without tracing and traced, with a validation after each epoch."""

from __future__ import annotations

import json
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

import traceml
from tests.integrations.left_behind import digest, state_of


def train() -> str:
    """Train three epochs of ten batches, and return the parameters."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dropout(0.1), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    rows = np.random.default_rng(0).random((120, 8), dtype=np.float32)
    model.fit(rows[:80], rows[:80, :1], batch_size=8, epochs=3, validation_data=(rows[80:], rows[80:, :1]), verbose=0)
    return digest(model)


if __name__ == "__main__":
    plain, before = train(), state_of()
    traceml.init(local=True, quiet=True)
    traced = train()
    traceml.shutdown()
    left = [name for name, value in state_of().items() if before.get(name, value) is not value]
    print(json.dumps({"same": plain == traced, "left": left}))
