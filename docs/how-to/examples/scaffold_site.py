"""A site of a SCAFFOLD training, with NumPy: `python scaffold_site.py URL TOKEN`."""

import sys
from typing import Any

import numpy as np

import fl_client
from fl_client import Context, FitResult, Scaffold

STEPS, RATE = 10, np.float32(0.1)
X = np.linspace(-1, 1, 50, dtype=np.float32)
Y = 3 * X - 1  # this site's own data


class Line(fl_client.Client):
    """Fits `slope` and `offset`, each of shape (1,)."""

    def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> FitResult:
        scaffold = Scaffold(context, weights)
        now = dict(weights)
        for _ in range(STEPS):
            wrong = now["slope"] * X + now["offset"] - Y
            gradient = {"slope": (wrong * X).mean(), "offset": wrong.mean()}
            for name in now:
                now[name] = now[name] - RATE * (gradient[name] + scaffold.correction[name])
        change = scaffold.finish(weights, now, lr_sum=STEPS * float(RATE))
        return FitResult(now, num_examples=len(X), num_steps=STEPS, extras={"scaffold.dc": change})


if __name__ == "__main__":
    print(fl_client.run(Line(), url=sys.argv[1], token=sys.argv[2]))
