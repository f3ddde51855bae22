"""What a training's `options` may hold: the trainer's own, its strategy's, and values for the clients."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

from fl_server_ai.aggregation import STRATEGIES, Strategy
from fl_server_ai.aggregation.dtypes import BUFFER_POLICIES
from fl_server_ai.aggregation.options import asked_for, parse_options, schema
from fl_server_ai.containers import Manifest
from fl_server_ai.received.names import check_model_names
from fl_server_ai.received.wanted import Patterns, Wanted
from fl_server_ai.uncertainty import UNCERTAINTY
from fl_server_ai.uncertainty.options import parse_options as parse_uncertainty
from fl_server_core.exceptions import Invalid, Unavailable
from fl_server_core.models import GlobalModel, Training
from fl_server_core.models.trainings import UncertaintyMethod
from fl_server_core.services.round_policy import RoundPolicy, policy_faults

SWAG_WORDS = {"last": 0, "every": 1}
MAX_CLIENT_CONFIG = 16_384
ANY_NUMBER = 1_000_000  # of participants: as many as may still join


@dataclass(frozen=True)
class TrainerOptions(RoundPolicy):
    """How the rounds of a training follow each other; names as in the wire contract."""

    skip_model_tests: bool = field(
        default=False, metadata={"doc": "No test rounds at all; wins over the next option."}
    )
    model_test_after_each_round: bool = field(
        default=True, metadata={"doc": "Test every new model, not only the last one."}
    )
    delete_local_models_after_aggregation: bool = field(
        default=True,
        metadata={
            "doc": "Delete the files of updates once their round is published. With ENSEMBLE those of the "
            "newest one are kept as its members, which can be asked together and not be downloaded."
        },
    )
    daisy_chain_period: int = field(
        default=0,
        metadata={
            "doc": "Local rounds in each of which a site goes on with another's model "
            "(FedDC, arXiv:2110.03469); target_num_updates is multiplied by it. 0: no chaining.",
            "ge": 0,
            "le": 1_000_000,
        },
    )
    aggregation_period: int | None = field(
        default=0,
        metadata={
            "doc": "Average the chained models after so many local rounds; 0: daisy_chain_period, "
            "null: only at the end.",
            "ge": 0,
        },
    )
    chain_period: int = field(
        default=1, metadata={"doc": "Hand models on after so many local rounds.", "ge": 1}
    )
    chain_weight: str = field(
        default="last",
        metadata={
            "doc": "A chained model counts by its last site's samples, or by all since the last "
            "average.",
            "choices": ("last", "chain_samples"),
        },
    )
    swag_rounds: int = field(
        default=0,
        metadata={
            "doc": 'With SWAG: ask for moments after the last aggregation (0 or "last"), after every '
            'one (1 or "every"), or after every n-th.',
            "ge": 0,
        },
    )
    swag_rank: int = field(
        default=0,
        metadata={
            "doc": "With SWAG: at most so many columns of deviations from each site, and of all together "
            "(the paper's K, 20 there); 0: none, draws are diagonal. Each is as large as the model.",
            "ge": 0,
            "le": 100,
        },
    )
    reset_state: str = field(
        default="session",
        metadata={
            "choices": ("never", "session"),
            "doc": "Of strategies that remember something from round to round (moments, control variates): when "
            "a training starts from a model that the same strategy has trained before, go on with what it "
            "remembers (never), or forget it (session). never is refused where sites keep a part of it, for one "
            "training: SCAFFOLD, FedDyn, IIADMM. Pauses, retries and restarts belong to the same session.",
        },
    )
    buffer_policy: str = field(
        default="mean",
        metadata={
            "choices": BUFFER_POLICIES,
            "doc": "What becomes of integer and bool tensors, such as the counters of batch normalisation: the exact "
            "mean with the weights of the strategy (of bools the majority), the largest value that any of its updates "
            "has, or what the model has.",
        },
    )
    include: list[str] = field(
        default_factory=list,
        metadata={
            "doc": "Globs of the tensors that are trained together; none: all. The others are not sent, "
            "and stay as they are (FedBN, FedPer, LoRA)."
        },
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"doc": 'Globs of tensors that are not, even if included, such as "*.bn*".'},
    )
    test_every: int | None = field(
        default=None,
        metadata={
            "doc": "With model_test_after_each_round: test after so many rounds, and at the end; if null "
            "after each, in asynchronous modes only at the end.",
            "ge": 1,
        },
    )
    max_update_norm: float | None = field(
        default=None,
        metadata={
            "doc": "Updates are bad that are farther than this from the model that they started from: the "
            "Euclidean norm of update - base over all float numbers.",
            "gt": 0.0,
        },
    )
    min_update_cosine: float | None = field(
        default=None,
        metadata={
            "doc": "Updates are bad whose direction has a smaller cosine than this with the mean direction of "
            "the others of the round (at least 3 in all), compared when the round could close.",
            "ge": -1.0,
            "le": 1.0,
        },
    )
    bad_updates: str = field(
        default="quarantine",
        metadata={
            "doc": "A bad update does not count until the actor or an admin releases it, and the round waits for "
            "that until its deadline (quarantine); or it is refused at once.",
            "choices": ("quarantine", "refuse"),
        },
    )
    no_fixed_points: bool = field(
        default=False, metadata={"doc": "Nobody gets his own model back when models are handed on."}
    )

    @property
    def aggregation_every(self) -> int | None:
        """Local rounds between two averages of chained models; None: only at the end."""
        return self.daisy_chain_period if self.aggregation_period == 0 else self.aggregation_period


CHAINING = frozenset({"aggregation_period", "chain_period", "chain_weight", "no_fixed_points"})
TRAINER_FIELDS = frozenset(option.name for option in fields(TrainerOptions))


def options_validate(
    *,
    aggregation_method: str,
    options: Mapping[str, Any],
    uncertainty_method: str = UncertaintyMethod.NONE,
) -> None:
    """Refuse, with a pointer, whatever this server would not do exactly as asked."""
    if aggregation_method not in STRATEGIES:
        raise Invalid(
            f"there is no strategy {aggregation_method[:64]!r}; there are {', '.join(STRATEGIES)}",
            code="UNKNOWN_STRATEGY",
            errors=[
                {
                    "pointer": "/aggregation_method",
                    "code": "unknown",
                    "detail": f"one of {', '.join(STRATEGIES)}",
                }
            ],
        )
    uncertainty_options(uncertainty_method, options)
    trainer, strategy, _ = _split(aggregation_method, options)
    for name in asked_for(type(strategy).Options):
        if name not in options:
            raise _fault(
                name,
                f"must be given: {aggregation_method} has no default that is safe for all",
                "required",
            )
    if "reset_state" in options and not remembers(strategy):
        raise _fault(
            "reset_state",
            f"{aggregation_method} remembers nothing from round to round with these options",
            "unknown",
        )
    _check_chaining(aggregation_method, options, trainer)
    whole = strategy.takes == "weights" and not strategy.needs_steps and not strategy.extras()
    if trainer.daisy_chain_period and not whole:
        _refuse(
            "daisy_chain_period",
            f"{aggregation_method} needs more or other than the weights that sites hand on",
        )
    if trainer.daisy_chain_period and strategy.knows_participants:
        _refuse(
            "daisy_chain_period",
            f"{aggregation_method} goes by whose update each is, and a chain's model is that of several",
        )
    if uncertainty_method == UncertaintyMethod.ENSEMBLE and strategy.takes != "weights":
        raise Invalid(
            f"{aggregation_method} takes a {strategy.takes} of each site, which is no model to ask",
            code="NO_MODELS",
            errors=[
                {
                    "pointer": "/uncertainty_method",
                    "code": "choice",
                    "detail": "not ENSEMBLE with this strategy",
                }
            ],
        )
    if trainer.swag_rank == 1:
        raise _fault("swag_rank", "0, or at least 2: one column has no spread")
    for name, said in policy_faults(trainer):
        raise _fault(name, said)
    _check_fewest(aggregation_method, _split(aggregation_method, options)[1], trainer)
    _check_skipping(trainer, uncertainty_method)
    _check_mode(aggregation_method, trainer, uncertainty_method)
    _check_checking(aggregation_method, strategy, trainer)


def strategy_kind(name: str) -> type[Strategy[Any]]:
    """The strategy that a training names; `Unavailable` if its plug-in was taken away meanwhile."""
    if name not in STRATEGIES:
        raise Unavailable(
            f"the strategy {name!r} is not installed on this server; put its plug-in back and restart",
            code="STRATEGY_MISSING",
        )
    return STRATEGIES[name]


def remembers(strategy: Strategy[Any]) -> bool:
    """Whether something is kept from round to round, with these options."""
    return bool(strategy.state_blocks or strategy.state_dict())


def strategy_schema(name: str) -> dict[str, Any]:
    """JSON schema of a strategy's options, and of those of the training that say how it combines.

    Among these `reset_state`, where it may remember something.
    """
    kind = strategy_kind(name)
    described = schema(kind.Options)
    remembering = kind.state_blocks or kind.state_dict is not Strategy.state_dict
    shared = ("buffer_policy", *(["reset_state"] if remembering else []))
    every = schema(TrainerOptions)["properties"]
    if kind.clients_keep:
        every["reset_state"]["enum"] = ["session"]
    described["properties"] |= {option: every[option] for option in shared}
    return described


def check_reset(model: GlobalModel, aggregation_method: str, options: Mapping[str, Any]) -> None:
    """Refuse to keep what another strategy remembers, or a part of what only belongs together."""
    if options.get("reset_state") != "never":
        return
    if half := strategy_kind(aggregation_method).clients_keep:
        raise _fault(
            "reset_state",
            f"sites of {aggregation_method} keep {half}, and begin each training without; going on with the "
            'server\'s part alone would move the optimum for good. Leave the option out, or say "session"',
            "choice",
        )
    made_by = model.weights.strategy
    if made_by not in ("", aggregation_method):
        raise _fault(
            "reset_state",
            f"the model was trained with {made_by}, whose state {aggregation_method} can't go on with",
        )


def _check_chaining(method: str, given: Mapping[str, Any], options: TrainerOptions) -> None:
    every = options.aggregation_every
    wrong = ""
    if not options.daisy_chain_period:
        wrong = "daisy_chain_period" if method == "FedDC" or CHAINING & given.keys() else ""
        said = f"{method if method == 'FedDC' else 'chaining'} needs daisy_chain_period >= 1"
    elif every is not None and options.chain_period > every:
        wrong = "chain_period"
        said = f"chain_period is 1 to {every}, the local rounds between two averages"
    if wrong:
        raise _fault(wrong, said)


def _check_fewest(method: str, strategy: Strategy[Any], options: TrainerOptions) -> None:
    most = options.goal(ANY_NUMBER)
    if strategy.fewest() > most:
        name = "clients_per_round" if options.buffer_size is None else "buffer_size"
        raise _fault(
            name,
            f"{method} needs {strategy.fewest()} updates ({strategy.assumes}), a round comes to {most} at "
            "most with these options",
        )


def _check_mode(method: str, options: TrainerOptions, uncertainty_method: str) -> None:
    meant = strategy_kind(method).mode
    if (meant == "async") != (options.mode == "async") or (
        meant == "buffered" and options.mode != "buffered"
    ):
        raise _fault("mode", f"{method} is for the mode {meant}")
    late = "mode" if options.buffered else "late_updates"
    if options.takes_late and options.daisy_chain_period:
        raise _fault(
            late, "a daisy chain has no late updates: every site waits for another's model"
        )
    if options.takes_late and (reason := strategy_kind(method).only_fresh):
        raise _fault(late, f"{method} needs the mode sync and late_updates refuse: {reason}")
    if options.buffered and uncertainty_method == UncertaintyMethod.SWAG:
        raise _fault("mode", "SWAG asks for moments of one model, in the mode sync")


def _check_checking(method: str, strategy: Strategy[Any], options: TrainerOptions) -> None:
    """Updates can be checked where each belongs to one round and is a model."""
    asked = [
        name
        for name in ("max_update_norm", "min_update_cosine")
        if getattr(options, name) is not None
    ]
    if asked and strategy.takes != "weights":
        raise _fault(asked[0], f"{method} takes a {strategy.takes} of each site, not weights")
    if not asked and not _overrides_check(strategy):
        return
    what = asked[0] if asked else f"{method}, which checks updates,"
    if options.daisy_chain_period:
        raise _fault(asked[0] if asked else "daisy_chain_period", f"{what} has no daisy chains")
    if options.takes_late:
        name = "mode" if options.buffered else "late_updates"
        raise _fault(name, f"{what} needs rounds that wait for their updates: sync, refuse")


def _overrides_check(strategy: Strategy[Any]) -> bool:
    return type(strategy).check is not Strategy.check


def checks_updates(training: Training) -> bool:
    """Whether a worker has a look at each update before it counts."""
    options, strategy, _ = _split(training.aggregation_method, training.options)
    limits = (options.max_update_norm, options.min_update_cosine)
    return limits != (None, None) or _overrides_check(strategy)


def _check_skipping(options: TrainerOptions, uncertainty_method: str) -> None:
    """A round may be skipped only where nothing else hangs on it."""
    skips = {
        "at_deadline": options.at_deadline == "skip",
        "sampling": options.sampling == "poisson",
    }
    for name in (name for name, may in skips.items() if may):
        if options.daisy_chain_period:
            raise _fault(name, "a round of a daisy chain can't be skipped")
        if uncertainty_method == UncertaintyMethod.SWAG:
            raise _fault(name, "with SWAG no round can be skipped: moments follow the last one")


def effective_policy(training: Training) -> RoundPolicy:
    """The training's policy; a round needs no fewer updates than its strategy does."""
    options, strategy, _ = _split(training.aggregation_method, training.options)
    return replace(options, min_updates=max(options.min_updates, strategy.fewest()))


