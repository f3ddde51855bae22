"""What Celery calls on the queue `inference`: a row id, perhaps twice."""

from celery import shared_task


@shared_task(name="fl_server_ai.inference.tasks.run_inference")
def run_inference(job_id: int) -> None:
    """Claim one job and answer it. A second delivery finds nothing to claim."""
    # Here and not above: Celery's parent process and beat import this module, and must not load torch.
    from fl_server_ai.inference.working import job_work

    job_work(job_id)
