"""For WSGI servers of yours: everything works, but each waiting poll then holds one of their threads."""

from fl_server_api.requests import wsgi_application

application = wsgi_application()