def _fault(option: str, said: str, code: str = "range") -> Invalid:
    return Invalid(
        f"/options/{option}: {said}",
        code="BAD_OPTION",
        errors=[{"pointer": f"/options/{option}", "code": code, "detail": said}],
    )


def _split(
    aggregation_method: str, options: Mapping[str, Any]
) -> tuple[TrainerOptions, Strategy[Any], dict[str, Any]]:
    rest = dict(options)
    config = rest.pop("client_config", {})
    if not isinstance(config, dict) or len(json.dumps(config)) > MAX_CLIENT_CONFIG:
        raise Invalid(
            f"client_config is an object of at most {MAX_CLIENT_CONFIG} bytes",
            code="BAD_OPTION",
            errors=[
                {"pointer": "/options/client_config", "code": "type", "detail": "a small object"}
            ],
        )
    rest.pop("uncertainty", None)  # checked once, for the training's method
    rest = {**rest, **_swag_rounds(rest)}
    own = {name: rest.pop(name) for name in list(rest) if name in TRAINER_FIELDS}
    kind = strategy_kind(aggregation_method)
    trainer = parse_options(TrainerOptions, own)
    if trainer.mode is None:
        trainer = replace(trainer, mode=kind.mode)
    if trainer.mode == "async" and trainer.buffer_size is None:
        trainer = replace(trainer, buffer_size=1)
    beside = ["client_config", "uncertainty", *(option.name for option in fields(TrainerOptions))]
    return trainer, kind(parse_options(kind.Options, rest, beside=beside)), config


