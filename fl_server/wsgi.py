"""For WSGI servers of yours: everything works, but each waiting poll then holds one of their threads."""

from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
