"""Kill points around the acknowledgements of the API; only the settings of the fault tests install it."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase

from fl_server_core.killpoints import reached

SENT = "fl.sent"  # in a request's META: what the front calls once its answer is with the socket
ANSWERS = {
    ("POST", "models/"): "answer.model",
    ("POST", "trainings/"): "answer.training",
    ("POST", "trainings/<str:pk>/start/"): "answer.start",
    ("POST", "models/<str:pk>/"): "answer.update",
    ("POST", "tasks/<str:pk>/result/"): "answer.update",
    ("POST", "models/<str:pk>/metrics/"): "answer.metrics",
    ("POST", "models/<str:pk>/swag/"): "answer.moments",
    ("POST", "inference/"): "answer.question",
    ("POST", "models/<str:pk>/calibration/"): "answer.calibration",
    ("POST", "clients/me/join/"): "answer.join",
    ("POST", "tasks/<str:pk>/failure/"): "answer.failure",
    ("PUT", "trainings/<str:pk>/clients/"): "answer.clients",
    ("DELETE", "trainings/<str:pk>/clients/"): "answer.clients",
    **{
        ("POST", f"trainings/<str:pk>/{control}/"): "answer.control"
        for control in ("pause", "resume", "cancel", "retry", "extend")
    },
    ("POST", "updates/<str:pk>/release/"): "answer.decision",
    ("POST", "updates/<str:pk>/refuse/"): "answer.decision",
    ("GET", "tasks/"): "answer.task",
    ("POST", "uploads/"): "answer.upload",
    ("PATCH", "uploads/<str:pk>/"): "answer.piece",
}


class AnswerPointsMiddleware:
    """The point before an answer is where everything is done; the one after, where the socket has it.

    So the client reads the answer of a process that was killed there. Only the front comes to it.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        response = self.get_response(request)
        step = _step(request)
        if step is None or response.status_code >= 400:
            return response
        reached(f"{step}:before")
        request.META.get(SENT, []).append(lambda: reached(f"{step}:after"))
        return response


def _step(request: HttpRequest) -> str | None:
    if request.resolver_match is None:
        return None
    route = request.resolver_match.route.removeprefix("api/").removeprefix("v1/")
    return ANSWERS.get((request.method or "", route))
