"""Statistics of a model: a program looked at in the sandbox, weights by their header; kept for its architecture."""

from fl_server_ai.inference import pool
from fl_server_ai.sandbox.programs import Program
from fl_server_ai.services.models import PROGRAMS
from fl_server_ai.services.statistics import of_program, of_weights, run_shape, weights_manifest
from fl_server_core.exceptions import Conflict
from fl_server_core.models import InferenceJob
from fl_server_core.services.statistics import statistics_of_job, statistics_store
from fl_server_core.storage import local_path


def count(job: InferenceJob) -> None:
    """Fill the row that waits for this job; a second time the same is stored again."""
    model = job.model
    row = statistics_of_job(job)
    if row is None:
        raise Conflict("nobody waits for these statistics any more", code="GONE")
    if model.container not in PROGRAMS or model.template is None:
        found = of_weights(weights_manifest(model))
    else:
        with local_path(model.template) as path:
            # The uploaded file itself, so that all models made from it share a child that sees no inputs.
            program = Program(
                path, model.template.digest, PROGRAMS[model.container], tenant="statistics"
            )
            described = pool.describe(program, run_shape(model.input_shape))
        found = of_program(described, model.input_shape)
    statistics_store(model=model, key=row.key, result=found)