def _swag_rounds(options: Mapping[str, Any]) -> dict[str, Any]:
    """The word or number as a number; what is neither is left to be refused by its type."""
    given = options.get("swag_rounds")
    if isinstance(given, str) and given in SWAG_WORDS:
        return {"swag_rounds": SWAG_WORDS[given]}
    return {}


def uncertainty_options(method: str, options: Mapping[str, Any]) -> Any:
    """`options.uncertainty` for a method, with defaults filled in; `Invalid` names every fault."""
    given = options.get("uncertainty", {})
    if not isinstance(given, Mapping):
        raise Invalid(
            "/options/uncertainty: an object",
            code="BAD_OPTION",
            errors=[{"pointer": "/options/uncertainty", "code": "type", "detail": "an object"}],
        )
    return parse_uncertainty(UNCERTAINTY[method].Options, given)


def swag_variance(training: Training) -> str:
    """Which spread of the weights the training's moments describe."""
    return str(uncertainty_options(UncertaintyMethod.SWAG, training.options).variance)


def trainer_options(training: Training) -> TrainerOptions:
    """The training's options with defaults filled in."""
    return _split(training.aggregation_method, training.options)[0]


def strategy_of(training: Training) -> Strategy[Any]:
    """A fresh strategy with the training's options."""
    return _split(training.aggregation_method, training.options)[1]


