"""No uncertainty: the model is run once, as it is."""

from fl_server_ai.uncertainty import UNCERTAINTY, DrawPlan, Kind, Method
from fl_server_ai.uncertainty.options import CommonOptions


@UNCERTAINTY.register("NONE")
class Plain(Method[CommonOptions]):
    """The index of the largest output for `multiclass`, else the outputs: `summary.plain_answer`."""

    kind = Kind.PLAIN

    def plan(self) -> DrawPlan:
        return DrawPlan(self.kind, 1, self.options.seed)
