"""A site's own program, as a site would write it: `python -m tests.system.client_process ...`."""

import argparse
from pathlib import Path
from typing import Any

import fl_client
from tests.system.sites import samples, trained


class Site(fl_client.Client):
    def __init__(self, number: int) -> None:
        self._number = number

    def fit(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.FitResult:
        result = trained(weights, self._number, config["round"])
        return fl_client.FitResult(result, samples(self._number))

    def evaluate(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.EvaluateResult:
        return fl_client.EvaluateResult({"loss": 0.5}, samples(self._number))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--token", required=True)
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    given = parser.parse_args()
    final = fl_client.run(
        Site(given.number), url=given.url, token=given.token, ca=given.ca, workdir=given.workdir
    )
    print("final model", final["sha256"] if final else None)  # noqa: T201


if __name__ == "__main__":
    main()
