"""How many bytes one user may keep here: models as they were uploaded, what he reports on them, and unused uploads."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.conf import settings
from django.db import transaction
from django.db.models import Q, Sum
from django.utils import timezone

from fl_server_core.exceptions import Conflict
from fl_server_core.models import Blob, Upload, User
from fl_server_core.services.metrics import metrics_kept


def storage_used(user: User) -> int:
    """Bytes that count. What aggregations add to a model does not, nor do updates: the server keeps those."""
    theirs = (
        Q(versions__model__owner=user, versions__strategy="")
        | Q(template_of__owner=user)
        | Q(preprocessing_of__owner=user)
    )
    ids = Blob.objects.filter(theirs).values("pk")  # copies of a model share its files
    stored = Blob.objects.filter(pk__in=ids).aggregate(total=Sum("size"))["total"] or 0
    uploads = Upload.objects.filter(owner=user, used_at=None, expires_at__gt=timezone.now())
    stored += metrics_kept(user)
    return int(stored + (uploads.aggregate(total=Sum("length"))["total"] or 0))


def storage_check(*, user: User, size: int) -> None:
    """Raise `Conflict` (STORAGE_QUOTA) if `size` bytes more are too many for this user."""
    own = user.storage_bytes
    quota = settings.FL_USER_BYTES if own is None else own
    if not quota:
        return
    used = storage_used(user)
    if used + size > quota:
        raise Conflict(
            f"you may keep {quota:,} bytes here, {used:,} are used, and these are {size:,}; delete models or "
            "unused uploads, or ask the admin for more",
            code="STORAGE_QUOTA",
            used=used,
            quota=quota,
        )


@contextmanager
def storage_claimed(*, user: User, size: int) -> Iterator[None]:
    """`storage_check` in a transaction with the rows that the block makes, one after the other for each user.

    The user's row is locked until the commit: for what has been read and checked before. No training is
    locked in it, nor is it entered with one locked.
    """
    with transaction.atomic():
        locked = User.objects.select_for_update(no_key=True).get(pk=user.pk)
        storage_check(user=locked, size=size)
        yield