def patterns_of(trainer: TrainerOptions) -> Patterns:
    return Patterns(tuple(trainer.include), tuple(trainer.exclude))


def wanted_of(training: Training) -> Wanted:
    """What the training takes from its clients."""
    trainer, strategy, _ = _split(training.aggregation_method, training.options)
    return Wanted(strategy, patterns_of(trainer))


def check_wanted(manifest: Manifest, aggregation_method: str, options: Mapping[str, Any]) -> None:
    """Refuse patterns that no tensor of the model fits, and names that stand for something else."""
    trainer, strategy, _ = _split(aggregation_method, options)
    names = [tensor.name for tensor in manifest.tensors]
    check_model_names(names, strategy.extras())
    for key in ("include", "exclude"):
        for pattern in getattr(trainer, key):
            if not any(name in Patterns((pattern,)) for name in names):
                _refuse(key, f"no tensor of the model fits {pattern!r}")
    patterns = patterns_of(trainer)
    if not any(name in patterns for name in names):
        _refuse("exclude", "nothing would be left to train")


def _refuse(option: str, said: str) -> NoReturn:
    raise Invalid(
        f"/options/{option}: {said}",
        code="BAD_OPTION",
        errors=[{"pointer": f"/options/{option}", "code": "pattern", "detail": said}],
    )


def client_config(training: Training) -> dict[str, Any]:
    """What a task tells its client: the researcher's values, then the strategy's (they win)."""
    trainer, strategy, config = _split(training.aggregation_method, training.options)
    if scalars := training.model.weights.scalars:
        strategy.load_state_dict(scalars)
    said = {**config, **strategy.client_config()}
    if trainer.include or trainer.exclude:
        said |= {"include": trainer.include, "exclude": trainer.exclude}
    return said
